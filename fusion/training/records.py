"""Files of a run with one JSON object per line, whatever the setting of `logger`.

history.jsonl has all figures that a run logs. Its first line is {"run", "name", "command", "started"}, then one object
for each logged step or epoch: {"step": 9, "epoch": 1, "train/loss": 0.69, ...}. Steps count from 0, epochs from 1. A
resumed run writes another file, in its new folder, with the same "run": together they are its history, joined by the
step.

attention.jsonl has the source attention of a fusion, summed over each validation: {"step", "epoch", "sources": [names],
"slots": {"0.feedforward": {"mean", "entropy", "value_distance"}}}. Only compositions that weight their sources have it.

Shapes: D hidden size.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.loggers import Logger

from fusion.files import finite
from fusion.layers.attention import AdapterFusion
from fusion.layers.slot_module import SlotModule
from fusion.model.source_attention import AttentionSums, compositions_of
from fusion.runs.run import ATTENTION, HISTORY
from fusion.training.lightning_internals import logged_step

log = logging.getLogger(__name__)


class RecordFile:
    """A file with one JSON object per line, created with the first line; an existing file is overwritten.

    If a line cannot be written, a warning is logged and nothing more is written; readers ignore a partial line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mode = "w"

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line; NaN and infinities become null."""
        if not self._mode:
            return
        line = json.dumps(finite(record), ensure_ascii=False, allow_nan=False, default=str)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Opened for each line, which takes microseconds: nothing to close when the run is killed.
            with open(self.path, self._mode, encoding="utf-8") as file:
                file.write(f"{line}\n")
            self._mode = "a"
        except OSError as error:
            self._mode = ""
            reason = error.strerror or error
            log.warning("%s: cannot be written (%s); training continues without it", self.path, reason)


class History(Logger):
    """A Lightning logger that writes history.jsonl, for the first process of a DDP run.

    Args:
        directory: the job's output folder.
        run: NAME-IDENTITY, the same whenever the run resumes.
    """

    name = "history"

    def __init__(self, directory: Path, *, run: str, name: str, command: str) -> None:
        super().__init__()
        self._file = RecordFile(directory / HISTORY)
        self._run = run
        self._epoch = 1
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._file.write({"run": run, "name": name, "command": command, "started": started})

    @property
    def version(self) -> str:
        return self._run

    @property
    def save_dir(self) -> str:
        return str(self._file.path.parent)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        values = dict(metrics)
        if "epoch" in values:  # added by Lightning, counted from 0
            self._epoch = int(values.pop("epoch")) + 1
        self._file.write({"step": step, "epoch": self._epoch, **values})

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """They are in config.yaml."""


class FirstOfEpoch(Callback):
    """Logs the first step of each epoch too, so that a training of few batches has a curve.

    Lightning logs the steps of `log_every_n_steps` only.
    """

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        every, step = int(cast(Any, trainer).log_every_n_steps), pl_module.logged_step
        if batch_idx or not trainer.loggers or not every or (step + 1) % every == 0:
            return
        values = {name: float(v) for name, v in trainer.logged_metrics.items() if name.startswith("train/")}
        for logger in trainer.loggers:
            logger.log_metrics(values | {"epoch": trainer.current_epoch}, step)


class AttentionRecorder(Callback):
    """Writes attention.jsonl: the source weights of each slot during the validation, without an additional pass.

    Under DDP the sums of all processes are added, so that every real token of every row counts once, and the first
    process writes. Lightning's sanity check is excluded.

    Args:
        sources: their names, in the order of the weights; empty: nothing is recorded.
        directory: the job's output folder.
        show: called with each line.
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
        attention = self._sums.by_slot(pl_module.model, distributed=trainer.world_size > 1)
        if not attention or not trainer.is_global_zero:
            return
        compositions = compositions_of(pl_module.model)
        slots = {
            slot: {
                "mean": measured.mean,
                "entropy": measured.entropy,
                "value_distance": _value_distance(compositions[slot]),
            }
            for slot, measured in attention.items()
        }
        epoch = int(pl_module.history[-1]["epoch"])
        record = {"step": logged_step(trainer), "epoch": epoch, "sources": self._sources, "slots": slots}
        self._file.write(record)
        self._show(record)


def _value_distance(module: SlotModule) -> float | None:
    """‖Wv − I‖_F / √D of a fusion, which starts near 0; None if there is no Wv."""
    if not isinstance(module, AdapterFusion) or module.value is None:
        return None
    weight = module.value.weight.detach()
    identity = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    return float((weight - identity).norm()) / math.sqrt(len(weight))
