"""Methods of the comparison and their overrides, which may contain placeholders:

{half}      half the number of layers of the backbone
{keep}      two, or the number of sources minus one if that is smaller
{sources}   the source adapters; {others}: without those of the target; {dropped}: trained with AdapterDrop
{tasks}     the tasks of the sources and the target
{ID}        the artifact of the method with that id and its best learning rate, which has to be listed before
"""

from __future__ import annotations

from dataclasses import dataclass
from string import Formatter

SINGLE, MULTITASK, COMPOSITIONS = "one task alone", "multi-task", "combinations"  # values in results.json
GROUPS = (SINGLE, MULTITASK, COMPOSITIONS)
NEED_SOURCES = {"half", "sources", "others", "dropped"}  # {half} is read from the manifest of a source
_FUSION = "sources=[{sources}] composition=adapterfusion"
_COMPOSE = "sources=[{sources}] composition="
_WITH_MULTITASK = "sources=[{sources},{multitask_adapter}] composition=adapterfusion"
_OWN = "sources=[{others},{pfeiffer}] composition=adapterfusion composition."
_DROP = f"{_FUSION} composition.drop="
FOLDS = 4  # of cross-fitting
_PRUNED = "composition=pruned composition.fusion={adapterfusion} composition.keep={keep} composition.train="
# id, title, overrides
_TABLE: dict[str, tuple[tuple[str, str, str], ...]] = {
    SINGLE: (
        ("head", "head alone", "method=head"),
        ("full", "full fine-tuning", "method=full"),
        ("bitfit", "BitFit", "method=bitfit"),
        ("lora", "LoRA", "method=lora"),
        ("pfeiffer", "single adapter", "adapter=pfeiffer"),
        ("houlsby", "single adapter, Houlsby", "adapter=houlsby"),
        ("houlsby_ffn_only", "single adapter, Houlsby, feed-forward only", "adapter=houlsby_ffn_only"),
        ("parallel", "parallel adapter", "adapter=parallel"),
        ("parallel_learned", "parallel adapter, learned scaling", "adapter=parallel adapter.scaling=learned"),
        ("before_attention", "adapter before attention", "adapter=before_attention"),
        ("shared", "one adapter for all layers", "adapter.shared=true"),
        ("drop_specialized", "AdapterDrop, specialized", "adapter.drop=specialized:{half}"),
        ("drop_robust", "AdapterDrop, robust", "adapter.drop=robust"),
    ),
    MULTITASK: (
        ("multitask_adapter", "one adapter for all tasks", "tasks=[{tasks}] method=multitask_adapter"),
        ("multitask_full", "one model for all tasks", "tasks=[{tasks}] method=multitask_full"),
    ),
    COMPOSITIONS: (
        ("adapterfusion", "AdapterFusion", _FUSION),
        ("fusion_no_value", "AdapterFusion without value matrix", f"{_FUSION} composition.value_matrix=false"),
        ("fusion_rank_32", "AdapterFusion, query and key of rank 32", f"{_FUSION} composition.rank=32"),
        ("fusion_null_source", "AdapterFusion with a null source", f"{_FUSION} composition.null_source=true"),
        (
            "fusion_prior",
            "AdapterFusion, initialized to the single adapter",
            f"{_OWN}prior=own composition.prior_own=0.9 composition.prior_penalty=0.1",
        ),
        (
            "fusion_source_dropout",
            "AdapterFusion, single adapter dropped",
            f"{_OWN}source_dropout=0.5 composition.dropped=own",
        ),
        ("fusion_cross_fit", "AdapterFusion, single adapter cross-fitted", f"{_OWN}cross_fit={FOLDS}"),
        ("fusion_gate", "AdapterFusion, one gate per layer", f"{_FUSION} composition.gate=layer composition.rank=32"),
        ("lora_flow", "LoRA-Flow gate", f"{_COMPOSE}lora_flow"),
        ("arrow", "Arrow routing", f"{_COMPOSE}arrow"),
        ("static", "static weights", f"{_COMPOSE}static"),
        ("mean", "mean of the outputs", f"{_COMPOSE}mean"),
        ("scalearn", "ScaLearn", f"{_COMPOSE}scalearn"),
        ("scalearn_uniform", "ScaLearn uniform", f"{_COMPOSE}scalearn_uniform"),
        ("scalearn_pp", "ScaLearn++", f"{_COMPOSE}scalearn_pp"),
        ("scalearn_uniform_pp", "ScaLearn uniform++", f"{_COMPOSE}scalearn_uniform_pp"),
        ("cat", "CAT", f"{_COMPOSE}cat"),
        ("sequence", "sequence-level fusion", f"{_COMPOSE}sequence"),
        ("average", "average of the weights", f"{_COMPOSE}average composition.train=false"),
        ("ties", "TIES merge of the weights", f"{_COMPOSE}average composition.merge=ties"),
        ("dare", "DARE merge of the weights", f"{_COMPOSE}average composition.merge=dare"),
        ("average_trained", "average of the weights, fine-tuned", f"{_COMPOSE}average composition.train=true"),
        ("fusion_target_adapter", "AdapterFusion with a new adapter", f"{_FUSION} composition.target_adapter=true"),
        ("continued", "best source, fine-tuned", f"{_COMPOSE}continued"),
        ("fusion_drop_specialized", "AdapterFusion, dropped layers", f"{_DROP}specialized:{{half}}"),
        ("fusion_drop_robust", "AdapterFusion, robust to drops", f"{_DROP}robust"),
        ("fusion_of_dropped", "AdapterFusion of dropped adapters", "sources=[{dropped}] composition=adapterfusion"),
        ("fusion_with_multitask", "AdapterFusion, with a multi-task adapter", _WITH_MULTITASK),
        ("pruned", "AdapterFusion, pruned", f"{_PRUNED}false"),
        ("pruned_trained", "AdapterFusion, pruned, two more epochs", f"{_PRUNED}true trainer.max_epochs=2"),
    ),
}


@dataclass(frozen=True)
class Row:
    """A method of the comparison. `words` are its overrides; its artifacts are named TARGET-ID."""

    id: str
    title: str
    group: str
    words: str

    @property
    def module(self) -> str:
        return "fusion.stage2" if self.group == COMPOSITIONS else "fusion.stage1"

    @property
    def trains(self) -> bool:
        """Whether anything is trained. A pruned fusion is stored without training."""
        return self.id != "pruned"

    @property
    def placeholders(self) -> set[str]:
        """Names of the placeholders in the overrides."""
        return {name for _, name, _, _ in Formatter().parse(self.words) if name}

    @property
    def needs(self) -> set[str]:
        """Ids of the methods whose artifacts the method depends on."""
        return self.placeholders & set(IDS)


ROWS = tuple(Row(id, title, group, words) for group, rows in _TABLE.items() for id, title, words in rows)
IDS = tuple(row.id for row in ROWS)


def chosen(ids: list[str]) -> list[Row]:
    """Return the methods with these ids (default: all) and their dependencies, in the order of the table."""
    wanted = set(ids or IDS)
    for row in reversed(ROWS):  # methods are listed after their dependencies
        if row.id in wanted:
            wanted |= row.needs
    return [row for row in ROWS if row.id in wanted]
