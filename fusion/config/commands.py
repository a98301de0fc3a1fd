"""The settings of the commands that use stored artifacts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Optional

from fusion.config.checks import in_range, one_of, require
from fusion.config.data import DataConfig, LimitConfig
from fusion.config.logging import LoggerConfig
from fusion.config.model import BackboneConfig, HeadConfig, SameBackboneConfig
from fusion.config.stages import POOLED_RANKINGS, RANKINGS, source_names
from fusion.config.task import TaskConfig
from fusion.tasks.table import kind_of
from fusion.text import override


@dataclass
class UseConfig:
    """What evaluating and predicting share: an artifact, by name in the store or by path."""

    artifact: str = "???"
    store: str = "outputs/store"
    data: DataConfig = field(default_factory=DataConfig)
    backbone: SameBackboneConfig = field(default_factory=SameBackboneConfig)
    accelerator: str = "auto"
    drop: int = 0  # AdapterDrop: leave out what the first layers' slots hold

    def __post_init__(self) -> None:
        in_range("drop", self.drop, at_least=0, hint=" layers")
        require(
            getattr(self, "split", None) != "", "split= is empty: expected a split, such as split=validation"
        )


@dataclass
class EvaluateConfig(UseConfig):
    task: Optional[TaskConfig] = None  # null: the artifact's own
    split: str = "validation"
    logger: LoggerConfig = field(default_factory=LoggerConfig)


@dataclass
class InspectConfig(UseConfig):
    split: str = "validation"
    words: Any = 10  # rows to show word by word: so many, or these
    prune: bool = True  # also the score with fewer and fewer sources

    def __post_init__(self) -> None:
        super().__post_init__()
        asked = self.words if isinstance(self.words, list) else [self.words]
        require(
            all(type(row) is int and row >= 0 for row in asked) and asked != [],
            f"{override('words', self.words)}: expected how many rows to show, at least 0, or which: words=[0,5,17]",
        )


@dataclass
class ReportConfig:
    runs: Any = "outputs"  # a folder, or a list of folders
    output: Optional[str] = None  # null: report.html in the first of them
    split: Optional[str] = None  # null: of each target the split that most methods have a score on
    inspect: bool = True  # look into fusions that nobody has looked into
    inspect_rows: int = 500
    words: int = 10  # rows of each fusion to show word by word
    files: bool = True  # figures and tables as files too
    data: DataConfig = field(default_factory=DataConfig)
    accelerator: str = "auto"

    def __post_init__(self) -> None:
        names = self.runs if isinstance(self.runs, list) else [self.runs]
        require(
            bool(names) and all(isinstance(name, str) and name for name in names),
            f"{override('runs', self.runs)}: expected a folder, or several: 'runs=[outputs/stage1,outputs/stage2]'",
        )
        in_range("inspect_rows", self.inspect_rows, at_least=1)
        in_range("words", self.words, at_least=0)

    @property
    def folders(self) -> list[Path]:
        return [Path(name) for name in (self.runs if isinstance(self.runs, list) else [self.runs])]

    @property
    def path(self) -> Path:
        return Path(self.output) if self.output is not None else self.folders[0] / "report.html"

    def data_with(self, limit: LimitConfig) -> DataConfig:
        return replace(self.data, limit=limit)


@dataclass
class PredictConfig(UseConfig):
    task: Optional[TaskConfig] = None  # null: the artifact's own, where it has one
    input: str = "???"
    output: str = "???"
    attention: bool = False


@dataclass
class RankConfig:
    """Ranking stored adapters for a target before a fusion of them is trained."""

    task: Optional[TaskConfig] = None  # the target
    sources: Any = "all"  # names, or all: every adapter of the store on this backbone
    include_target: bool = False  # all: also those that were trained on the target itself
    methods: list[str] = field(default_factory=lambda: list(RANKINGS))
    rows: int = 1000  # of the target and of each source's task, at most
    epochs: int = 2  # attention: of the short fusion run
    lr: float = 5e-4  # likewise
    data: DataConfig = field(default_factory=DataConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    store: str = "outputs/store"
    accelerator: str = "auto"
    seed: int = 42  # of the short fusion run

    def __post_init__(self) -> None:
        self.sources = source_names(self.sources, "a list of names such as [mnli,sst2], or all")
        require(
            self.sources == "all" or len(self.sources) >= 2,
            f"{override('sources', self.sources)}: a ranking needs at least two; expected all, or a list such as [mnli,sst2]",
        )
        require(
            not self.include_target or self.sources == "all",
            "include_target=true: says what sources=all means; a list names the target's own adapters itself",
        )
        for method in self.methods:
            one_of("methods", method, RANKINGS)
        require(
            len(self.methods) > 0 and len(set(self.methods)) == len(self.methods),
            f"{override('methods', self.methods)}: expected some of {', '.join(RANKINGS)}, each once",
        )
        require(
            self.data.max_length is not None,
            "data.max_length=null: expected a number of tokens, at least 4, such as 128",
        )
        in_range("rows", self.rows, at_least=2)
        in_range("epochs", self.epochs, at_least=1)
        in_range("lr", self.lr, above=0, below=1e3, whole=False, hint=", such as 5e-4")
        in_range("seed", self.seed, at_least=0, at_most=2**32 - 1)
        self.methods = [name for name in RANKINGS if name in self.methods]  # in one order, whatever was typed
        if self.task is not None and not kind_of(self.task).is_pooled:
            others = [name for name in RANKINGS if name not in POOLED_RANKINGS]
            require(
                set(self.methods) <= set(others),
                f"{override('methods', self.methods)}: {self.task.name} is {kind_of(self.task).noun}, and "
                f"{' and '.join(POOLED_RANKINGS)} score one vector per text; expected {override('methods', others)}",
            )
