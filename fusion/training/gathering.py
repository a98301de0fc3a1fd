"""Objects of all processes of a DDP job."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

T = TypeVar("T")


def gathered(own: T) -> list[T]:
    """The objects of all processes, by rank; `[own]` outside DDP. All processes have to call it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [own]
    everywhere: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, own)
    return everywhere
