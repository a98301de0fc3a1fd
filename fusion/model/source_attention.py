"""Who a fusion listens to: the weights of its sources, averaged over tokens, and how spread they are.

Shapes: S texts of a batch, T tokens, N sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from fusion.data.batches import Batch
from fusion.layers.scalearn import ScaLearn
from fusion.layers.slot_module import SlotModule
from fusion.layers.target import WithTargetAdapter
from fusion.model.adapted import AdaptedModel


@dataclass(frozen=True)
class Listening:
    """Of one slot, over all real tokens.

    mean: the mean weight of each source, N numbers.
    entropy: the mean of the tokens' entropies −Σ p log p, in nats; None where the weights are no shares of a whole.
    """

    mean: list[float]
    entropy: float | None


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

    def heard(self, model: AdaptedModel, distributed: bool = False) -> dict[str, Listening]:
        """By slot of the model that was watched, in the order of the layers; see `means`."""
        compositions = compositions_of(model)
        return {
            # ScaLearn's factors are no shares of anything.
            slot: Listening(mean, None if isinstance(compositions[slot], ScaLearn) else entropy)
            for slot, (mean, entropy) in self.means(distributed).items()
        }

    def means(self, distributed: bool = False) -> dict[str, tuple[list[float], float]]:
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


def compositions_of(model: AdaptedModel) -> dict[str, SlotModule]:
    """By slot, without the target's own adapter beside a composition."""
    found = {}
    for layer, sites in model.slots.items():
        for site, slot_module in cast(nn.ModuleDict, sites).items():
            composition = (
                slot_module.composition if isinstance(slot_module, WithTargetAdapter) else slot_module
            )
            found[f"{layer}.{site}"] = cast(SlotModule, composition)
    return found


@torch.inference_mode()
def listen(model: AdaptedModel, batches: Iterable[Batch], device: torch.device) -> dict[str, Listening]:
    """Run the model over batches and see what its fusion attends to, slot by slot."""
    model = model.to(device).eval()
    sums = AttentionSums()
    for batch in batches:
        batch = batch.to(device)
        model(
            batch.input_ids,
            batch.attention_mask,
            batch.token_type_ids,
            batch.choice_counts,
            record=sums.watcher(batch),
            task=batch.task,
            words=batch.words,
        )
    return sums.heard(model)
