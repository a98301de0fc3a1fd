"""Settings of the optimizer, the loss, the trainer and the loggers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

from fusion.config.fields import Settings, batches, checked, choice, integer, number, require
from fusion.config.task import TaskConfig
from fusion.tasks.table import kind_of
from fusion.text import listed, override

# Lightning's precisions that keep weights in float32; the others would also convert the frozen weights.
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "32", "bf16", "16")


RATES = {"head": 5e-3, "adapter": 5e-4, "lora": 5e-4, "bitfit": 5e-4, "full": 5e-5, "fusion": 2e-4, "scales": 5e-3}
"""Default learning rates by what is trained; `rates` of a backbone replaces them."""


def default_rate(trained: str, of_backbone: Mapping[str, float] | None) -> float:
    """Return the default learning rate for what is trained, given `rates` of the backbone."""
    return {**RATES, **(of_backbone or {})}[trained]


@dataclass
class OptimConfig(Settings, group="optim"):
    # The default depends on what is trained, see `Rates`; a training run replaces null.
    lr: Optional[float] = number(
        None, "> 0 and < 1000", hint=", such as 1e-4", null="the default of the backbone and the method"
    )
    head_lr: Optional[float] = number(None, "> 0 and < 1000", hint=", such as 1e-3", null="optim.lr")
    weight_decay: float = number(0.01, ">= 0")
    warmup: float = number(0.06, ">= 0 and <= 1", hint=", a fraction of all optimizer steps")
    # Unless trainer.max_epochs is set: the number of epochs, or as many as `min_steps` optimizer steps need.
    epochs: int = integer(30, 1)
    min_steps: int = integer(300, 0)
    patience: Optional[int] = integer(3, 1, hint=" epoch", null="no early stopping")

    @property
    def rate(self) -> float:
        """The learning rate of a training run, whose config has a number."""
        assert self.lr is not None
        return self.lr


def _are_class_weights(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) > 0 and all(type(one) in (int, float) and 0 < one < math.inf for one in value)
    return value is None or value == "balanced"


@dataclass
class LossConfig(Settings, group="loss"):
    """Training loss of classification and choice tasks, with the semantics of torch's cross entropy."""

    class_weights: Any = checked(
        None, _are_class_weights, "balanced, or a list with a number > 0 for each label, such as [1.0,2.5]"
    )
    label_smoothing: float = number(0.0, ">= 0 and < 1")

    def check(self, tasks: list[TaskConfig]) -> None:
        """Raise UserError if a setting applies to none of the tasks; in multi-task training, it may apply to some."""
        kinds = {task.kind: kind_of(task) for task in tasks}
        names = ", ".join(str(task.name) for task in tasks)
        weights = self.class_weights
        what = override("loss.class_weights", weights)
        require(
            weights is None or any(kind.has_classes for kind in kinds.values()),
            f"{what}: {names} has no classes ({' and '.join(sorted(kinds))}); leave it out",
        )
        require(
            self.label_smoothing == 0.0 or any(kind.smooths_labels for kind in kinds.values()),
            f"loss.label_smoothing={self.label_smoothing}: {names} is a task of kind {tasks[0].kind}, which has no classes; "
            "leave it out",
        )
        if not isinstance(weights, list):
            return
        require(
            len(tasks) == 1,
            f"{what}: a list has the weights of one task's labels, but this run trains {names}; "
            "expected loss.class_weights=balanced, which uses the label counts of each task",
        )
        labels = tasks[0].labels or []
        require(
            len(weights) == len(labels),
            f"{what}: {len(weights)} weights for the {len(labels)} labels of {names} ({listed(labels)}); "
            "expected one for each, in this order",
        )


