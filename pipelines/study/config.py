"""Compare fusion with its baselines on many targets with few labels, at equal budget and on examples that chose nothing.

    python -m pipelines.study data_dir=../shared/data targets=[sst2,qqp] rows=[100] seeds=[1,2,3]

Source adapters are trained once, on up to `source_rows` examples. For each target, number of training examples and seed
(which also selects the sample of training examples), each method of `methods` is trained with the same number of
steps and the same examples. The best of its evaluations, and for each method and number of examples the best of `rates`
(with the first seed, averaged over the targets), are selected on `validation_rows` examples that are held out from the
training split. The scores are those on the examples of the task's test split or, if it has no labels, validation split,
which select nothing. The sources of a target never include its own adapter of all examples, nor those of
`RELATED_TEXTS`.

Each result is appended to `results` as one JSON line, so that an interrupted study continues, and several processes
that are started with the same settings share the work (on a CPU, each with OMP_NUM_THREADS=1). Artifacts of stage 2
are removed after their evaluation. `report=true` trains nothing. Tables and picture are written next to `results`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from fusion.config.fields import Settings, checked, integer
from pipelines.commands import distinct

STAGE1, STAGE2 = "fusion.stage1", "fusion.stage2"
BASELINE = "adapter"
SELECTED = "selected"  # the method of `SELECTED_FROM` with the best validation score, by target and seed
SELECTED_FROM = ("adapter", "fusion_new_adapter")
# Pairs of tasks that share texts: the adapter of one is not a source for the other.
RELATED_TEXTS = ({"sst2", "mr"}, {"mrpc", "stsb"}, {"movies", "movies_rating"}, {"tweets", "tweets_rating"})
FOLDS = 4  # of cross-fitting
# The main metric of these tasks is F1, which is highest at few labels if every example is predicted to be positive.
METRICS = {"qqp": ("accuracy", "f1"), "mrpc": ("accuracy", "f1")}


class StudyMethod(NamedTuple):
    """A method of the study. Its overrides may contain {own}, {sources} and {loras}, LoRAs of the same tasks."""

    title: str
    module: str
    overrides: str
    rates: tuple[float, ...]  # learning rates to select from

    @property
    def uses_own(self) -> bool:
        """Whether the target's own adapter is among the sources."""
        return "{own}" in self.overrides

    @property
    def uses_loras(self) -> bool:
        """Whether the sources are LoRAs."""
        return "{loras}" in self.overrides


_FUSION = "composition=adapterfusion sources=[{sources}"
METHODS: dict[str, StudyMethod] = {
    "head": StudyMethod("head", STAGE1, "method=head", (2e-3, 5e-3, 2e-2)),
    "adapter": StudyMethod("single adapter", STAGE1, "", (5e-4, 1e-3, 2e-3)),
    "full": StudyMethod("full fine-tuning", STAGE1, "method=full", (2e-5, 5e-5, 1e-4)),
    "fusion": StudyMethod("fusion, as published", STAGE2, _FUSION + ",{own}]", (1e-4, 2e-4, 5e-4)),
    "fusion_without_own": StudyMethod("fusion without the own adapter", STAGE2, _FUSION + "]", (1e-4, 2e-4, 5e-4)),
    "fusion_cross_fit": StudyMethod(
        "fusion, cross-fitted", STAGE2, _FUSION + f",{{own}}] composition.cross_fit={FOLDS}", (1e-4, 2e-4, 5e-4)
    ),
    "fusion_dropout": StudyMethod(
        "fusion, own adapter dropped",
        STAGE2,
        _FUSION + ",{own}] composition.source_dropout=0.5 composition.dropped=own",
        (1e-4, 2e-4, 5e-4),
    ),
    "fusion_new_adapter": StudyMethod(
        "fusion with a new adapter and source dropout",
        STAGE2,
        _FUSION + "] composition.target_adapter=true composition.null_source=true composition.source_dropout=0.5",
        (2e-4, 5e-4, 1e-3),
    ),
    "scalearn": StudyMethod("ScaLearn", STAGE2, "composition=scalearn sources=[{sources},{own}]", (2e-3, 5e-3, 1e-2)),
    "mean": StudyMethod("mean", STAGE2, "composition=mean sources=[{sources},{own}]", (2e-3, 5e-3, 2e-2)),
    "continued": StudyMethod(
        "best source, continued", STAGE2, "composition=continued sources=[{sources}]", (5e-4, 1e-3, 2e-3)
    ),
    "lora": StudyMethod("single LoRA", STAGE1, "method=lora", (1e-3, 2e-3, 5e-3)),
    "lora_fusion": StudyMethod(
        "fusion of LoRAs", STAGE2, "composition=adapterfusion sources=[{loras}]", (5e-4, 1e-3, 2e-3)
    ),
    "lora_flow": StudyMethod("LoRA-Flow", STAGE2, "composition=lora_flow sources=[{loras}]", (1e-3, 2e-3, 5e-3)),
    "lora_cat": StudyMethod("CAT", STAGE2, "composition=cat sources=[{loras}]", (2e-3, 5e-3, 1e-2)),
    "lora_scalearn": StudyMethod(
        "ScaLearn of LoRAs", STAGE2, "composition=scalearn sources=[{loras}]", (2e-3, 5e-3, 1e-2)
    ),
    "lora_arrow": StudyMethod("Arrow", STAGE2, "composition=arrow sources=[{loras}]", (2e-3, 5e-3, 2e-2)),
}
LORA_METHODS = ("lora", "lora_fusion", "lora_flow", "lora_cat", "lora_scalearn", "lora_arrow")
LORA = "-lora"  # ends the names of source LoRAs


