"""Settings of the two training commands."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field, fields, replace
from typing import Any, Optional

from fusion.config.compositions import COMPOSITIONS, CompositionConfig
from fusion.config.data import DataConfig, Fold, require_max_length
from fusion.config.fields import MAX_SEED, Settings, checked, choice, integer, number, require
from fusion.config.methods import ADAPTER, METHODS, MethodConfig
from fusion.config.model import AdapterConfig, BackboneConfig, HeadConfig
from fusion.config.task import TaskConfig
from fusion.config.training import LoggerConfig, LossConfig, OptimConfig, TrainerConfig, default_rate
from fusion.tasks.table import kind_of
from fusion.text import did_you_mean, override, repeated

SELECTABLE = (  # by fusion.select
    *(name for name, one in METHODS.items() if not one.multitask),
    *(name for name, one in COMPOSITIONS.items() if not one.is_pruned),
)
RANKINGS = ("similarity", "logme", "probe", "attention")  # the scorers of fusion.rank
POOLED_RANKINGS = ("logme", "probe")  # scorers that need one vector per text


def source_names(value: Any, expected: str) -> Any:
    """Return `all`, `top:3` (if `expected` contains top:N), or a list of distinct names. Raises UserError otherwise."""
    if isinstance(value, list) and all(type(name) in (str, int, float) for name in value):
        names = [str(name) for name in value]
        twice = repeated(names)
        require(not twice, f"{override('sources', names)}: duplicate {', '.join(twice)}; expected each source once")
        return names
    known = value == "all" or ("top:N" in expected and re.fullmatch(r"top:[1-9]\d*", str(value)) is not None)
    require(known, f"{override('sources', value)}: expected {expected}")
    return value


def _are_distinct_rates(value: Any) -> bool:
    if not isinstance(value, list):
        return value is None
    numbers = all(type(rate) in (int, float) and 0 < rate < 1000 for rate in value)
    return 0 < len(value) == len(set(value)) and numbers


@dataclass
class StageConfig(Settings):
    """Settings shared by the two training commands."""

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
    init_from: Optional[str] = None  # stored artifact to initialize the weights from
    overwrite: bool = False
    resume: bool = True
    checkpoint_minutes: Optional[float] = number(  # interval of checkpoints within an epoch
        10.0, ">= 0", infinite=True, hint=" (0: after each batch)", null="after each epoch only"
    )
    compile: bool = False  # torch.compile for the backbone's layers; needs a C++ compiler
    seed: int = integer(42, 0, MAX_SEED)
    search: bool = False  # train with each of `search_rates` and `search_seeds` seeds, and keep the best artifact
    search_rates: Any = checked(  # learning rates
        None,
        _are_distinct_rates,
        "distinct numbers > 0 such as [1e-4,5e-4], or null for a third, one and three times optim.lr",
    )
    search_seeds: int = integer(1, 1, 1000)  # from `seed` on

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.search or (self.search_rates, self.search_seeds) == (None, 1),
            "search_rates and search_seeds: have no effect without search=true; leave them out",
        )
        self.backbone.dropout = bool(self.backbone.dropout)
        require(
            self.backbone.dtype != "float16" or str(self.trainer.precision) in ("16-mixed", "16"),
            "backbone.dtype=float16: small gradients become zero without loss scaling; expected trainer.precision=16-mixed, "
            "or backbone.dtype=bfloat16",
        )
        require(
            not (self.compile and self.backbone.gradient_checkpointing),
            "compile=true and backbone.gradient_checkpointing=true are incompatible: set one of them to false",
        )
        require(
            not self.trainer.shards or self.backbone.cache in ("auto", "off"),
            f"backbone.cache={self.backbone.cache}: with trainer.strategy=fsdp, features cannot be cached, since no "
            "process has all weights; expected backbone.cache=off",
        )
        require_max_length(self.data)
        rate = default_rate(self.rate_key, self.backbone.rates)
        require(
            self.search_rates is None or self.optim.lr in (None, rate),
            f"optim.lr={self.optim.lr}: search_rates are the learning rates; leave one of them out",
        )
        if self.optim.lr is None:
            self.optim.lr = rate
        if self.task is not None:
            self.loss.check([self.task])
            require(
                self.head.pooling is None or kind_of(self.task).items != "words",
                f"head.pooling={self.head.pooling}: {self.task.name} is a task of kind {self.task.kind}, whose head classifies each "
                "word without pooling; leave it out",
            )

    @property
    def rate_key(self) -> str:
        """Key of the default learning rate, see `RATES`."""
        return "adapter"

    @property
    def rates_to_search(self) -> list[float]:
        if self.search_rates is not None:
            return [float(rate) for rate in self.search_rates]
        return [float(f"{self.optim.rate * factor:.2g}") for factor in (1 / 3, 1.0, 3.0)]

    @property
    def task_list(self) -> list[TaskConfig]:
        """Tasks to train on, in order."""
        assert self.task is not None
        return [self.task]


@dataclass
class Stage1Config(StageConfig):
    method: MethodConfig = field(default_factory=MethodConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    tasks: Any = None  # multi-task training, instead of +task: names, which app.py resolves to TaskConfigs

    def __post_init__(self) -> None:
        method, definition = self.method.name, self.method.definition
        if self.backbone.dropout is None:  # a fully trained backbone uses its dropout, as in pre-training
            self.backbone.dropout = definition.whole
        super().__post_init__()
        require(
            definition.tune is None or self.backbone.cache in ("auto", "off"),
            f"backbone.cache={self.backbone.cache}: method={method} trains the backbone, so features "
            "cannot be cached; expected backbone.cache=off",
        )
        require(
            definition.dtype is None or self.backbone.dtype in (definition.dtype, "auto"),
            f"backbone.dtype={self.backbone.dtype}: method={method} trains weights of the backbone, which must be float32; "
            "expected trainer.precision=bf16-mixed to compute in bfloat16",
        )
        require(
            not (self.trainer.shards and definition.whole),
            f"trainer.strategy=fsdp: only frozen weights are sharded, and method={method} has none; expected trainer.strategy=ddp",
        )
        require(
            definition.kind == ADAPTER or self.adapter.drop is None,
            f"adapter.drop={self.adapter.drop}: method={method} has no adapters to drop; expected method=adapter",
        )
        if self.tasks is None:
            require(
                not definition.multitask,
                f"method={method} trains multiple tasks jointly: expected 'tasks=[TASK,ANOTHER]' instead of +task=",
            )
            return
        require(
            definition.multitask,
            f"tasks= with method={method}: multiple tasks need "
            f"{' or '.join(f'method={name}' for name, one in METHODS.items() if one.multitask)}\n"
            "For one run per task, start a sweep: -m +task=TASK,ANOTHER",
        )
        # In the processes of a DDP job, tasks are plain containers.
        self.tasks = [
            TaskConfig.from_dict(task, where="tasks") if isinstance(task, dict) else task for task in self.tasks
        ]
        self.loss.check(self.task_list)

    @property
    def task_list(self) -> list[TaskConfig]:
        return super().task_list if self.tasks is None else list(self.tasks)

    @property
    def rate_key(self) -> str:
        return self.method.definition.rate

    @property
    def kind(self) -> str:
        """Kind of the stored artifact."""
        return self.method.definition.kind

    def default_name(self) -> str:
        names = [str(task.name) for task in self.task_list]
        name = "-".join(names)
        if len(name) > 60:  # the store allows 100 characters, and a sweep appends to the name
            name = f"{names[0]}-and-{len(names) - 1}-more-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        return name if self.method.is_default else f"{name}-{self.method.name}"


@dataclass
class Stage2Config(StageConfig):
    composition: CompositionConfig = field(default_factory=CompositionConfig)
    sources: Any = field(default_factory=list)  # names; all and top:N are resolved to names before the run starts
    sources_by: Optional[str] = choice(None, RANKINGS, null="the mean of their ranks")  # for top:N

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sources = source_names(self.sources, "a list of names such as [mnli,sst2], all, or top:N")
        if self.composition.definition.is_pruned:
            self._check_pruned()
        require(
            len(self.sources) > 0 or self.composition.definition.is_pruned,
            "sources is empty: expected adapters of the store, such as 'sources=[mnli,sst2]'",
        )
        require(
            self.sources_by is None or str(self.sources).startswith("top:"),
            f"sources_by={self.sources_by}: only applies to sources=top:N; leave it out",
        )

    @property
    def rate_key(self) -> str:
        return self.composition.definition.rate

    def _check_pruned(self) -> None:
        """Raise UserError if sources, head or settings are given, which a pruned fusion takes from the stored fusion."""
        asked = self.composition
        require(
            asked.fusion is not None and asked.keep is not None,
            "composition=pruned: expected composition.fusion=NAME, a fusion of the store, and composition.keep=K, the "
            "number of sources per layer",
        )
        own = asked.pruning_of(CompositionConfig())
        other = [
            *(["sources"] if isinstance(self.sources, str) else []),
            *(f"composition.{f.name}" for f in fields(own) if getattr(asked, f.name) != getattr(own, f.name)),
            *(["head"] if self.head != HeadConfig() else []),
        ]
        require(
            not other,
            f"{', '.join(other)}: composition=pruned takes them from composition.fusion={asked.fusion}; leave them out",
        )

    def default_name(self) -> str:
        assert self.task is not None and self.task.name is not None
        return f"{self.task.name}-{self.composition.name}"


@dataclass
class SelectConfig(Stage2Config):
    """Settings of the selection of a method: those of stage 2, and the methods."""

    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    methods: Optional[list[str]] = checked(
        None,
        lambda names: names is None or 2 <= len(names) == len(set(names)),
        f"at least two distinct of {', '.join(SELECTABLE)}, or null for head, adapter and the composition",
    )

    def __post_init__(self) -> None:
        for name in self.methods or ():
            require(
                name in SELECTABLE,
                f"{override('methods', self.methods)}: unknown method {name}"
                + (did_you_mean(name, SELECTABLE) or f"; expected some of {', '.join(SELECTABLE)}"),
            )
        rate, dropout = self.optim.lr, self.backbone.dropout
        require(
            rate is None and self.search_rates is None,
            f"{'search_rates' if rate is None else 'optim.lr'}: the methods have different learning rates; leave it out, "
            "or set those of the backbone such as 'backbone.rates={adapter:1e-3,fusion:2e-4}'",
        )
        require(
            self.data.validation_fold is None,
            "data.validation_fold: the selection uses each fold of the validation examples; leave it out",
        )
        require(not self.trainer.fast_dev_run, "trainer.fast_dev_run: saves no artifacts to compare; leave it out")
        super().__post_init__()
        self.optim.lr, self.backbone.dropout = None, dropout  # each method has its own default
        require(
            self.composition.name in self.candidates,
            f"{override('methods', self.methods)}: composition={self.composition.name} is not among them; add it, or set "
            "composition=NAME to one of them",
        )
        require(self.init_from is None, f"init_from={self.init_from}: the methods have different weights; leave it out")

    @property
    def candidates(self) -> list[str]:
        """Names of the methods and compositions; with equal scores, the first one is selected."""
        return ["head", ADAPTER, self.composition.name] if self.methods is None else list(self.methods)

    def candidate(self, name: str, folds: int) -> Stage1Config | Stage2Config:
        """Return the settings of the training of a method, which selects its best epoch on the first fold."""
        shared = {f.name: getattr(self, f.name) for f in fields(StageConfig)} | {
            "name": f"{self.name}-{name}",
            "data": replace(self.data, validation_fold=str(Fold(0, folds))),
            "optim": replace(self.optim),
            "backbone": replace(self.backbone),
        }
        if (method := METHODS.get(name)) is not None:
            if method.dtype is not None:
                shared["backbone"].dtype = method.dtype
            return Stage1Config(**shared, method=MethodConfig(name), adapter=self.adapter)
        composition = self.composition if name == self.composition.name else CompositionConfig(name)
        return Stage2Config(**shared, composition=composition, sources=self.sources)

    def default_name(self) -> str:
        assert self.task is not None and self.task.name is not None
        return f"{self.task.name}-selected"
