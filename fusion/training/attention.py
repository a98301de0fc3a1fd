"""attention.jsonl: the source attention of a fusion, summed over each validation.

One line per validation: {"step", "epoch", "sources": [names], "slots": {"0.feedforward": {"mean", "entropy",
"value_distance"}}}. Only compositions that weight their sources have this file.

Shapes: D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as lightning
import torch

from fusion.layers.attention import AdapterFusion
from fusion.layers.slot_module import SlotModule
from fusion.model.source_attention import AttentionSums, compositions_of
from fusion.runs.run import ATTENTION
from fusion.training.lightning_internals import logged_step
from fusion.training.module import TaskModule
from fusion.training.record_file import RecordFile


class AttentionRecorder(lightning.Callback):
    """Records the source weights of each slot during the validation, without an additional pass.

    Under DDP the sums of all processes are added, so that every real token of every row counts once, and the first
    process writes. Lightning's sanity check is excluded.

    Args:
        sources: their names, in the order of the weights; empty: nothing is recorded.
        directory: of attention.jsonl.
        show: called with each line.
    """

    def __init__(
        self,
        sources: Sequence[str],
        directory: Path | None = None,
        show: Callable[[dict[str, Any]], None] = lambda record: None,
    ) -> None:
        self._sources = list(sources)
        self._file = None if directory is None else RecordFile(directory / ATTENTION)
        self._show = show
        self._sums = AttentionSums()

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, TaskModule)
        self._sums = AttentionSums()
        recorded = bool(self._sources) and not trainer.sanity_checking
        pl_module.recorder = self._sums.recorder if recorded else None

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, TaskModule)
        if pl_module.recorder is None:
            return
        pl_module.recorder = None
        attention = self._sums.by_slot(pl_module.model, distributed=trainer.world_size > 1)
        if not attention or not trainer.is_global_zero:
            return
        compositions = compositions_of(pl_module.model)
        record = {
            "step": logged_step(trainer),
            "epoch": int(pl_module.history[-1]["epoch"]),
            "sources": self._sources,
            "slots": {
                slot: {
                    "mean": measured.mean,
                    "entropy": measured.entropy,
                    "value_distance": value_distance(compositions[slot]),
                }
                for slot, measured in attention.items()
            },
        }
        if self._file is not None:
            self._file.write(record)
        self._show(record)


def value_distance(module: SlotModule) -> float | None:
    """‖Wv − I‖_F / √D of a fusion, which starts near 0; None if there is no Wv."""
    if not isinstance(module, AdapterFusion) or module.value is None:
        return None
    weight = module.value.weight.detach()
    identity = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    return float((weight - identity).norm()) / math.sqrt(len(weight))
