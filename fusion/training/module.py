"""What Lightning runs: one batch's named losses, the metrics, the optimizer, and what a checkpoint holds.

Shapes: B rows, K outputs of the head.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
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
from fusion.tasks.kind import Decision
from fusion.tasks.table import kind_of
from fusion.training.energy import EnergyMeter
from fusion.training.epoch_loss import EpochLoss
from fusion.training.gathering import gathered
from fusion.training.metrics import MEAN, main_metrics, score_predictions
from fusion.training.outcomes import Scored


class TaskModule(lightning.LightningModule):
    """Trains what `model.trainable()` lists, on one task or on several.

    Of several tasks, what is logged of one begins with its name, and `mean` is what picks the best epoch.

    Args:
        model: the adapted model.
        tasks: kind and metrics of each, in the order in which batches number them.
        optim: learning rates, decay and warm-up.
        loss_weights: the weight of each named term of `model.losses()`.
        splits: the validation splits, in the order of the validation loaders, and whose rows each one holds.
        features: the type of the cached frozen features that batches bring along; None: they bring none.
        seed: of what is drawn in training.
        robust_drop: whether each training batch leaves out a random number of the first layers' slots (AdapterDrop,
            robust).
        class_weights: for each task, the weight of each label in the training loss; None: all labels count alike.
        label_smoothing: of the training loss, as in `torch.nn.CrossEntropyLoss`.
    """

    def __init__(
        self,
        model: AdaptedModel,
        tasks: Sequence[TaskConfig],
        optim: OptimConfig,
        loss_weights: dict[str, float],
        splits: Mapping[str, TaskConfig],
        features: str | None = None,
        seed: int = 0,
        robust_drop: bool = False,
        class_weights: Sequence[NDArray[np.float64] | None] = (),
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.tasks = list(tasks)
        self.optim = optim
        self.loss_weights = loss_weights
        self.splits = dict(splits)
        self.features = features
        self.seed = seed
        self.robust_drop = robust_drop
        self.label_smoothing = label_smoothing
        for number, weights in enumerate(class_weights):
            values = None if weights is None else torch.from_numpy(weights).float()
            self.register_buffer(f"class_weights_{number}", values, persistent=False)
        self.losses_seen = Losses()
        # Of each evaluated epoch: its number (from 1) and every metric.
        self.history: list[dict[str, float]] = []
        # Of the last evaluation: by split, and what the predictions depend on by task.
        self.predicted: dict[str, Scored] = {}
        self.decisions: dict[str, Decision] = {}
        # Of the evaluation that is running: the outputs in place of predictions.
        self._outputs: dict[str, list[Scored]] = {}
        self.epoch_loss = EpochLoss()
        self.rows_seen = 0
        self.tokens_seen = 0
        self.spent_before: tuple[float, float | None] = (0.0, 0.0)
        self.count_time()
        # Gives the recorder of a validation batch, where somebody wants the sources' weights of it.
        self.watch: Callable[[Batch], Recorder] | None = None
        # The step whose figures were logged last.
        self.logged_step = -1
        # Checkpoints hold the trainable tensors alone; `on_load_checkpoint` compares the key sets.
        self.strict_loading = False

    def count_time(self) -> None:
        """Count seconds and energy from now on."""
        self._started, self._energy = time.monotonic(), EnergyMeter()

    def spent(self) -> tuple[float, float | None]:
        """Seconds and joules since `count_time` and, of a resumed training, up to its checkpoint; None: not known."""
        joules, before = self._energy.joules(), self.spent_before[1]
        seconds = self.spent_before[0] + time.monotonic() - self._started
        return seconds, None if joules is None or before is None else before + joules

    def first_layer(self, batch_index: int) -> int:
        """The lowest layer whose slots are filled in a training batch: 0, or drawn evenly from those with slots.

        A pure function of (seed, epoch, batch): equal in all processes, and in a run that is taken up again.
        """
        if not self.robust_drop:
            return 0
        draw = np.random.RandomState([self.seed, self.current_epoch, batch_index])
        return int(draw.choice(self.model.adapted_layers))

    def scores(self, batch: Batch, first_layer: int = 0, record: Recorder | None = None) -> Tensor:
        """(B, K)."""
        return self.model(
            batch.input_ids,
            batch.attention_mask,
            batch.token_type_ids,
            batch.choice_counts,
            record=record,
            features=batch.features,
            first_layer=first_layer,
            task=batch.task,
            words=batch.words,
        )

    def losses(self, batch: Batch, first_layer: int = 0) -> dict[str, Tensor]:
        """The named terms of a batch's loss: `task`, and what the slot modules add, weighted."""
        assert batch.labels is not None
        per_row = kind_of(self.tasks[batch.task]).loss(
            self.scores(batch, first_layer).float(),
            batch.labels,
            getattr(self, f"class_weights_{batch.task}", None),
            self.label_smoothing,
        )
        # The mean over the rows of all processes: each process's gradient is averaged with the others'. Where rows have
        # loss weights it is the weighted mean, so the divisor is the sum of the weights over all processes too.
        total = batch.global_rows if batch.global_weight is None else batch.global_weight
        task = (per_row * batch.weights).sum() * self.trainer.world_size / total
        extra = {name: self.loss_weights[name] * value for name, value in self.model.losses().items()}
        return {"task": task, **extra}

    def dropout_seed(self, batch_index: int) -> int:
        """What a training batch draws its dropout from: a pure function of (seed, epoch, batch, process).

        So a run that is taken up anywhere draws what it would have drawn, whatever was drawn meanwhile.
        """
        parts = [self.seed, self.current_epoch, batch_index, self.global_rank]
        return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])

    def on_train_epoch_start(self) -> None:
        self.epoch_loss.restart()  # not called where a run resumes within an epoch

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        torch.manual_seed(self.dropout_seed(batch_index))
        losses = self.losses(batch, self.first_layer(batch_index))
        total = torch.stack(list(losses.values())).sum()
        whose = f"{self.tasks[batch.task].name}/" if len(self.tasks) > 1 else ""
        self.losses_seen.add(total.detach(), self.trainer.global_step, batch.rows, f"{whose}train")
        weight = batch.global_rows if batch.global_weight is None else batch.global_weight
        self.epoch_loss.add(total, losses["task"], weight)
        self.rows_seen += batch.rows.numel()
        self.tokens_seen += batch.input_ids.numel()
        # Each call of log costs as much as a small layer, hence only where Lightning hands it on, and once an epoch.
        every = max(1, self.trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if batch_index == 0 or (self.trainer.global_step + 1) % every == 0:
            self.logged_step = self.trainer.global_step
            # The mean over the processes is the mean over the rows of all of them: see `losses`.
            several = self.trainer.world_size > 1
            named = {f"train/{name}_loss": value.detach() for name, value in losses.items()}
            self.log_dict(named, sync_dist=several)
            if whose:  # by the epoch: at a step, the others would be logged again with what they were last
                self.log(
                    f"{whose}train/loss",
                    losses["task"].detach(),
                    on_step=False,
                    on_epoch=True,
                    sync_dist=several,
                    batch_size=batch.global_rows,
                )
            self.log("train/loss", total.detach(), prog_bar=True, sync_dist=several)
            self.losses_seen.check(several)
        return total

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """The gradient's norm before it is clipped, and the rates, at the steps that are logged."""
        if self.logged_step != self.trainer.global_step or not self.trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        rates = [group["lr"] for group in optimizer.param_groups]
        own = {"train/head_lr": rates[-1]} if self.optim.head_lr not in (None, self.optim.lr) else {}
        # The same in all processes: the gradients are the mean over them by now.
        gradients = [p.grad for p in self.model.trainable().values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self.log_dict({"train/lr": rates[0], **own, "train/grad_norm": norm})

    def on_validation_start(self) -> None:
        """No epoch is scored by weights that are not finite: such scores are numbers like any other."""
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.losses_seen.check(self.trainer.world_size > 1)
            if not self.is_finite():  # the same in all processes
                raise LossNotFinite(f"weights are no longer finite after step {self.trainer.global_step - 1}")

    def is_finite(self) -> bool:
        """Whether all that trains is, and so were the losses of this process since they were last looked at."""
        finite = [parameter.isfinite().all() for parameter in self.model.trainable().values()]
        return not self.losses_seen.broken() and bool(torch.stack(finite).all()) if finite else True

    def validation_step(self, batch: Batch, batch_index: int, dataloader_idx: int = 0) -> None:
        assert batch.labels is not None
        counts = batch.weights > 0  # the others are fillers
        split, task = list(self.splits.items())[dataloader_idx]
        record = None if self.watch is None else self.watch(batch)
        kind = kind_of(task)
        outputs = kind.outputs(self.scores(batch, record=record).detach()[counts])
        labels = kind.plain_labels(batch.labels[counts])
        self._outputs.setdefault(split, []).append(Scored(batch.rows[counts].tolist(), outputs, labels))

    def on_validation_epoch_end(self) -> None:
        # A process may have had no batch of a split; all of them have to gather every split together.
        every = {split: Scored.gathered(self._outputs.get(split, [])) for split in self.splits}
        self._outputs = {}
        self.predicted, self.decisions = {}, {}
        values: dict[str, float] = {}
        for split, task in self.splits.items():
            kind, name, scored = kind_of(task), str(task.name), every[split]
            if name not in self.decisions:  # chosen on the task's first validation split
                self.decisions[name] = kind.decision(task, scored.predictions, scored.labels)
            predictions = kind.predict(scored.predictions, self.decisions[name])
            self.predicted[split] = replace(scored, predictions=predictions)
            found = score_predictions(task, predictions, scored.labels)
            values |= {f"{split}/{name}": value for name, value in found.items()}
        if len(self.tasks) > 1:
            chosen = main_metrics(self.splits)
            values[MEAN] = sum(values[name] for name in chosen) / len(chosen)
        # Equal in all processes, each of which has gathered every row: the mean changes nothing.
        self.log_dict(values, sync_dist=self.trainer.world_size > 1)
        if self.trainer.sanity_checking:
            return
        within = self.trainer.state.fn == "fit"  # else asked for after it: the epoch is counted already
        epoch = self.trainer.current_epoch + 1 if within else max(1, self.trainer.current_epoch)
        if self.history and self.history[-1]["epoch"] == epoch:
            self.history.pop()  # evaluated within the epoch as well: its end is what is kept
        self.history.append({"epoch": epoch, **values})

    def configure_optimizers(self) -> Any:
        """AdamW with linear warm-up and linear decay to zero."""
        # Under mixed precision, Lightning refuses to clip the gradients of a fused optimizer.
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
        checkpoint["prefix"] = self.features
        checkpoint["history"] = self.history
        checkpoint["seen"] = [self.rows_seen, self.tokens_seen]
        checkpoint["spent"] = list(self.spent())
        checkpoint["epoch_loss"] = self.epoch_loss.state(self.trainer.world_size)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trainable = {f"model.{name}" for name in self.model.trainable()}
        if set(checkpoint["state_dict"]) != trainable:
            raise RuntimeError("the checkpoint holds other parameters than the model trains")
        if checkpoint["prefix"] != self.features:  # the same up to rounding, but not the same run
            raise UserError(
                f"the run began with backbone.cache={checkpoint['prefix'] or 'off'} and would go on with "
                f"{self.features or 'off'}: the disk, data.cache_dir or backbone.cache_gb is not what it was.\n"
                "Make it so again, or begin anew with resume=false"
            )
        self.history = list(checkpoint["history"])
        if "spent" in checkpoint:  # not in those of 0.1, and what was seen in a time not known gives no speed
            self.rows_seen, self.tokens_seen = checkpoint["seen"]
            self.spent_before = (checkpoint["spent"][0], checkpoint["spent"][1])
        self.epoch_loss.resume(
            checkpoint.get("epoch_loss"),  # not in those of earlier versions
            self.trainer.world_size,
            checkpoint["position"]["batch"],
            self.device,
        )


class Losses:
    """The losses of the last steps, looked at together: to ask for each as it comes would make a GPU wait."""

    def __init__(self) -> None:
        self._seen: list[tuple[Tensor, int, Tensor, str]] = []

    def add(self, loss: Tensor, step: int, rows: Tensor, split: str) -> None:
        """
        Args:
            loss: a scalar.
            rows: (B,), of the split.
        """
        self._seen.append((loss, step, rows, split))

    def broken(self) -> bool:
        """Whether one of this process's is not finite."""
        return bool(self._seen) and not bool(torch.stack([loss for loss, *_ in self._seen]).isfinite().all())

    def check(self, distributed: bool) -> None:
        """Look at all that came since the last time. Under DDP, all processes have to call it together.

        Raises:
            LossNotFinite: one is not; says the first such step and its rows.
        """
        seen, self._seen = self._seen, []
        values = torch.stack([loss for loss, *_ in seen]) if seen else torch.zeros(0)
        bad = [seen[n] for n in (~values.isfinite()).nonzero().flatten().tolist()]
        if distributed:
            there = torch.tensor(float(bool(bad)), device=values.device)
            torch.distributed.all_reduce(there)
            if not there.item():
                return
        plain = [(loss.item(), step, rows.tolist(), split) for loss, step, rows, split in bad]
        found = sorted(
            (entry for entries in gathered(plain) for entry in entries), key=lambda entry: entry[1]
        )
        if found:
            loss, step, rows, split = found[0]
            more = " …" if len(rows) > 8 else ""
            shown = f"{', '.join(map(str, rows[:8]))}{more}"
            raise LossNotFinite(
                f"the loss is {loss} at step {step} (rows {shown} of {split}, counted from 0)"
            )


def adamw(model: AdaptedModel, optim: OptimConfig, fused: bool = True) -> torch.optim.AdamW:
    """AdamW over what the model trains; the head may have its own rate, and some parameters take no decay.

    Args:
        fused: one kernel for all parameters where their device has it: a third of the time, the same up to rounding.
    """
    undecayed = model.undecayed()
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.trainable().items():
        rate = optim.head_lr or optim.lr if name.startswith("head.") else optim.lr
        decay = 0.0 if name in undecayed else optim.weight_decay
        groups.setdefault((rate, decay), []).append(parameter)
    devices = {parameter.device.type for parameter in model.trainable().values()}
    return torch.optim.AdamW(
        [{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in groups.items()],
        fused=fused and devices <= {"cpu", "cuda"},
    )
