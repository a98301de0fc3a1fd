"""The optimizer, the loss and the trainer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Optional

from fusion.config.checks import check_batches, in_range, require
from fusion.config.task import TaskConfig
from fusion.tasks.table import kind_of
from fusion.text import override

PRECISIONS = (
    "32-true",
    "bf16-mixed",
    "16-mixed",
    "32",
    "bf16",
    "16",
)  # Lightning's that leave weights float32


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
