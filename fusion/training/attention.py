"""What a fusion attends to, gathered in passing by the ordinary validation: attention.jsonl.

One line an evaluation: {"step", "epoch", "sources": [names], "slots": {"0.feedforward": {"mean", "entropy",
"value_distance"}}}. Only compositions that give their sources weights have such a file.

Shapes: S texts of a batch, T tokens, N sources, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as lightning
import torch
from torch import Tensor, nn

from fusion.data.batches import Batch
from fusion.layers.attention import AdapterFusion
from fusion.layers.filling import Filling
from fusion.layers.scalearn import ScaLearn
from fusion.layers.target import WithTargetAdapter
from fusion.model import AdaptedModel
from fusion.training.module import TaskModule
from fusion.training.record_file import RecordFile

ATTENTION = "attention.jsonl"


class AttentionRecorder(lightning.Callback):
    """Sums up what the slots give their sources while the validation runs; no pass of its own.

    Under DDP the sums of all processes are added, so that every real token of every row counts once. The first
    process writes. What Lightning runs before the training to see that the validation works is left out.

    Args:
        sources: their names, in the order of the weights; none: nothing is recorded.
        directory: where attention.jsonl is written.
        show: is called with each line, to draw it where curves are drawn.
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
        watched = bool(self._sources) and not trainer.sanity_checking
        pl_module.watch = self._sums.watcher if watched else None

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, TaskModule)
        if pl_module.watch is None:
            return
        pl_module.watch = None
        slots = self._sums.means(distributed=trainer.world_size > 1)
        if not slots or not trainer.is_global_zero:
            return
        fillings = fillings_of(pl_module.model)
        record = {
            "step": cast(Any, trainer.fit_loop.epoch_loop)._batches_that_stepped,  # as the scores are logged
            "epoch": int(pl_module.history[-1]["epoch"]),
            "sources": self._sources,
            "slots": {
                slot: {
                    "mean": mean,
                    "entropy": entropy if is_distribution(fillings[slot]) else None,
                    "value_distance": value_distance(fillings[slot]),
                }
                for slot, (mean, entropy) in slots.items()
            },
        }
        if self._file is not None:
            self._file.write(record)
        self._show(record)


class AttentionSums:
    """Sums over the real tokens of the rows that count: of the weights and of their entropy, slot by slot."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def watcher(self, batch: Batch) -> Callable[[str, Tensor], None]:
        """The recorder of one batch, which is called in each slot with its name and weights (S, T, N)."""
        real = real_tokens(batch)  # once a batch, for all slots

        def record(slot: str, weights: Tensor) -> None:
            self.add(slot, weights, real)

        return record

    @torch.compiler.disable
    def add(self, slot: str, weights: Tensor, real: Tensor) -> None:
        """
        Args:
            weights: (S, T, N).
            real: (S, T), 1 for a token that counts, else 0.
        """
        w, real = weights.detach().float(), real.float()
        entropy = torch.special.entr(w).sum(-1)  # -p log p, and 0 where p is 0: (S, T)
        by_source = torch.einsum("stn,st->n", w, real)
        sums = torch.cat([by_source, (entropy * real).sum().view(1), real.sum().view(1)]).double()
        # Stays on the device, so that nothing waits for it: (N + 2,)
        self._sums[slot] = self._sums[slot] + sums if slot in self._sums else sums

    def means(self, distributed: bool) -> dict[str, tuple[list[float], float]]:
        """By slot: the mean weight of each source, N numbers, and the mean entropy in nats.

        Args:
            distributed: whether all processes call it, each with its own rows.
        """
        means = {}
        for slot, sums in self._sums.items():
            if distributed:
                torch.distributed.all_reduce(sums)
            *by_source, entropy, tokens = sums.tolist()
            means[slot] = ([total / max(tokens, 1.0) for total in by_source], entropy / max(tokens, 1.0))
        return means


def real_tokens(batch: Batch) -> Tensor:
    """(S, T): 1 for each real token of a row that is not there to fill a batch up."""
    counts = batch.weights > 0
    if batch.choice_counts is not None:
        counts = torch.repeat_interleave(counts, batch.choice_counts)
    return batch.attention_mask * counts.unsqueeze(-1)


def fillings_of(model: AdaptedModel) -> dict[str, Filling]:
    """By slot, without the target's own adapter beside a composition."""
    found = {}
    for layer, sites in model.fillings.items():
        for site, filling in cast(nn.ModuleDict, sites).items():
            composition = filling.composition if isinstance(filling, WithTargetAdapter) else filling
            found[f"{layer}.{site}"] = cast(Filling, composition)
    return found


def is_distribution(filling: Filling) -> bool:
    """Whether the weights that a filling gives its sources are shares of 1: ScaLearn's factors are not."""
    return not isinstance(filling, ScaLearn)


def value_distance(filling: Filling) -> float | None:
    """‖Wv − I‖_F / √D of a fusion, which starts near 0; None where there is no Wv."""
    if not isinstance(filling, AdapterFusion) or filling.value is None:
        return None
    weight = filling.value.weight.detach()
    identity = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    return float((weight - identity).norm()) / math.sqrt(len(weight))
