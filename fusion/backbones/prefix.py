"""The frozen prefix: all that a backbone computes below its lowest slot.

Whatever trains lies above it. With the backbone's dropout off it is therefore one fixed function of
the row, which need not be computed more than once: see `fusion.prefix`.

Shapes: B rows, T tokens, D hidden size, W the width of the lowest slot's state (D or 2·D).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fusion.backbones.families import Family
from fusion.backbones.slots import CurrentBatch, layer_and_site


class Skippable(nn.Module):
    """A module of the prefix. It runs as ever, unless the batch brings along what the prefix gives.

    Then its place is taken by a stream that nobody reads: the lowest slot takes its state from the
    batch. A backbone without slots ends in that stream, so there it is the last layer's output.

    Args:
        outputs: how many values the module gives; the stream is the first, the others are None.
        hidden_size: D.
    """

    def __init__(self, inner: nn.Module, outputs: int, hidden_size: int, current: CurrentBatch) -> None:
        super().__init__()
        self.inner = inner
        self._outputs = outputs
        self._hidden_size = hidden_size
        self._current = current

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        prefix = self._current.prefix
        if prefix is None:
            return self.inner(*args, **kwargs)
        stream: Tensor = prefix[..., : self._hidden_size]
        return stream if self._outputs == 1 else (stream, *[None] * (self._outputs - 1))


def make_skippable(model: nn.Module, family: Family, hidden_size: int, current: CurrentBatch) -> None:
    """Put a `Skippable` round every module that runs below `current.entry` (all, where that is None)."""
    for path, outputs in list(_below(model, family, current.entry)):
        inner = model.get_submodule(path)
        model.set_submodule(path, Skippable(inner, outputs, hidden_size, current))


def _below(model: nn.Module, family: Family, entry: str | None) -> Iterator[tuple[str, int]]:
    present = {name for name, _ in model.named_modules()}
    yield from ((path, 1) for path in family.stem if path in present)
    layer, site = (len(family.layer_list(model)), "") if entry is None else layer_and_site(entry)
    yield from ((f"{family.layers}.{number}", 1) for number in range(layer))
    if entry is not None:
        yield from (
            (f"{family.layers}.{layer}.{path}", outputs) for path, outputs in family.before[site].items()
        )
