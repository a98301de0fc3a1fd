"""Memory of a training run: what it will take, estimated from a pass over a few tokens, and its measured peak.

Every tensor that is allocated during a forward and backward pass belongs to a term of

    bytes(S, T) = c_0 + c_1 · S T + c_2 · S T²         S sequences of T tokens

With a single sequence and a prime number of tokens p that divides no size of the model, the term follows from the number
of elements alone: it is divisible by p² (attention probabilities), by p (hidden states) or not at all (gradients of
parameters). The peak for any S and T is then the highest sum over the allocations and releases of this pass.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fusion.model.adapted import AdaptedModel


class Allocations(TorchDispatchMode):
    """Records the allocations and releases of tensors in the context.

    Attributes:
        events: in order: bytes, negative for a release, and the power of the number of tokens that they scale with.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.events: list[tuple[int, int]] = []
        self._live: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and _storage(leaf) not in self._live | given:
                self._add(leaf)
        return output

    def _add(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _storage(tensor)
        size, power = storage.nbytes(), 0
        elements = size // tensor.element_size()
        while power < 2 and elements and elements % self.tokens == 0:
            elements, power = elements // self.tokens, power + 1

        def release() -> None:
            self._live.discard(key)
            self.events.append((-size, power))

        self._live.add(key)
        self.events.append((size, power))
        weakref.finalize(storage, release)

    def peak(self, sequences: int, tokens: int) -> int:
        """Return the highest number of allocated bytes, as if the pass had been over (sequences, tokens)."""
        present = highest = 0.0
        for size, power in self.events:
            present += size * (sequences * (tokens / self.tokens) ** power if power else 1)
            highest = max(highest, present)
        return round(highest)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def prime_tokens(model: nn.Module) -> int:
    """Return a small prime number that divides no dimension of the model's tensors."""
    sizes = {size for tensor in (*model.parameters(), *model.buffers()) for size in tensor.shape}
    primes = (11, 13, 17, 19, 23, 29, 31, 37, 41, 43)
    return next((p for p in primes if all(size % p for size in sizes)), 47)


def allocations(model: AdaptedModel, cached: bool = False) -> Allocations:
    """Record the allocations of a forward and backward pass in training mode, without side effects."""
    tokens, training = prime_tokens(model), model.training
    device = next(model.parameters()).device
    ids = torch.arange(tokens, device=device).unsqueeze(0)
    mask = torch.ones_like(ids)
    mask[:, -1] = 0  # as in most batches: without padding, attention would need no mask
    width = (1, tokens, model.hidden_size)
    features = torch.zeros(width, dtype=model.dtype, device=device) if cached else None
    trainable = list(model.trainable().values())
    devices = [device] if device.type == "cuda" else []
    recorded = Allocations(tokens)
    with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
        model.train()
        try:
            with recorded, torch.set_grad_enabled(bool(trainable)):
                logits = model(ids, mask, features=features)
                if trainable:
                    torch.autograd.grad(logits.float().sum(), trainable, allow_unused=True)
        finally:
            model.train(training)
    return recorded


@dataclass(frozen=True)
class Memory:
    """Expected memory of a training run, in bytes.

    Attributes:
        process: of the process before training, with the model; 0 with CUDA, where only tensors are counted.
        backbone: frozen weights and adapters.
        trainable: trainable parameters.
        optimizer: the two moments of each trainable parameter in AdamW.
        activations: tensors for the backward pass, gradients and temporary tensors, with the allocator's overhead.
        shape: sequences and tokens of the largest batch.
    """

    process: int
    backbone: int
    trainable: int
    optimizer: int
    activations: int
    shape: tuple[int, int]

    @property
    def total(self) -> int:
        before = self.process or self.backbone + self.trainable
        return before + self.optimizer + self.activations

    def __str__(self) -> str:
        sizes = f"backbone {in_bytes(self.backbone)}, trainable {in_bytes(self.trainable)}"
        before = f"process {in_bytes(self.process)} ({sizes})" if self.process else sizes
        activations = f"activations {in_bytes(self.activations)} ({self.shape[0]} x {self.shape[1]} tokens)"
        return f"{in_bytes(self.total)}: {before}, optimizer {in_bytes(self.optimizer)}, {activations}"


def in_bytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def expected_memory(
    model: AdaptedModel, shape: tuple[int, int], device: torch.device, cached: bool = False, overhead: float = 1.0
) -> Memory:
    """Estimate the memory of training on batches of (sequences, tokens) at most.

    Args:
        device: of the training; the model may still be on another one.
        cached: whether batches contain cached frozen features.
        overhead: memory that the allocator takes for a byte of activations on a CPU.
    """
    own = sum(parameter.nbytes for parameter in model.trainable().values())
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    activations = allocations(model, cached).peak(*shape)
    on_cpu = device.type != "cuda"
    return Memory(
        process=resident() if on_cpu else 0,
        backbone=sum(tensors.values()) - own,
        trainable=own,
        optimizer=2 * own,
        activations=round(activations * overhead) if on_cpu else activations,
        shape=shape,
    )


def available(device: torch.device) -> int | None:
    """Return the memory in bytes that this process could use, with what it uses now; `None` if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        return int(free) * 1024 + resident()
    return None


def resident() -> int:
    """Return the resident memory of this process in bytes; its peak on systems without /proc."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    return peak_memory(torch.device("cpu"))


def reset_peak(device: torch.device) -> None:
    """Let `peak_memory` measure from now on. On systems without /proc, it measures since the start of the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak of the resident memory


def peak_memory(device: torch.device) -> int:
    """Return the peak in bytes since `reset_peak`: of the tensors on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