@dataclass
class TrainerConfig(Settings, group="trainer"):
    """Arguments of Lightning's Trainer, except those that YAML cannot express."""

    accelerator: str = "auto"
    strategy: str = "auto"
    devices: Any = "auto"
    num_nodes: int = integer(1, 1)
    precision: Any = checked(
        None,
        lambda value: value is None or str(value) in PRECISIONS,
        f"one of {', '.join(PRECISIONS)}; frozen weights stay float32",
    )
    fast_dev_run: Any = checked(
        False, lambda value: isinstance(value, int) and value >= 0, "true, false, or a number of batches >= 0"
    )
    max_epochs: Optional[int] = integer(
        None, 1, hint=" (the learning rate reaches zero at this epoch)", null="optim.epochs and optim.min_steps"
    )
    min_epochs: Optional[int] = integer(None, 0, null="none")
    max_steps: int = checked(
        -1,
        lambda value: type(value) is int and (value == -1 or value >= 1),
        "a whole number >= 1, or -1 for trainer.max_epochs",
    )
    min_steps: Optional[int] = integer(None, 0, null="none")
    max_time: Any = checked(
        None,
        lambda value: value is None or isinstance(value, (str, dict)),
        "DAYS:HOURS:MINUTES:SECONDS such as 00:01:30:00, or {hours:1,minutes:30}",
    )
    limit_train_batches: Any = batches(not_zero="nothing would be trained")
    limit_val_batches: Any = batches(
        not_zero="the best epoch is selected on the validation examples; limit them with data.limit.validation=N"
    )
    limit_test_batches: Any = batches()
    limit_predict_batches: Any = batches()
    overfit_batches: Any = checked(
        0.0,
        lambda value: not value,
        "0, since batches are planned by length; use data.limit.train=N to overfit on N examples",
    )
    val_check_interval: Any = batches(times=True)
    check_val_every_n_epoch: Optional[int] = integer(1, 1, null="trainer.val_check_interval in batches across epochs")
    num_sanity_val_steps: Optional[int] = integer(0, -1, null="none")
    log_every_n_steps: Optional[int] = integer(10, 0, null="50")
    enable_checkpointing: Optional[bool] = True
    enable_progress_bar: Optional[bool] = True
    enable_model_summary: Optional[bool] = False
    accumulate_grad_batches: int = integer(1, 1)
    gradient_clip_val: Any = number(1.0, ">= 0", hint=" (0: no clipping)", null="no clipping")
    gradient_clip_algorithm: Optional[str] = None
    deterministic: Any = checked(None, lambda value: value in (None, True, False, "warn"), "true, false or warn")
    benchmark: Optional[bool] = None
    inference_mode: bool = True
    profiler: Optional[str] = None
    detect_anomaly: bool = False
    barebones: bool = False
    sync_batchnorm: bool = False
    reload_dataloaders_every_n_epochs: int = integer(0, 0)
    default_root_dir: Optional[str] = None
    enable_autolog_hparams: bool = False
    model_registry: Optional[str] = None

    @property
    def shards(self) -> bool:
        """Whether the frozen weights are sharded over the processes, see `fusion.training.frozen_weights`."""
        return self.strategy == "fsdp"

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of Lightning's Trainer.

        Its own `fsdp` would shard trainable parameters as well, and requires GPUs. Weights that are gathered in
        inference mode could not be used in training.
        """
        return vars(self) | ({"strategy": "ddp", "inference_mode": False} if self.shards else {})


def _wandb_name(default: str | None) -> Any:
    def accepts(value: str | None) -> bool:
        if value is None:
            return default is None
        return value.isprintable() and re.fullmatch(r"(?=.*\S)[^/\\#?%:]{1,128}", value) is not None

    return checked(default, accepts, "a name of 1 to 128 characters without / \\ # ? % :")


@dataclass
class WandbConfig(Settings, group="logger.wandb"):
    project: str = _wandb_name("adapter-fusion")
    entity: Optional[str] = _wandb_name(None)
    mode: Optional[str] = choice(None, ("online", "offline", "disabled", "dryrun"), null="online if an API key is set")
    init_timeout: int = integer(10, 1, hint=" second")  # offline if the server does not respond in time


@dataclass
class CsvConfig(Settings, group="logger.csv"):
    flush_every_n_steps: int = integer(50, 1)


@dataclass
class LoggerConfig:
    wandb: Optional[WandbConfig] = None
    csv: Optional[CsvConfig] = None
