"""The settings of the two training commands."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field, fields
from typing import Any, Optional

from fusion.config.checks import in_range, one_of, require
from fusion.config.data import DataConfig
from fusion.config.logging import LoggerConfig
from fusion.config.methods import ADAPTER, METHODS
from fusion.config.model import AdapterConfig, BackboneConfig, CompositionConfig, HeadConfig, MethodConfig
from fusion.config.task import TaskConfig
from fusion.config.training import LossConfig, OptimConfig, TrainerConfig
from fusion.tasks.table import kind_of
from fusion.text import override, repeated

RANKINGS = ("similarity", "logme", "probe", "attention")  # how fusion.rank looks at sources
POOLED_RANKINGS = ("logme", "probe")  # those that need one vector per text


def source_names(value: Any, ways: str) -> Any:
    """`all`, `top:3`, or a list of names.

    Args:
        ways: what may be said.

    Raises:
        UserError: it is none of them, or a name stands twice.
    """
    if isinstance(value, str):
        known = value == "all" or ("top:N" in ways and re.fullmatch(r"top:[1-9]\d*", value) is not None)
        require(known, f"{override('sources', value)}: expected {ways}")
        return value
    require(
        isinstance(value, list) and all(type(name) in (str, int, float) for name in value),
        f"{override('sources', value)}: expected {ways}",
    )
    names = [str(name) for name in value]
    twice = repeated(names)
    require(
        not twice, f"{override('sources', names)}: duplicate {', '.join(twice)}; expected each source once"
    )
    return names


@dataclass
class StageConfig:
    """What the two training commands share."""

    task: Optional[TaskConfig] = None
    data: DataConfig = field(default_factory=DataConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    store: str = "outputs/store"
    name: Optional[str] = None
    init_from: Optional[str] = None  # an artifact of the store whose weights training starts from
    overwrite: bool = False
    resume: bool = True
    checkpoint_minutes: Optional[float] = (
        10.0  # between two checkpoints within an epoch; null: each epoch alone
    )
    compile: bool = False  # torch.compile for the backbone's layers; needs a C++ compiler
    seed: int = 42

    def __post_init__(self) -> None:
        self.backbone.dropout = bool(self.backbone.dropout)
        require(
            not (self.compile and self.backbone.gradient_checkpointing),
            "compile=true and backbone.gradient_checkpointing=true do not go together: choose one of them",
        )
        require(
            self.data.max_length is not None,
            "data.max_length=null: expected a number of tokens, at least 4, such as 128",
        )
        in_range(
            "checkpoint_minutes",
            self.checkpoint_minutes,
            at_least=0,
            whole=False,
            infinite=True,
            null="after each epoch alone",
            hint=" (0: after each batch)",
        )
        in_range("seed", self.seed, at_least=0, at_most=2**32 - 1)
        if self.task is not None:
            self.loss.check([self.task])
            require(
                self.head.pooling is None or kind_of(self.task).items != "words",
                f"head.pooling={self.head.pooling}: {self.task.name} is {kind_of(self.task).noun}, whose head scores "
                "each word and pools nothing; leave it out",
            )

    @property
    def task_list(self) -> list[TaskConfig]:
        """What is trained on, in order."""
        assert self.task is not None
        return [self.task]


@dataclass
class Stage1Config(StageConfig):
    method: MethodConfig = field(default_factory=MethodConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    tasks: Any = None  # in place of +task: names of tasks to train at once, of which app.py makes TaskConfigs

    def __post_init__(self) -> None:
        method, definition = self.method.name, self.method.definition
        if self.backbone.dropout is None:  # what trains as a whole drops out, as in pre-training
            self.backbone.dropout = definition.whole
        super().__post_init__()
        require(
            definition.tune is None or self.backbone.cache in ("auto", "off"),
            f"backbone.cache={self.backbone.cache}: method={method} trains inside the backbone, so that no part of "
            "it stays the same; expected backbone.cache=off",
        )
        require(
            definition.kind == ADAPTER or self.adapter.drop is None,
            f"adapter.drop={self.adapter.drop}: method={method} has no adapters to drop; expected method=adapter",
        )
        several = " or ".join(f"method={name}" for name, one in METHODS.items() if one.multitask)
        if self.tasks is None:
            require(
                not definition.multitask,
                f"method={method} trains several tasks at once: say 'tasks=[TASK,ANOTHER]' in place of +task=",
            )
            return
        require(
            definition.multitask,
            f"tasks= with method={method}: several tasks at once need {several}\n"
            "One run for each task is a sweep: -m +task=TASK,ANOTHER",
        )
        # Plain containers where a process of a DDP job was handed them.
        self.tasks = [
            TaskConfig.from_dict(task, where="tasks") if isinstance(task, dict) else task
            for task in self.tasks
        ]
        self.loss.check(self.task_list)

    @property
    def task_list(self) -> list[TaskConfig]:
        return super().task_list if self.tasks is None else list(self.tasks)

    @property
    def kind(self) -> str:
        """What is stored: of several tasks the same as of one."""
        return self.method.definition.kind

    def default_name(self) -> str:
        names = [str(task.name) for task in self.task_list]
        name = "-".join(names)
        if len(name) > 60:  # the store takes 100, and a sweep adds to it
            name = f"{names[0]}-and-{len(names) - 1}-more-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        return name if self.method.is_default else f"{name}-{self.method.name}"


@dataclass
class Stage2Config(StageConfig):
    composition: CompositionConfig = field(default_factory=CompositionConfig)
    sources: Any = field(default_factory=list)  # names; all and top:N become names before anything is run
    sources_by: Optional[str] = None  # top:N: which method's ranks count; null: their mean

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sources = source_names(self.sources, "a list of names such as [mnli,sst2], all, or top:N")
        if self.composition.definition.is_pruned:
            self._check_pruned()
        require(
            len(self.sources) > 0 or self.composition.definition.is_pruned,
            "sources is empty: name adapters of the store, such as 'sources=[mnli,sst2]'",
        )
        if self.sources_by is not None:
            one_of("sources_by", self.sources_by, RANKINGS)
            require(
                str(self.sources).startswith("top:"),
                f"sources_by={self.sources_by}: says by which method the best are taken; expected sources=top:N",
            )

    def _check_pruned(self) -> None:
        asked = self.composition
        require(
            isinstance(self.sources, list),
            f"{override('sources', self.sources)}: a pruned fusion has the sources of the fusion it is made of; leave sources= out",
        )
        require(
            asked.fusion is not None,
            "composition=pruned: expected the fusion to prune, composition.fusion=NAME, one of the store",
        )
        own = asked.pruning_of(CompositionConfig())
        other = [
            f"composition.{f.name}" for f in fields(own) if getattr(asked, f.name) != getattr(own, f.name)
        ]
        require(
            not other,
            f"{', '.join(other)}: a pruned fusion is as composition.fusion={asked.fusion} was trained; leave it out",
        )
        require(
            self.head == HeadConfig(),
            f"head: a pruned fusion has the head of composition.fusion={asked.fusion}; leave head.* out",
        )

    def default_name(self) -> str:
        assert self.task is not None and self.task.name is not None
        return f"{self.task.name}-{self.composition.name}"
