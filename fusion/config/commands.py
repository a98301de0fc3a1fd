"""Settings of the commands that use stored artifacts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from fusion.config.data import DataConfig, require_max_length
from fusion.config.fields import MAX_SEED, Settings, checked, integer, number, require, subset
from fusion.config.model import BackboneConfig, HeadConfig, SameBackboneConfig
from fusion.config.stages import POOLED_RANKINGS, RANKINGS, source_names
from fusion.config.task import TaskConfig
from fusion.config.training import LoggerConfig
from fusion.tasks.table import kind_of
from fusion.text import override


@dataclass
class UseConfig(Settings):
    """Settings shared by the commands that use a stored artifact, given by name or path."""

    artifact: str = "???"
    store: str = "outputs/store"
    data: DataConfig = field(default_factory=DataConfig)
    backbone: SameBackboneConfig = field(default_factory=SameBackboneConfig)
    accelerator: str = "auto"
    drop: int = integer(0, 0, hint=" layers")  # AdapterDrop: number of first layers without adapters


@dataclass
class EvaluateConfig(UseConfig):
    task: Optional[TaskConfig] = None  # null: the task of the artifact
    split: str = checked("validation", bool, "a split, such as split=validation")
    logger: LoggerConfig = field(default_factory=LoggerConfig)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


@dataclass
class InspectConfig(UseConfig):
    split: str = checked("validation", bool, "a split, such as split=validation")
    words: Any = checked(  # number of examples to show token by token, or their indices
        10,
        lambda value: value != [] and all(type(row) is int and row >= 0 for row in _as_list(value)),
        "the number of examples to show, >= 0, or their indices: words=[0,5,17]",
    )
    prune: bool = True  # also evaluate with progressively fewer sources


@dataclass
class ReportConfig(Settings):
    runs: Any = checked(
        "outputs",
        lambda value: value != [] and all(isinstance(name, str) and name for name in _as_list(value)),
        "a folder or a list of folders: 'runs=[outputs/stage1,outputs/stage2]'",
    )
    output: Optional[str] = None  # null: report.html in the first of `runs`
    split: Optional[str] = None  # null: for each target, the split on which most methods were evaluated
    inspect: bool = True  # inspect fusions that have not been inspected
    inspect_rows: int = integer(500, 1)
    words: int = integer(10, 0)  # number of examples per fusion to show token by token
    files: bool = True  # also write figures and tables to separate files
    data: DataConfig = field(default_factory=DataConfig)
    accelerator: str = "auto"

    @property
    def folders(self) -> list[Path]:
        return [Path(name) for name in _as_list(self.runs)]

    @property
    def path(self) -> Path:
        return Path(self.output) if self.output is not None else self.folders[0] / "report.html"


@dataclass
class PredictConfig(UseConfig):
    task: Optional[TaskConfig] = None  # null: the task of the artifact, if it has one
    input: str = "???"
    output: str = "???"
    attention: bool = False


@dataclass
class RankConfig(Settings):
    """Settings for ranking stored adapters as sources for a target task."""

    task: Optional[TaskConfig] = None  # the target
    sources: Any = "all"  # names, or all: every stored adapter trained on this backbone
    include_target: bool = False  # with sources=all, also rank adapters trained on the target
    methods: list[str] = subset(list(RANKINGS), RANKINGS)
    rows: int = integer(1000, 2)  # maximum number of examples of the target and of each source task
    epochs: int = integer(2, 1)  # like `lr` and `seed`, of the short fusion run of the method `attention`
    lr: float = number(5e-4, "> 0 and < 1000", hint=", such as 5e-4")
    data: DataConfig = field(default_factory=DataConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    store: str = "outputs/store"
    accelerator: str = "auto"
    seed: int = integer(42, 0, MAX_SEED)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_max_length(self.data)
        self.sources = source_names(self.sources, "a list of names such as [mnli,sst2], or all")
        require(
            self.sources == "all" or len(self.sources) >= 2,
            f"{override('sources', self.sources)}: expected all, or a list of at least two names such as [mnli,sst2]",
        )
        require(
            not self.include_target or self.sources == "all",
            "include_target=true: only applies to sources=all; add the target's own adapters to the list instead",
        )
        self.methods = [name for name in RANKINGS if name in self.methods]  # always in this order
        if self.task is not None and not kind_of(self.task).is_pooled:
            others = [name for name in RANKINGS if name not in POOLED_RANKINGS]
            require(
                set(self.methods) <= set(others),
                f"{override('methods', self.methods)}: {self.task.name} is a task of kind {self.task.kind}, but "
                f"{' and '.join(POOLED_RANKINGS)} need one vector per text; expected {override('methods', others)}",
            )
