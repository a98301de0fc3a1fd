"""Which sources a fusion can do without: those that get least of its attention on the target's rows.

Shapes: N sources.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusion.data.batches import Batch
from fusion.model.adapted import AdaptedModel
from fusion.model.source_attention import listen

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest

log = logging.getLogger(__name__)


def mean_attention(model: AdaptedModel, batches: Iterable[Batch], device: torch.device) -> dict[str, Tensor]:
    """By slot, what each source gets: (N,), the mean over all real tokens."""
    return {
        slot: torch.tensor(heard.mean, dtype=torch.float64)
        for slot, heard in listen(model, batches, device).items()
    }


def most_attended(
    attention: Mapping[str, Tensor], sources: Sequence[Manifest], keep: int
) -> dict[str, list[int]]:
    """By slot, the positions of the `keep` sources with the most attention, in the sources' order.

    A slot where fewer sources have an adapter keeps all of them.
    """
    kept: dict[str, list[int]] = {}
    for slot, weights in attention.items():
        there = [n for n, source in enumerate(sources) if slot in source.bottleneck_sizes]
        best = sorted(there, key=lambda n: -float(weights[n]))[:keep]
        kept[slot] = sorted(best)
        shown = ", ".join(f"{sources[n].name} {float(weights[n]):.3f}" for n in best)
        log.info(
            "%s keeps %s of the attention: %s", slot, f"{sum(float(weights[n]) for n in best):.3f}", shown
        )
    return kept