@dataclass
class StudyConfig(Settings):
    targets: list[str] = distinct(["sst2", "qqp", "subj", "cola", "mrpc", "stsb", "snli", "rte", "cb", "tweets"])
    sources: list[str] = distinct(
        ["mr", "sst2", "products", "movies", "qqp", "mrpc", "stsb", "snli", "qnli", "subj", "cola"]
    )
    rows: list[int] = distinct([100, 1000])
    seeds: list[int] = distinct([1, 2, 3, 4, 5])
    methods: list[str] = checked(
        [name for name in METHODS if name not in LORA_METHODS],
        lambda ids: 0 < len(ids) == len(set(ids)) and set(ids) <= METHODS.keys(),
        f"some of {', '.join(METHODS)}",
    )
    backbone: str = "minilm"
    data_dir: str | None = None
    source_rows: int = integer(3000, 1)
    validation_rows: int = integer(100, 1)
    test_rows: int = integer(1000, 1)
    output: str = "outputs/study"
    results: str = "docs/results/study.jsonl"
    overrides: list[str] = field(  # of the methods
        default_factory=lambda: [
            "data.batch_size=16",
            "data.max_length=96",
            "optim.epochs=3",
            "optim.min_steps=150",
            "optim.patience=null",
        ]
    )
    source_overrides: list[str] = field(
        default_factory=lambda: ["data.max_length=96", "trainer.max_epochs=3", "optim.lr=1e-3"]
    )
    lora_overrides: list[str] = field(  # of the source LoRAs
        default_factory=lambda: ["data.max_length=96", "trainer.max_epochs=3", "optim.lr=2e-3", "method=lora"]
    )
    report: bool = False

    def fingerprint(self, method: str) -> str:
        """Identifies the settings that the scores of a method depend on, except those of `Cell`."""
        used = [self.sources, self.source_rows, self.validation_rows, self.test_rows, METRICS]
        definitions = [
            METHODS[one].overrides for one in (method, BASELINE) if one == method or METHODS[method].uses_own
        ]
        sources = self.lora_overrides if METHODS[method].uses_loras else self.source_overrides
        content = json.dumps([*used, self.overrides, sources, *definitions])
        return hashlib.sha256(content.encode()).hexdigest()[:8]

    @property
    def order(self) -> list[str]:
        """The methods in the order of training: the single adapter is the own adapter of others."""
        own = [BASELINE] if any(METHODS[one].uses_own or one == BASELINE for one in self.methods) else []
        return own + [one for one in self.methods if one != BASELINE]

    @property
    def compared(self) -> list[str]:
        """The methods of the tables."""
        return self.methods + ([SELECTED] if set(SELECTED_FROM) <= set(self.methods) else [])

    @property
    def store(self) -> Path:
        return Path(self.output) / "store"

    @property
    def data(self) -> Path:
        return Path(self.output) / "data"

    @property
    def shared(self) -> list[str]:
        return [f"backbone={self.backbone}", f"store={self.store}", "logger=none"]

    def sources_of(self, target: str) -> list[str]:
        related = [pair for pair in RELATED_TEXTS if target in pair]
        return [source for source in self.sources if source != target and not any(source in pair for pair in related)]
