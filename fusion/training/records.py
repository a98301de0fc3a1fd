"""JSON Lines files that every run writes, independent of `logger`.

history.jsonl contains all values that a run logs. The first line is {"run", "name", "command", "started"}, followed by
one object per logged step or epoch: {"step": 9, "epoch": 1, "train/loss": 0.69, ...}. Steps are zero-based, epochs
one-based. A resumed run writes a new file in its new folder with the same "run"; the files are joined by step.

attention.jsonl contains the source attention of a fusion for each validation: {"step", "epoch", "sources": [names],
"slots": {"0.feedforward": {"mean", "entropy", "value_distance"}}}. Only written for compositions with attention weights.

Shapes: D hidden size.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.loggers import Logger

from fusion.files import finite, now
from fusion.layers.attention import AdapterFusion
from fusion.layers.slot_module import SlotModule
from fusion.model.source_attention import AttentionSums, compositions_of
from fusion.runs.run import ATTENTION, HISTORY
from fusion.training.lightning_internals import logged_step

log = logging.getLogger(__name__)


class RecordFile:
    """JSON Lines file, overwritten by the first line. If a line cannot be written, a warning is logged once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mode = "w"

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line; NaN and infinite values become null."""
        if not self._mode:
            return
        line = json.dumps(finite(record), ensure_ascii=False, allow_nan=False, default=str)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Reopening the file for each line takes microseconds, and a killed run leaves no open file.
            with open(self.path, self._mode, encoding="utf-8") as file:
                file.write(f"{line}\n")
            self._mode = "a"
        except OSError as error:
            self._mode = ""
            reason = error.strerror or error
            log.warning("%s: cannot be written (%s); training continues without it", self.path, reason)


class History(Logger):
    """Lightning logger that writes history.jsonl, on rank 0 only. `run` is NAME-IDENTITY, also when the run resumes."""

    name = "history"
    version = ""

    def __init__(self, directory: Path, *, run: str, name: str, command: str) -> None:
        super().__init__()
        self._file = RecordFile(directory / HISTORY)
        self._epoch = 1
        self._file.write({"run": run, "name": name, "command": command, "started": now()})

    @property
    def save_dir(self) -> str:
        return str(self._file.path.parent)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        values = dict(metrics)
        if "epoch" in values:  # added by Lightning, zero-based
            self._epoch = int(values.pop("epoch")) + 1
        self._file.write({"step": step, "epoch": self._epoch, **values})

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing, since config.yaml contains the hyperparameters."""


class FirstOfEpoch(Callback):
    """Callback that also logs the first step of each epoch, so that runs with few batches have a loss curve."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        every, step = int(cast(Any, trainer).log_every_n_steps), pl_module.logged_step
        if batch_idx or not trainer.loggers or not every or (step + 1) % every == 0:
            return
        values = {name: float(v) for name, v in trainer.logged_metrics.items() if name.startswith("train/")}
        for logger in trainer.loggers:
            logger.log_metrics(values | {"epoch": trainer.current_epoch}, step)


class AttentionRecorder(Callback):
    """Callback that records the attention weights per slot during validation in attention.jsonl.

    It requires no additional forward pass. Under DDP, sums are reduced over all processes, and rank 0 writes. Without
    `sources` (names, in the order of the weights), nothing is recorded. `show` is called with each line.
    """

    def __init__(self, sources: Sequence[str], directory: Path, show: Callable[[dict[str, Any]], None]) -> None:
        self._sources = list(sources)
        self._file = RecordFile(directory / ATTENTION)
        self._show = show
        self._sums = AttentionSums()

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._sums = AttentionSums()
        recorded = bool(self._sources) and not trainer.sanity_checking
        pl_module.recorder = self._sums.recorder if recorded else None

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if pl_module.recorder is None:
            return
        pl_module.recorder = None
        compositions = compositions_of(pl_module.model)
        attention = self._sums.by_slot(compositions, distributed=trainer.world_size > 1)
        if not attention or not trainer.is_global_zero:
            return
        slots = {
            slot: asdict(measured) | {"value_distance": _value_distance(compositions[slot])}
            for slot, measured in attention.items()
        }
        epoch = int(pl_module.history[-1]["epoch"])
        record = {"step": logged_step(trainer), "epoch": epoch, "sources": self._sources, "slots": slots}
        self._file.write(record)
        self._show(record)


def _value_distance(module: SlotModule) -> float | None:
    """Return ‖Wv − I‖_F / √D of a fusion, initially near 0, or `None` if the module has no Wv."""
    if not isinstance(module, AdapterFusion) or module.value is None:
        return None
    weight = module.value.weight.detach()
    identity = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    return float((weight - identity).norm()) / math.sqrt(len(weight))
