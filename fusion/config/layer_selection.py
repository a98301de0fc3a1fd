"""The layers that `layers` and AdapterDrop's `drop` select."""

from __future__ import annotations

from typing import Any

from fusion.config.fields import require


def kept_layers(layers: Any, drop: str | None, count: int, group: str) -> list[int]:
    """The layers of `layers` (null, `last:3` or a list) without those that `specialized:N` drops.

    Args:
        count: layers of the backbone.
        group: the config group of the settings.

    Raises:
        UserError: the backbone does not have a layer, or none is left.
    """
    selected = range(count) if layers is None else layers
    if isinstance(layers, str):
        last = int(layers.removeprefix("last:"))
        require(
            last <= count, f"{group}.layers={layers}: the backbone has {count} layers; expected last:1 to last:{count}"
        )
        selected = range(count - last, count)
    require(
        max(selected) < count,
        f"{group}.layers={layers}: layer {max(selected)} does not exist; the backbone has layers 0 to {count - 1}",
    )
    first = int(drop.removeprefix("specialized:")) if drop not in (None, "robust") else 0
    kept = sorted(layer for layer in selected if layer >= first)
    require(
        len(kept) > 0,
        f"{group}.drop={drop}: no layer is left of {sorted(selected)}; expected specialized:1 to "
        f"specialized:{max(selected)}",
    )
    return kept
