"""Source attention: the weights of the sources in a fusion, averaged over tokens, and their entropy.

Shapes: S texts of a batch, T tokens, N sources.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusion.data.batches import Batch
from fusion.layers.bottleneck import WithTargetAdapter
from fusion.layers.mixtures import ScaLearn
from fusion.layers.slot_module import SlotModule
from fusion.model.adapted import AdaptedModel
from fusion.model.inference import forward

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceAttention:
    """Source attention of one slot, averaged over all non-padding tokens.

    Attributes:
        mean: mean weight of each source, N values.
        entropy: mean entropy −Σ p log p of a token's weights in nats, or `None` if the weights do not sum to 1.
    """

    mean: list[float]
    entropy: float | None


class AttentionSums:
    """Sums of the weights and of their entropy over non-padding tokens, per slot."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def recorder(self, batch: Batch) -> Callable[[str, Tensor], None]:
        """Return a recorder for one batch, called in each slot with its name and weights (S, T, N)."""
        return partial(self.add, real=real_tokens(batch))

    @torch.compiler.disable
    def add(self, slot: str, weights: Tensor, real: Tensor) -> None:
        """Add the weights (S, T, N) of a slot; real: (S, T), 1 for tokens to include, else 0."""
        w, real = weights.detach().float(), real.float()
        entropy = torch.special.entr(w).sum(-1)  # -p log p, and 0 for p = 0: (S, T)
        by_source = torch.einsum("stn,st->n", w, real)
        sums = torch.cat([by_source, (entropy * real).sum().view(1), real.sum().view(1)]).double()
        # (N + 2,), kept on the device, so that no synchronization is needed
        self._sums[slot] = self._sums[slot] + sums if slot in self._sums else sums

    def by_slot(self, compositions: Mapping[str, SlotModule], distributed: bool = False) -> dict[str, SourceAttention]:
        """Return the source attention by slot, in the order in which the slots run.

        Args:
            compositions: result of `compositions_of`.
            distributed: whether to reduce over all processes; all ranks must then call this method.
        """
        found = {}
        for slot, sums in self._sums.items():
            if distributed:
                torch.distributed.all_reduce(sums)
            *by_source, entropy, _ = (sums / sums[-1].clamp(min=1.0)).tolist()
            # ScaLearn's factors do not sum to 1.
            found[slot] = SourceAttention(by_source, None if isinstance(compositions.get(slot), ScaLearn) else entropy)
        return found


def real_tokens(batch: Batch) -> Tensor:
    """Return (S, T): 1 for tokens, 0 for padding and for examples that only fill up a batch."""
    counts = batch.weights > 0
    if batch.choice_counts is not None:
        counts = torch.repeat_interleave(counts, batch.choice_counts)
    return batch.attention_mask * counts.unsqueeze(-1)


def compositions_of(model: AdaptedModel) -> dict[str, SlotModule]:
    """Return the composition of each slot, without the target's own adapter."""
    return {
        slot: module.composition if isinstance(module, WithTargetAdapter) else module
        for slot, module in model.slot_modules().items()
    }


@torch.inference_mode()
def measure_attention(
    model: AdaptedModel, batches: Iterable[Batch], device: torch.device
) -> dict[str, SourceAttention]:
    """Run the model on all batches and return the mean source attention by slot."""
    model = model.to(device).eval()
    sums = AttentionSums()
    for batch in batches:
        batch = batch.to(device)
        forward(model, batch, record=sums.recorder(batch))
    return sums.by_slot(compositions_of(model))


def most_attended(
    attention: Mapping[str, SourceAttention], sources: Sequence[Manifest], keep: int
) -> dict[str, list[int]]:
    """Return by slot the indices of the `keep` sources with the most attention, in ascending order.

    If fewer sources have an adapter in a slot, all of them are selected.
    """
    kept: dict[str, list[int]] = {}
    for slot, measured in attention.items():
        weights = measured.mean
        present = [n for n, source in enumerate(sources) if slot in source.bottleneck_sizes]
        best = sorted(present, key=lambda n: -weights[n])[:keep]
        kept[slot] = sorted(best)
        shown = ", ".join(f"{sources[n].name} {weights[n]:.3f}" for n in best)
        percent = 100 * sum(weights[n] for n in best)
        log.info("%s: the selected sources receive %.1f%% of the attention: %s", slot, percent, shown)
    return kept
