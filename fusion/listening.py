"""Who a fusion listens to: the weights of its sources, averaged over tokens, and how spread they are.

Shapes: S texts of a batch, T tokens, N sources.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion.data.batches import Batch
from fusion.model import AdaptedModel

_EVEN = 1e-3  # how far from 1 the weights of a token may add up and still be shares


@dataclass(frozen=True)
class Listening:
    """Of one slot, over all real tokens.

    mean: (N,) float64, the mean weight of each source.
    entropy: the mean of the tokens' entropies −Σ p log p, in nats; None where the weights are no shares of a whole.
    """

    mean: Tensor
    entropy: float | None


class Listeners:
    """Adds up, batch by batch, what the slots record."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._entropies: dict[str, float] = {}
        self._tokens: dict[str, int] = {}
        self._shares: dict[str, bool] = {}

    def add(self, slot: str, weights: Tensor, attention_mask: Tensor) -> None:
        """
        Args:
            weights: (S, T, N). attention_mask: (S, T), 1 for a real token.
        """
        seen = weights[attention_mask.bool()].double()  # (real tokens, N)
        total = seen.sum(0).cpu()
        shares = bool((seen >= 0).all()) and bool(((seen.sum(-1) - 1).abs() < _EVEN).all())
        entropy = float(torch.special.entr(seen.clamp(min=0)).sum()) if shares else 0.0
        self._sums[slot] = self._sums[slot] + total if slot in self._sums else total
        self._entropies[slot] = self._entropies.get(slot, 0.0) + entropy
        self._tokens[slot] = self._tokens.get(slot, 0) + len(seen)
        self._shares[slot] = self._shares.get(slot, True) and shares

    def result(self) -> dict[str, Listening]:
        """By slot, in the order of the layers."""
        return {
            slot: Listening(
                total / self._tokens[slot],
                self._entropies[slot] / self._tokens[slot] if self._shares[slot] else None,
            )
            for slot, total in self._sums.items()
        }


@torch.inference_mode()
def listen(model: AdaptedModel, batches: Iterable[Batch], device: torch.device) -> dict[str, Listening]:
    """Run the model over batches and see what its fusion attends to."""
    model = model.to(device).eval()
    listeners = Listeners()
    for batch in batches:
        batch = batch.to(device)
        mask = batch.attention_mask
        model(
            batch.input_ids,
            mask,
            batch.token_type_ids,
            batch.choice_counts,
            record=lambda slot, weights, mask=mask: listeners.add(slot, weights, mask),
            task=batch.task,
        )
    return listeners.result()
