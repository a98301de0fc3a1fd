"""history.jsonl: all figures that a run logs, for any setting of `logger`.

The first line is {"run", "name", "command", "started"}, then one object for each logged step or epoch:
{"step": 9, "epoch": 1, "train/loss": 0.69, ...}. Steps count from 0, epochs from 1. A resumed run writes another file,
in its new folder, with the same "run": together they are its history, joined by the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as lightning
from pytorch_lightning.loggers import Logger

from fusion.runs.run import HISTORY
from fusion.training.module import TaskModule
from fusion.training.record_file import RecordFile


class History(Logger):
    """A Lightning logger that writes history.jsonl, for the first process of a DDP run.

    Args:
        directory: the job's output folder.
        run: NAME-IDENTITY, the same whenever the run resumes.
    """

    def __init__(self, directory: Path, *, run: str, name: str, command: str) -> None:
        super().__init__()
        self._directory = directory
        self._file = RecordFile(directory / HISTORY)
        self._run = run
        self._epoch = 1
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._file.write({"run": run, "name": name, "command": command, "started": started})

    @property
    def name(self) -> str:
        return "history"

    @property
    def version(self) -> str:
        return self._run

    @property
    def save_dir(self) -> str:
        return str(self._directory)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        values = dict(metrics)
        if "epoch" in values:  # added by Lightning, counted from 0
            self._epoch = int(values.pop("epoch")) + 1
        self._file.write({"step": step, "epoch": self._epoch, **values})

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """They are in config.yaml."""


class FirstOfEpoch(lightning.Callback):
    """Logs the first step of each epoch too, so that a training of few batches has a curve.

    Lightning logs the steps of `log_every_n_steps` only.
    """

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, TaskModule)
        every, step = int(cast(Any, trainer).log_every_n_steps), pl_module.logged_step
        if batch_idx or not trainer.loggers or not every or (step + 1) % every == 0:
            return
        values = {name: float(v) for name, v in trainer.logged_metrics.items() if name.startswith("train/")}
        for logger in trainer.loggers:
            logger.log_metrics(values | {"epoch": trainer.current_epoch}, step)
