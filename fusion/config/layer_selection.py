"""The layers that `layers` and AdapterDrop's `drop` select."""

from __future__ import annotations

from typing import Any

from fusion.errors import UserError


def selected_layers(layers: Any, count: int, key: str) -> list[int]:
    """The layers of `null`, `last:3` or a list, for a backbone of `count` layers.

    Raises:
        UserError: a layer that the backbone does not have; `key` names the setting.
    """
    if layers is None:
        return list(range(count))
    if isinstance(layers, str):
        last = int(layers.removeprefix("last:"))
        if last > count:
            raise UserError(
                f"{key}={layers}: the backbone has {count} layers; expected last:1 to last:{count}"
            )
        return list(range(count - last, count))
    beyond = [layer for layer in layers if layer >= count]
    if beyond:
        raise UserError(
            f"{key}={list(layers)}: layer {beyond[0]} does not exist; the backbone has layers 0 to {count - 1}"
        )
    return sorted(layers)


def kept_layers(layers: Any, drop: str | None, count: int, group: str) -> list[int]:
    """The layers of `layers` without those that `specialized:N` drops.

    Raises:
        UserError: none is left; `group` is the config group of the settings.
    """
    selected = selected_layers(layers, count, f"{group}.layers")
    if drop is None or drop == "robust":
        return selected
    first = int(drop.removeprefix("specialized:"))
    kept = [layer for layer in selected if layer >= first]
    if not kept:
        raise UserError(
            f"{group}.drop={drop}: no layer is left of {selected}; expected specialized:1 to specialized:{selected[-1]}"
        )
    return kept
