"""The progress bar of a training: Lightning's, with the score of the last and of the best epoch."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as lightning
from pytorch_lightning.callbacks import RichProgressBar

from fusion.training.module import TaskModule


class ProgressBar(RichProgressBar):
    """Drawn by the first process.

    Args:
        monitor: the score that is shown, such as "validation/accuracy".
    """

    def __init__(self, monitor: str) -> None:
        super().__init__(refresh_rate=10)
        self._monitor = monitor

    def get_metrics(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> dict[str, Any]:
        assert isinstance(pl_module, TaskModule)
        scores = [epoch[self._monitor] for epoch in pl_module.history]
        if not scores:
            return {}
        metric = self._monitor.rpartition("/")[2]
        return {metric: f"{scores[-1]:.4f}", "best": f"{max(scores):.4f}"}
