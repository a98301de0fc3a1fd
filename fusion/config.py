"""Every setting that is ours: its type, its range, and what a wrong value gets.

Hydra composes these from `conf/`; nothing heavy is imported here, so that a wrong key is
answered at once. `__post_init__` runs when `app.py` turns the composed config into objects.
`Any` stands where OmegaConf has no type for what is meant (its unions hold scalars only); the
check beside it says what is allowed.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Optional

from fusion.checks import as_stored, check_batches, check_drop, check_layers, in_range, one_of, require
from fusion.errors import UserError
from fusion.model.compositions import COMPOSITIONS, Composition
from fusion.model.methods import ADAPTER, METHODS, Method
from fusion.model.settings import flat_group
from fusion.overrides import override, shortened
from fusion.repeats import repeated
from fusion.tasks.table import KINDS, check_task, kind_of
from fusion.tasks.task import HubConfig as HubConfig
from fusion.tasks.task import Task

NONLINEARITIES = ("relu", "gelu", "silu", "tanh")
INITIAL_VALUES = ("bert", "houlsby", "zero_up")
SITES = ("before_attention", "attention", "feedforward")
READS = ("output", "normed", "stream", "input")
POOLINGS = ("cls", "mean")
CACHES = ("auto", "off", "float32", "float16")
RANKINGS = ("similarity", "logme", "probe", "attention")  # how fusion.rank looks at sources
POOLED_RANKINGS = ("logme", "probe")  # those that need one vector per text
PRECISIONS = (
    "32-true",
    "bf16-mixed",
    "16-mixed",
    "32",
    "bf16",
    "16",
)  # Lightning's that leave weights float32


def _sources(value: Any, ways: str) -> Any:
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


def _is_raw_label(entry: Any) -> bool:
    """An entry of `label_values`: a raw label, or a list of such."""
    values = entry if isinstance(entry, list) else [entry]
    return len(values) > 0 and all(isinstance(v, (str, int, float, bool, type(None))) for v in values)


@dataclass
class TaskConfig(Task):
    """A task file, checked."""

    def __post_init__(self) -> None:
        where = f"task {self.name}" if self.name else "task file"
        require(
            self.kind in KINDS, f"{where}: kind={shortened(self.kind)}: expected one of {', '.join(KINDS)}"
        )
        text = [self.text] if isinstance(self.text, str) else self.text
        require(
            isinstance(text, list) and 1 <= len(text) <= 2 and all(isinstance(t, str) for t in text),
            f"{where}: text={shortened(self.text)}: expected one column name or a list of two",
        )
        require(bool(self.label), f"{where}: label is empty: expected the name of a column")
        for metric in self.metrics:
            allowed = KINDS[self.kind].metric_names
            require(
                metric in allowed,
                f"{where}: metric {shortened(metric)} does not fit kind {self.kind}: expected {', '.join(allowed)}",
            )
        require(
            len(self.metrics) > 0,
            f"{where}: metrics is empty: name at least one of {', '.join(KINDS[self.kind].metric_names)}",
        )
        self.labels = self._label_names(where)
        require(
            all(_is_raw_label(entry) for entry in self.label_values or []),
            f"{where}: label_values={shortened(self.label_values)}: expected for each label a value, or a list of values",
        )
        values = [(type(value), repr(value)) for entry in self.raw_label_values for value in entry]
        require(
            len(set(values)) == len(values),
            f"{where}: label_values={shortened(self.label_values)}: a value stands twice",
        )
        check_task(self, where)
        require(
            all(isinstance(name, str) for name in self.columns.values()),
            f"{where}: columns={shortened(self.columns)}: expected the name of a column for each",
        )
        for split, names in self.hub.splits.items() if self.hub is not None else ():
            every = names if isinstance(names, list) and names else [names]
            require(
                all(isinstance(name, str) and name for name in every),
                f"{where}: hub.splits.{split}={shortened(names)}: expected the hub's name of a split, or a list of names",
            )

    def _label_names(self, where: str) -> Optional[list[str]]:
        if self.labels is None:
            return None
        require(
            isinstance(self.labels, list),
            f"{where}: labels={shortened(self.labels)}: expected a list of names",
        )
        require(
            all(isinstance(name, (str, int, float, bool, type(None))) for name in self.labels),
            f"{where}: labels={shortened(self.labels)}: expected a list of names",
        )
        require(
            not any(isinstance(name, bool) or name is None for name in self.labels),
            f"{where}: labels={shortened(self.labels)}: YAML reads yes, no, true, false and null as values of its own; "
            'write them in quotes, as "yes"',
        )
        return [str(name) for name in self.labels]

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> TaskConfig:
        """A task as the manifest `where` keeps it.

        Raises:
            UserError: it is none of this version.
        """
        try:
            hub = values.get("hub")
            return cls(**{**values, "hub": None if hub is None else HubConfig(**hub)})
        except (TypeError, UserError) as error:
            raise UserError(f"{where}: its task is none that this version reads ({error})") from error


@dataclass
class LimitConfig:
    """How many rows of each split to keep (null: all), drawn with a seed of its own."""

    train: Optional[int] = None
    validation: Optional[int] = None
    test: Optional[int] = None

    def __post_init__(self) -> None:
        for split in ("train", "validation", "test"):
            in_range(f"data.limit.{split}", getattr(self, split), at_least=1, null="all rows")


@dataclass
class SplitConfig:
    """Fractions of the training rows that become the splits which a task does not have."""

    validation: Optional[float] = None
    test: Optional[float] = None
    seed: int = 0  # of the draw, whatever the run's own seed
    stratify: bool = False  # classification: each part has the labels in the same proportions

    def __post_init__(self) -> None:
        for split in ("validation", "test"):
            hint = ", a fraction of the training rows such as 0.1"
            in_range(
                f"data.split.{split}",
                getattr(self, split),
                above=0,
                below=1,
                whole=False,
                hint=hint,
                null="no such split",
            )
        together = (self.validation or 0.0) + (self.test or 0.0)
        require(
            together < 1.0,
            f"data.split.validation={self.validation} and data.split.test={self.test} leave nothing to train on: "
            "expected less than 1 together",
        )
        in_range("data.split.seed", self.seed, at_least=0, at_most=2**32 - 1)
        for key in ("seed", "stratify"):
            require(
                together > 0.0 or not getattr(self, key),
                f"{override(f'data.split.{key}', getattr(self, key))}: no split is made; set data.split.validation=0.1, "
                f"data.split.test=0.1 or both, or leave data.split.{key} out",
            )

    def overrides(self) -> list[str]:
        """What differs from the defaults, as overrides."""
        values = {
            own.name: getattr(self, own.name)
            for own in fields(self)
            if getattr(self, own.name) != own.default
        }
        return [override(f"data.split.{key}", value) for key, value in values.items()]


@dataclass
class DataConfig:
    dir: Optional[str] = None  # read DIR/<task>/<split>.parquet (jsonl, …, conll) in place of the hub
    quoting: Optional[str] = None  # of CSV and TSV files: csv or none; null: csv in CSV, none in TSV
    limit: LimitConfig = field(default_factory=LimitConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    max_length: Optional[int] = (
        128  # tokens of a text or pair, special ones included; null: the artifact's own
    )
    batch_size: int = 32  # rows per device
    tokens_per_batch: Optional[int] = None  # padded tokens per device, in place of batch_size
    workers: int = 0  # loader processes; batches are only gathered there, so 0 is mostly fastest
    cache_dir: Optional[str] = None  # tokenised rows; null: the user's cache folder

    def __post_init__(self) -> None:
        # Null only where an artifact brings its own: `StageConfig` and `RankConfig` ask for a number.
        in_range("data.max_length", self.max_length, at_least=4, null="the artifact's own", hint=" tokens")
        in_range("data.batch_size", self.batch_size, at_least=1, hint=" row")
        least = self.max_length or 4
        in_range(
            "data.tokens_per_batch",
            self.tokens_per_batch,
            at_least=least,
            null="data.batch_size rows",
            hint=f", room for a text of data.max_length={least} tokens",
        )
        require(
            self.quoting in (None, "csv", "none"),
            f"{override('data.quoting', self.quoting)}: expected csv (a field may be in quotes), none (quotes are text), or null: "
            "csv for CSV files, none for TSV files",
        )
        in_range("data.workers", self.workers, at_least=0)


@dataclass
class BackboneConfig:
    name_or_path: str = "???"
    revision: Optional[str] = None
    pooling: str = "cls"  # what head.pooling is where it is not said
    dropout: Optional[bool] = (
        None  # whether the backbone's own dropout acts in training; null: only where all of it trains
    )
    cache: str = (
        "auto"  # what lies below the lowest slot is computed once a row and kept; auto: where it pays
    )
    cache_gb: float = 20.0  # what all that is kept may take on the disk
    gradient_checkpointing: bool = False  # less memory: each layer is computed again in backward
    trust_remote_code: bool = False  # runs the Python code that the backbone brings along, if it does

    def __post_init__(self) -> None:
        one_of("backbone.pooling", self.pooling, POOLINGS)
        one_of("backbone.cache", self.cache, CACHES)
        in_range("backbone.cache_gb", self.cache_gb, above=0, whole=False, infinite=True)
        require(
            not self.dropout or self.cache in ("auto", "off"),
            f"backbone.cache={self.cache}: with backbone.dropout=true a row is another one each time; "
            "expected backbone.cache=off, or backbone.dropout=false",
        )
        require(bool(self.name_or_path), "backbone.name_or_path is empty: expected a hub id or a folder")


@dataclass
class AdapterConfig:
    """A placement (sites and what the adapter reads there) and the adapter's own shape."""

    name: str = "pfeiffer"
    sites: list[str] = field(default_factory=lambda: ["feedforward"])
    reads: str = "normed"
    reduction_factor: Optional[float] = 16.0
    bottleneck_size: Optional[int] = None  # wins over reduction_factor where both are given
    nonlinearity: str = "relu"
    scaling: Any = 1.0  # a number, or learned
    init: str = "bert"
    dropout: float = 0.0
    layers: Any = None
    drop: Optional[str] = None  # AdapterDrop: specialized:N or robust
    shared: bool = False  # one adapter's weights for all layers

    def __post_init__(self) -> None:
        require(
            len(self.sites) > 0 and len(set(self.sites)) == len(self.sites) and set(self.sites) <= set(SITES),
            f"{override('adapter.sites', self.sites)}: expected some of {', '.join(SITES)}, each once",
        )
        require(
            "before_attention" not in self.sites or self.reads == "input",
            f"adapter.reads={self.reads}: before_attention has the layer's input alone to read; "
            "expected adapter.reads=input, or other adapter.sites",
        )
        require(
            self.scaling == "learned" or (type(self.scaling) in (int, float) and math.isfinite(self.scaling)),
            f"{override('adapter.scaling', self.scaling)}: expected a finite number, or learned (starts at 1)",
        )
        check_drop("adapter.drop", self.drop)
        one_of("adapter.reads", self.reads, READS)
        one_of("adapter.nonlinearity", self.nonlinearity, NONLINEARITIES)
        one_of("adapter.init", self.init, INITIAL_VALUES)
        in_range("adapter.dropout", self.dropout, at_least=0, below=1, whole=False)
        check_layers("adapter.layers", self.layers)
        if self.bottleneck_size is not None:
            in_range(
                "adapter.bottleneck_size", self.bottleneck_size, at_least=1, null="adapter.reduction_factor"
            )
        else:
            hint = ", or adapter.bottleneck_size=N"
            in_range("adapter.reduction_factor", self.reduction_factor, above=0, whole=False, hint=hint)

    def as_stored(self) -> dict[str, Any]:
        """As a manifest keeps it, see `CompositionConfig.as_stored`."""
        return as_stored(self, ("drop", "shared"))

    def size_for(self, hidden_size: int) -> int:
        """The bottleneck size R for a hidden size D: D // reduction_factor, at least 1."""
        if self.bottleneck_size is not None:
            return self.bottleneck_size
        assert self.reduction_factor is not None
        return max(1, int(hidden_size // self.reduction_factor))


_Method: Any = flat_group(
    "method",
    {name: method.settings for name, method in METHODS.items()},
    first=("name", "rank", "alpha", "dropout", "temperature", "targets"),
)


@dataclass
class MethodConfig(_Method):
    """What stage 1 trains beside the head: a name of `METHODS`, and the settings of all of them."""

    def __post_init__(self) -> None:
        for cls in self.classes.values():  # a value out of its range is named first, whatever the method
            self.values_for(cls)
        super().__post_init__()

    @property
    def definition(self) -> Method:
        return METHODS[self.name]


@dataclass
class HeadConfig:
    pooling: Optional[str] = None  # cls or mean; null: what the backbone's YAML says
    layers: int = 1  # 1: linear; 2: dense, tanh, linear
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.pooling is not None:
            one_of("head.pooling", self.pooling, POOLINGS)
        require(self.layers in (1, 2), f"head.layers={self.layers}: expected 1 or 2")
        in_range("head.dropout", self.dropout, at_least=0, below=1, whole=False)


_Composition: Any = flat_group(
    "composition",
    {name: composition.settings for name, composition in COMPOSITIONS.items()},
    first=("name", "value_matrix", "temperature", "dropout", "value_penalty", "layers"),
    later=("drop", "rank", "target_adapter", "train", "fusion", "keep"),
)


@dataclass
class CompositionConfig(_Composition):
    """How stage 2 combines its sources: a name of `COMPOSITIONS`, and the settings of all of them."""

    @property
    def definition(self) -> Composition:
        return COMPOSITIONS[self.name]

    def pruning_of(self, trained: CompositionConfig) -> CompositionConfig:
        """The settings of a pruned fusion: those that the fusion was trained with, but for what its pruning may set."""
        own = (*self.settings.training_only, "name", "train")
        return replace(trained, **{key: getattr(self, key) for key in own})


@dataclass
class OptimConfig:
    lr: float = 1e-4
    head_lr: Optional[float] = None  # null: lr
    weight_decay: float = 0.01
    warmup: float = 0.06  # fraction of all optimizer steps
    patience: Optional[int] = 3  # epochs without a better score before stopping; null: never stop early

    def __post_init__(self) -> None:
        in_range("optim.lr", self.lr, above=0, below=1e3, whole=False, hint=", such as 1e-4")
        hint = ", such as 1e-3"
        in_range("optim.head_lr", self.head_lr, above=0, below=1e3, whole=False, hint=hint, null="optim.lr")
        in_range("optim.weight_decay", self.weight_decay, at_least=0, whole=False)
        hint = ", a fraction of the steps"
        in_range("optim.warmup", self.warmup, at_least=0, at_most=1, whole=False, hint=hint)
        in_range("optim.patience", self.patience, at_least=1, null="no early stopping", hint=" epoch")


@dataclass
class LossConfig:
    """The training loss of classification and choice tasks, with the semantics of torch's cross entropy."""

    class_weights: Any = None  # balanced, or a number for each label, in the order of the task's labels
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        weights = self.class_weights
        numbers = isinstance(weights, list) and all(
            type(weight) in (int, float) and 0 < weight < math.inf for weight in weights
        )
        require(
            weights is None or weights == "balanced" or (numbers and len(weights) > 0),
            f"{override('loss.class_weights', weights)}: expected balanced, or a list with a number above 0 for each label, "
            "such as [1.0,2.5]",
        )
        in_range("loss.label_smoothing", self.label_smoothing, at_least=0, below=1, whole=False)

    def check(self, tasks: list[TaskConfig]) -> None:
        """Refuse settings that none of the tasks has a use for.

        Of several tasks, `balanced` applies to those that have classes, and smoothing to those whose loss has it.

        Raises:
            UserError: names the setting and the task.
        """
        kinds = {task.kind: kind_of(task) for task in tasks}
        names = ", ".join(str(task.name) for task in tasks)
        weights = self.class_weights
        require(
            weights is None or any(kind.has_classes for kind in kinds.values()),
            f"{override('loss.class_weights', weights)}: {names} has no classes ({' and '.join(sorted(kinds))}); leave it out",
        )
        require(
            self.label_smoothing == 0.0 or any(kind.smooths_labels for kind in kinds.values()),
            f"loss.label_smoothing={self.label_smoothing}: {names} is {kind_of(tasks[0]).noun}, which has no classes; "
            "leave it out",
        )
        if not isinstance(weights, list):
            return
        require(
            len(tasks) == 1,
            f"{override('loss.class_weights', weights)}: a list holds the weights of one task's labels, and this run trains {names}; "
            "expected loss.class_weights=balanced, which counts each task's own labels",
        )
        labels = tasks[0].labels or []
        require(
            len(weights) == len(labels),
            f"{override('loss.class_weights', weights)}: {len(weights)} weights for the {len(labels)} labels of {names} "
            f"({', '.join(labels[:20])}{', ...' if len(labels) > 20 else ''}); expected one for each, in this order",
        )


@dataclass
class TrainerConfig:
    """Lightning's Trainer, argument by argument; what YAML cannot say is left to the code."""

    accelerator: str = "auto"
    strategy: str = "auto"
    devices: Any = "auto"
    num_nodes: int = 1
    precision: Any = None
    fast_dev_run: Any = False
    max_epochs: Optional[int] = 30
    min_epochs: Optional[int] = None
    max_steps: int = -1
    min_steps: Optional[int] = None
    max_time: Any = None
    limit_train_batches: Any = None
    limit_val_batches: Any = None
    limit_test_batches: Any = None
    limit_predict_batches: Any = None
    overfit_batches: Any = 0.0
    val_check_interval: Any = None
    check_val_every_n_epoch: Optional[int] = 1
    num_sanity_val_steps: Optional[int] = 0
    log_every_n_steps: Optional[int] = 10
    enable_checkpointing: Optional[bool] = True
    enable_progress_bar: Optional[bool] = True
    enable_model_summary: Optional[bool] = False
    accumulate_grad_batches: int = 1
    gradient_clip_val: Any = 1.0
    gradient_clip_algorithm: Optional[str] = None
    deterministic: Any = None
    benchmark: Optional[bool] = None
    inference_mode: bool = True
    profiler: Optional[str] = None
    detect_anomaly: bool = False
    barebones: bool = False
    sync_batchnorm: bool = False
    reload_dataloaders_every_n_epochs: int = 0
    default_root_dir: Optional[str] = None
    enable_autolog_hparams: bool = False
    model_registry: Optional[str] = None

    def __post_init__(self) -> None:
        hint = " (the learning rate's decay ends there)"
        in_range("trainer.max_epochs", self.max_epochs, at_least=1, hint=hint)
        in_range("trainer.num_nodes", self.num_nodes, at_least=1)
        in_range("trainer.min_epochs", self.min_epochs, at_least=0, null="none")
        in_range("trainer.min_steps", self.min_steps, at_least=0, null="none")
        in_range("trainer.num_sanity_val_steps", self.num_sanity_val_steps, at_least=-1, null="none")
        in_range("trainer.log_every_n_steps", self.log_every_n_steps, at_least=0, null="50")
        in_range(
            "trainer.check_val_every_n_epoch",
            self.check_val_every_n_epoch,
            at_least=1,
            null="trainer.val_check_interval in batches across epochs",
        )
        in_range(
            "trainer.reload_dataloaders_every_n_epochs", self.reload_dataloaders_every_n_epochs, at_least=0
        )
        hint = ", the norm or value that gradients are clipped to (0: no clipping)"
        in_range(
            "trainer.gradient_clip_val",
            self.gradient_clip_val,
            at_least=0,
            whole=False,
            hint=hint,
            null="no clipping",
        )
        require(
            self.limit_train_batches != 0,
            "trainer.limit_train_batches=0 would train nothing: expected a fraction above 0, or at least 1 batch",
        )
        if self.max_steps != -1:
            hint = ", or -1 for as many as trainer.max_epochs has"
            in_range("trainer.max_steps", self.max_steps, at_least=1, hint=hint)
        require(
            self.limit_val_batches != 0,
            "trainer.limit_val_batches=0: the validation rows choose the best epoch; data.limit.validation=N takes fewer",
        )
        for key in ("train", "val", "test", "predict"):
            check_batches(f"trainer.limit_{key}_batches", getattr(self, f"limit_{key}_batches"))
        if not isinstance(self.val_check_interval, (str, dict)):  # a time, which Lightning reads
            check_batches("trainer.val_check_interval", self.val_check_interval)
        require(
            isinstance(self.fast_dev_run, (bool, int)) and int(self.fast_dev_run) >= 0,
            f"{override('trainer.fast_dev_run', self.fast_dev_run)}: expected true, false, or a number of batches, "
            "at least 0",
        )
        require(
            self.max_time is None or isinstance(self.max_time, (str, dict)),
            f"{override('trainer.max_time', self.max_time)}: expected DAYS:HOURS:MINUTES:SECONDS such as "
            "00:01:30:00, or {hours:1,minutes:30}",
        )
        require(
            not self.overfit_batches,
            "trainer.overfit_batches: batches are planned by length here; data.limit.train=N overfits on N rows",
        )
        in_range("trainer.accumulate_grad_batches", self.accumulate_grad_batches, at_least=1)
        # The others turn the weights themselves, the frozen ones too, into another type.
        require(
            self.precision is None or str(self.precision) in PRECISIONS,
            f"{override('trainer.precision', self.precision)}: expected one of {', '.join(PRECISIONS)}; frozen weights stay float32",
        )
        require(
            self.deterministic in (None, True, False, "warn"),
            f"{override('trainer.deterministic', self.deterministic)}: expected true, false or warn",
        )


WANDB_MODES = ("online", "offline", "disabled")


@dataclass
class WandbConfig:
    project: str = "adapter-fusion"
    entity: Optional[str] = None
    mode: Optional[str] = None  # online, offline, disabled; null: online where a key is set
    init_timeout: int = 10  # seconds to wait for the server before going offline

    def __post_init__(self) -> None:
        require(
            self.mode is None or self.mode in (*WANDB_MODES, "dryrun"),
            f"logger.wandb.mode={self.mode}: expected {', '.join(WANDB_MODES)}, or null",
        )
        for key, value in (("project", self.project), ("entity", self.entity)):
            wrong = value is not None and (
                not value.strip()
                or len(value) > 128
                or any(c in "/\\#?%:" or not c.isprintable() for c in value)
            )
            require(
                not wrong,
                f"logger.wandb.{key}={value!r:.200}: expected a name of 1 to 128 characters without / \\ # ? % :",
            )
        in_range("logger.wandb.init_timeout", self.init_timeout, at_least=1, hint=" second")


@dataclass
class CsvConfig:
    flush_every_n_steps: int = 50

    def __post_init__(self) -> None:
        in_range("logger.csv.flush_every_n_steps", self.flush_every_n_steps, at_least=1)


@dataclass
class LoggerConfig:
    wandb: Optional[WandbConfig] = None
    csv: Optional[CsvConfig] = None


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
        self.sources = _sources(self.sources, "a list of names such as [mnli,sst2], all, or top:N")
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


@dataclass
class SameBackboneConfig:
    """Another place of the very weights that an artifact was made for; null: what its manifest says."""

    name_or_path: Optional[str] = None
    revision: Optional[str] = None
    trust_remote_code: bool = False  # said again each time: an artifact cannot say it for its user


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
        self.sources = _sources(self.sources, "a list of names such as [mnli,sst2], or all")
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
