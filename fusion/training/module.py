"""The LightningModule: losses, metrics, the optimizer, and the content of checkpoints.

Shapes: B examples, K outputs of the head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytorch_lightning as lightning
import torch
from numpy.typing import NDArray
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor, nn

from fusion.config.task import TaskConfig
from fusion.config.training import OptimConfig
from fusion.data.batches import Batch
from fusion.errors import LossNotFinite, UserError
from fusion.layers.slot_module import Recorder
from fusion.model.adapted import AdaptedModel
from fusion.model.inference import forward
from fusion.tasks.kind import Decision
from fusion.tasks.table import kind_of
from fusion.training.losses import EpochLoss, Losses
from fusion.training.predictions import MEAN, RowPredictions, main_metrics
from fusion.training.source_sampling import SourceSampling

TEXT_TERMS = ("prior_penalty",)  # loss terms that slot modules compute for each text, see `BatchContext.add_loss`


@dataclass(frozen=True)
class Objective:
    loss_weights: dict[str, float] = field(default_factory=dict)  # of the named loss terms that the model adds
    label_smoothing: float = 0.0  # as in `torch.nn.CrossEntropyLoss`
    # Whether each batch skips the slots of a random number of first layers (AdapterDrop, Rücklé et al. 2021, §3).
    robust_drop: bool = False
    temperature: float = 1.0  # of multi-task sampling, see `TaskBatches`
    sampling: SourceSampling | None = None  # of the sources in each training batch; `None`: all are active


class TaskModule(lightning.LightningModule):
    """LightningModule that trains the parameters of `model.trainable()` on one or more tasks.

    With multiple tasks, metric names start with the task's name, and `mean` selects the best epoch.
    """

    def __init__(
        self,
        model: AdaptedModel,
        tasks: Sequence[TaskConfig],
        optim: OptimConfig,
        objective: Objective,
        splits: Mapping[str, TaskConfig],
        features: str | None = None,
        seed: int = 0,
        class_weights: Sequence[NDArray[np.float64] | None] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.tasks = list(tasks)  # in the order of `Batch.task`
        self.optim = optim
        self.splits = dict(splits)  # the task of each validation split, in the order of the validation loaders
        self.objective = objective
        self.features = features  # dtype of the cached frozen features in the batches, `None` without a feature cache
        self.seed = seed  # of dropout and of robust AdapterDrop
        for number, weights in enumerate(class_weights):  # of the labels in each task's training loss; `None`: uniform
            values = None if weights is None else torch.from_numpy(weights).float()
            self.register_buffer(f"class_weights_{number}", values, persistent=False)
        self.losses_seen, self.epoch_loss = Losses(), EpochLoss()
        self.history: list[dict[str, float]] = []  # one-based number and all metrics of each evaluated epoch
        self.predicted: dict[str, RowPredictions] = {}  # of the last validation, by split
        self.decisions: dict[str, Decision] = {}  # of the last validation, by task
        self._outputs: dict[str, list[RowPredictions]] = {}  # of the current validation, in place of predictions
        self.recorder: Callable[[Batch], Recorder] | None = None  # of the attention weights of a validation batch
        self.logged_step = -1  # the last logged step
        # Checkpoints contain the trainable parameters only; `on_load_checkpoint` compares the keys.
        self.strict_loading = False

    def first_layer(self, batch_index: int) -> int:
        """Return the first layer with active slots in a training batch: 0, or a uniform draw from `adapted_layers`.

        The draw is a pure function of (seed, epoch, batch): equal in all processes and in a resumed run.
        """
        if not self.objective.robust_drop:
            return 0
        draw = np.random.RandomState([self.seed, self.current_epoch, batch_index])
        return int(draw.choice(self.model.adapted_layers))

    def sampled(self, batch: Batch, batch_index: int) -> dict[str, Any]:
        """Return the arguments of `AdaptedModel.forward` that are sampled for a training batch."""
        options: dict[str, Any] = {"first_layer": self.first_layer(batch_index)}
        if (sampling := self.objective.sampling) is not None:
            options["sources_on"] = sampling.sources_on(self.seed, self.current_epoch, batch_index, batch.rows.device)
            options["folds"] = sampling.folds_of(batch)
        return options

    def scores(self, batch: Batch, **options: Any) -> Tensor:
        """Return the logits: (B, K). `options` are passed to `AdaptedModel.forward`."""
        return forward(self.model, batch, features=batch.features, **options)

    def losses(self, batch: Batch, **options: Any) -> dict[str, Tensor]:
        """Return the named loss terms of a batch: `task`, and the weighted terms of the slot modules."""
        assert batch.labels is not None
        weights, extra = self.objective.loss_weights, dict[str, Tensor]()

        def add(name: str, by_text: Tensor) -> None:
            mean = (_by_example(by_text, batch) * batch.weights).sum() * self.trainer.world_size / batch.global_rows
            extra[name] = extra.get(name, 0.0) + weights[name] * mean

        if any(weights.get(name) for name in TEXT_TERMS):
            options["add_loss"] = add
        per_row = kind_of(self.tasks[batch.task]).loss(
            self.scores(batch, **options).float(),
            batch.labels,
            getattr(self, f"class_weights_{batch.task}", None),
            self.objective.label_smoothing,
        )
        # DDP averages gradients over processes, so each divides by the number (or weight) of examples in all processes.
        total = batch.global_rows if batch.global_weight is None else batch.global_weight
        task = (per_row * batch.weights).sum() * self.trainer.world_size / total
        extra |= {name: weights[name] * value for name, value in self.model.losses().items()}
        return {"task": task, **extra}

    def on_train_epoch_start(self) -> None:
        self.epoch_loss.restart()  # this hook is not called if a run resumes within an epoch

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        # Dropout masks depend on seed, epoch, batch and process only, so a resumed run draws the same.
        parts = [self.seed, self.current_epoch, batch_index, self.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]))
        losses = self.losses(batch, **self.sampled(batch, batch_index))
        total = torch.stack(list(losses.values())).sum()
        prefix = f"{self.tasks[batch.task].name}/" if len(self.tasks) > 1 else ""
        self.losses_seen.add(total.detach(), self.trainer.global_step, batch.rows, f"{prefix}train")
        weight = batch.global_rows if batch.global_weight is None else batch.global_weight
        self.epoch_loss.add(total, losses["task"], weight)
        # A call of `log` takes as long as a small layer, so log only at the steps that Lightning passes to loggers.
        every = max(1, self.trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if batch_index == 0 or (self.trainer.global_step + 1) % every == 0:
            self.logged_step = self.trainer.global_step
            # The mean over processes is the mean over all their examples, see `losses`.
            distributed = self.trainer.world_size > 1
            named = {f"train/{name}_loss": value.detach() for name, value in losses.items()}
            self.log_dict(named, sync_dist=distributed)
            if prefix:  # per epoch, since Lightning would repeat the other tasks' last values at each step
                options: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": batch.global_rows}
                self.log(f"{prefix}train/loss", losses["task"].detach(), sync_dist=distributed, **options)
            self.log("train/loss", total.detach(), prog_bar=True, sync_dist=distributed)
            self.losses_seen.check(distributed)
        return total

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the gradient norm before clipping and the learning rates, at the logged steps."""
        if self.logged_step != self.trainer.global_step or not self.trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        rates = [group["lr"] for group in optimizer.param_groups]
        own = {"train/head_lr": rates[-1]} if self.optim.head_lr not in (None, self.optim.lr) else {}
        # Equal in all processes: DDP has averaged the gradients.
        gradients = [p.grad for p in self.model.trainable().values() if p.grad is not None]
        self.log_dict({"train/lr": rates[0], **own, "train/grad_norm": nn.utils.get_total_norm(gradients)})

    def on_validation_start(self) -> None:
        """Raise LossNotFinite if a weight is NaN or infinite, because the metrics could still look valid."""
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.losses_seen.check(self.trainer.world_size > 1)
            if not self.is_finite():  # equal in all processes
                raise LossNotFinite(f"weights are no longer finite after step {self.trainer.global_step - 1}")

    def is_finite(self) -> bool:
        """Return whether all trainable parameters and this process's losses since the last check are finite."""
        finite = [parameter.isfinite().all() for parameter in self.model.trainable().values()]
        return not self.losses_seen.broken() and bool(torch.stack(finite).all()) if finite else True

    def validation_step(self, batch: Batch, batch_index: int, dataloader_idx: int = 0) -> None:
        assert batch.labels is not None
        counts = batch.weights > 0  # excludes examples that only fill up a batch
        split, task = list(self.splits.items())[dataloader_idx]
        record = None if self.recorder is None else self.recorder(batch)
        kind = kind_of(task)
        logits = self.scores(batch, record=record).detach()[counts]
        labels = kind.plain_labels(batch.labels[counts])
        found = RowPredictions(batch.rows[counts].tolist(), kind.outputs(logits), labels, kind.confidence(logits))
        self._outputs.setdefault(split, []).append(found)

    def on_validation_epoch_end(self) -> None:
        # All processes gather all splits, including splits without a batch in this process.
        every = {split: RowPredictions.gathered(self._outputs.get(split, [])) for split in self.splits}
        self._outputs = {}
        self.predicted, self.decisions = {}, {}
        values: dict[str, float] = {}
        for split, task in self.splits.items():
            kind, name, scored = kind_of(task), str(task.name), every[split]
            if name not in self.decisions:  # the task's first validation split
                self.decisions[name] = kind.decision(task, scored.predictions, scored.labels)
            predictions = kind.predict(scored.predictions, self.decisions[name])
            self.predicted[split] = replace(scored, predictions=predictions)
            found = kind.metrics(task, scored.labels, predictions)
            values |= {f"{split}/{metric}": value for metric, value in found.items()}
        if len(self.tasks) > 1:
            chosen = main_metrics(self.splits)
            values[MEAN] = sum(values[name] for name in chosen) / len(chosen)
        # The values are equal in all processes, so averaging does not change them.
        self.log_dict(values, sync_dist=self.trainer.world_size > 1)
        if self.trainer.sanity_checking:
            return
        fitting = self.trainer.state.fn == "fit"  # otherwise `current_epoch` is already incremented
        epoch = self.trainer.current_epoch + 1 if fitting else max(1, self.trainer.current_epoch)
        if self.scores_of(epoch) is not None:
            self.history.pop()  # from a validation within the epoch
        self.history.append({"epoch": epoch, **values})

    def scores_of(self, epoch: int) -> dict[str, float] | None:
        """Return the last entry of `history` if it belongs to this epoch (one-based), else `None`."""
        return self.history[-1] if self.history and self.history[-1]["epoch"] == epoch else None

    def configure_optimizers(self) -> Any:
        """Return AdamW with linear warmup and linear decay to zero."""
        # Lightning cannot clip gradients with a fused optimizer and mixed precision.
        mixed = isinstance(self.trainer.precision_plugin, MixedPrecision)
        optimizer = adamw(self.model, self.optim, fused=not mixed)
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        warmup = round(self.optim.warmup * steps)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return max(0.0, (steps - step) / max(1, steps - warmup))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trainable = {f"model.{name}" for name in self.model.trainable()}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trainable}
        epoch_loss = self.epoch_loss.state(self.trainer.world_size)
        checkpoint |= {"prefix": self.features, "history": self.history, "epoch_loss": epoch_loss}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trainable = {f"model.{name}" for name in self.model.trainable()}
        if set(checkpoint["state_dict"]) != trainable:
            raise RuntimeError("the checkpoint's parameters are not the trainable parameters of the model")
        if checkpoint["prefix"] != self.features:  # equal only up to rounding, so the run would differ
            raise UserError(
                f"the run started with backbone.cache={checkpoint['prefix'] or 'off'} and would resume with "
                f"{self.features or 'off'}, since free disk space, data.cache_dir or backbone.cache_gb has changed\n"
                "Undo the change, or start over with resume=false"
            )
        self.history = list(checkpoint["history"])
        self.epoch_loss.resume(checkpoint["epoch_loss"], self.trainer.world_size, self.device)


def _by_example(by_text: Tensor, batch: Batch) -> Tensor:
    """Average values (S,) over the texts of each example: (B,)."""
    counts = batch.choice_counts
    if counts is None:
        return by_text
    example = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    return by_text.new_zeros(len(counts)).index_add(0, example, by_text) / counts


def adamw(model: AdaptedModel, optim: OptimConfig, fused: bool = True) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters, with the head's learning rate and weight decay exemptions.

    With `fused`, devices that support it use the fused implementation: three times as fast, equal up to rounding.
    """
    undecayed = model.undecayed()
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.trainable().items():
        rate = optim.head_lr or optim.rate if name.startswith("head.") else optim.rate
        decay = 0.0 if name in undecayed else optim.weight_decay
        groups.setdefault((rate, decay), []).append(parameter)
    devices = {parameter.device.type for parameter in model.trainable().values()}
    return torch.optim.AdamW(
        [{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in groups.items()],
        fused=fused and devices <= {"cpu", "cuda"},
    )
