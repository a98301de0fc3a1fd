"""Sharding of frozen weights over processes (FSDP, Zhao et al. 2023), so that no process stores all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import Tensor, nn


def shard(
    model: nn.Module, layers: Sequence[nn.Module], trained: set[nn.Parameter], device: str, processes: int
) -> None:
    """Keep 1 / `processes` of each weight in each process; parameters in `trained` are not changed. Collective.

    A layer's weights are gathered before it is computed, in the forward and in the backward pass, and released
    afterwards. The other weights of the model, such as embeddings, are gathered while the model is computed, as are
    those of layers that share a weight (ALBERT).

    Args:
        device: type of the device of the computation.
    """
    # Slow imports that only this strategy needs.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device, (processes,))
    uses = Counter(parameter for layer in layers for parameter in layer.parameters())
    separate = [layer for layer in layers if all(uses[parameter] == 1 for parameter in layer.parameters())]
    for module in [*separate, model]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=trained)


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # torch.distributed.tensor.DTensor, which is slow to import


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with all its shards. Collective if it is sharded."""
    gathered: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return gathered


def own_shard(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor, or the tensor if it is not sharded."""
    own: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return own
