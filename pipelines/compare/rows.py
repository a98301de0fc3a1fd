"""The methods that are compared: a row each, with what is typed for it.

A word in braces is filled in when the row's turn comes:

    {half}      half of the backbone's layers
    {keep}      two, or one source fewer than there are
    {sources}   the source adapters, {dropped} the same ones trained with AdapterDrop
    {tasks}     the sources' tasks, and the target where it is none of them
    {ID}        the artifact that the row of that id reports; that row is trained before this one
"""

from __future__ import annotations

from dataclasses import dataclass
from string import Formatter

ALONE, MULTITASK, COMBINED = "one task alone", "multi-task", "combinations"
GROUPS = (ALONE, MULTITASK, COMBINED)
NEED_SOURCES = {"half", "sources", "dropped"}  # {half} as well: a stored source knows the number of layers


@dataclass(frozen=True)
class Row:
    """A method.

    Attributes:
        id: short and unique; its artifacts are called TARGET-ID.
        group: combinations are trained by stage 2, the others by stage 1.
        words: what is typed for it beside the task, the budget and the names.
        trains: false where nothing trains, so that there is neither a rate to choose nor an epoch.
    """

    id: str
    title: str
    group: str
    words: str
    trains: bool = True

    @property
    def module(self) -> str:
        return "fusion.stage2" if self.group == COMBINED else "fusion.stage1"

    @property
    def blanks(self) -> set[str]:
        """The words in braces."""
        return {name for _, name, _, _ in Formatter().parse(self.words) if name}

    @property
    def needs(self) -> list[str]:
        """The rows whose artifacts it is made from."""
        return [row.id for row in ROWS if row.id in self.blanks]


ROWS = (
    Row("head", "head alone", ALONE, "method=head"),
    Row("full", "full fine-tuning", ALONE, "method=full"),
    Row("bitfit", "BitFit", ALONE, "method=bitfit"),
    Row("lora", "LoRA", ALONE, "method=lora"),
    Row("pfeiffer", "single adapter", ALONE, "adapter=pfeiffer"),
    Row("houlsby", "single adapter, Houlsby", ALONE, "adapter=houlsby"),
    Row("houlsby_ffn_only", "single adapter, Houlsby's second only", ALONE, "adapter=houlsby_ffn_only"),
    Row("parallel", "parallel adapter", ALONE, "adapter=parallel"),
    Row(
        "parallel_learned",
        "parallel adapter, learnt scaling",
        ALONE,
        "adapter=parallel adapter.scaling=learned",
    ),
    Row("before_attention", "adapter before attention", ALONE, "adapter=before_attention"),
    Row("shared", "one adapter for all layers", ALONE, "adapter.shared=true"),
    Row("drop_specialized", "AdapterDrop, specialized", ALONE, "adapter.drop=specialized:{half}"),
    Row("drop_robust", "AdapterDrop, robust", ALONE, "adapter.drop=robust"),
    Row(
        "multitask_adapter",
        "one adapter for all tasks",
        MULTITASK,
        "tasks=[{tasks}] method=multitask_adapter",
    ),
    Row("multitask_full", "one model for all tasks", MULTITASK, "tasks=[{tasks}] method=multitask_full"),
    Row("adapterfusion", "AdapterFusion", COMBINED, "sources=[{sources}] composition=adapterfusion"),
    Row(
        "fusion_no_value",
        "AdapterFusion without value matrix",
        COMBINED,
        "sources=[{sources}] composition=adapterfusion composition.value_matrix=false",
    ),
    Row(
        "fusion_rank_32",
        "AdapterFusion, query and key of rank 32",
        COMBINED,
        "sources=[{sources}] composition=adapterfusion composition.rank=32",
    ),
    Row("static", "static weights", COMBINED, "sources=[{sources}] composition=static"),
    Row("mean", "mean of the outputs", COMBINED, "sources=[{sources}] composition=mean"),
    Row("scalearn", "ScaLearn", COMBINED, "sources=[{sources}] composition=scalearn"),
    Row("scalearn_uniform", "ScaLearn uniform", COMBINED, "sources=[{sources}] composition=scalearn_uniform"),
    Row("scalearn_pp", "ScaLearn++", COMBINED, "sources=[{sources}] composition=scalearn_pp"),
    Row(
        "scalearn_uniform_pp",
        "ScaLearn uniform++",
        COMBINED,
        "sources=[{sources}] composition=scalearn_uniform_pp",
    ),
    Row("sequence", "fusion by the whole text", COMBINED, "sources=[{sources}] composition=sequence"),
    Row(
        "average",
        "average of the weights, kept",
        COMBINED,
        "sources=[{sources}] composition=average composition.train=false",
    ),
    Row(
        "average_trained",
        "average of the weights, trained on",
        COMBINED,
        "sources=[{sources}] composition=average composition.train=true",
    ),
    Row(
        "fusion_target_adapter",
        "AdapterFusion with a new adapter",
        COMBINED,
        "sources=[{sources}] composition=adapterfusion composition.target_adapter=true",
    ),
    Row("continued", "best source, trained on", COMBINED, "sources=[{sources}] composition=continued"),
    Row(
        "fusion_drop_specialized",
        "AdapterFusion, dropped layers",
        COMBINED,
        "sources=[{sources}] composition=adapterfusion composition.drop=specialized:{half}",
    ),
    Row(
        "fusion_drop_robust",
        "AdapterFusion, robust to drops",
        COMBINED,
        "sources=[{sources}] composition=adapterfusion composition.drop=robust",
    ),
    Row(
        "fusion_of_dropped",
        "AdapterFusion of dropped adapters",
        COMBINED,
        "sources=[{dropped}] composition=adapterfusion",
    ),
    Row(
        "fusion_with_multitask",
        "AdapterFusion, multi-task adapter too",
        COMBINED,
        "sources=[{sources},{multitask_adapter}] composition=adapterfusion",
    ),
    Row(
        "pruned",
        "AdapterFusion, pruned",
        COMBINED,
        "composition=pruned composition.fusion={adapterfusion} composition.keep={keep} composition.train=false",
        trains=False,
    ),
    Row(
        "pruned_trained",
        "the same, trained on for two epochs",
        COMBINED,
        "composition=pruned composition.fusion={adapterfusion} composition.keep={keep} composition.train=true "
        "trainer.max_epochs=2",
    ),
)
IDS = tuple(row.id for row in ROWS)


def chosen(ids: list[str]) -> list[Row]:
    """The rows of these ids (none: all) and what they are made from, in the order of the list."""
    wanted = set(ids or IDS)
    for row in reversed(ROWS):  # what a row needs stands before it
        if row.id in wanted:
            wanted |= set(row.needs)
    return [row for row in ROWS if row.id in wanted]
