"""Seconds of a step and its peak memory: the same few lines in both workers, torch alone.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Step = Callable[[], object]


@dataclass(frozen=True)
class TokenBatch:
    """input_ids, attention_mask: (B, T). labels: (B,)."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def token_batch(
    vocabulary: int, rows: int, tokens: int, outputs: int, seed: int, device: str, padded: bool = False
) -> TokenBatch:
    """Random words, no special tokens; `padded` shortens every second row, by up to half."""
    random = torch.Generator().manual_seed(seed)
    # BERT's first thousand ids are special or unused; a small test vocabulary has no such room.
    first = 1000 if vocabulary > 2000 else 5
    ids = torch.randint(first, vocabulary, (rows, tokens), generator=random)
    lengths = torch.full((rows,), tokens)
    if padded:
        shorter = torch.randint(max(1, tokens // 2), tokens + 1, (rows,), generator=random)
        lengths[1::2] = shorter[1::2]
    mask = (torch.arange(tokens) < lengths.unsqueeze(-1)).long()
    labels = torch.randint(0, outputs, (rows,), generator=random)
    return TokenBatch((ids * mask).to(device), mask.to(device), labels.to(device))


def synchronise(device: str) -> None:
    """Waits until the device has done what it was given: without it only the launch would be timed."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(step: Step, warmup: int, steps: int, device: str) -> list[float]:
    """Seconds of each of `steps` calls, after `warmup` others."""
    for _ in range(warmup):
        step()
    seconds = []
    for _ in range(steps):
        synchronise(device)
        started = time.perf_counter()
        step()
        synchronise(device)
        seconds.append(time.perf_counter() - started)
    return seconds


def peak_bytes(step: Step, device: str) -> int:
    """The most bytes of tensors that two calls hold at a time, above what was there before them.

    The second call stands for all later ones: gradients and the optimizer's state are there by then.
    """
    if device == "cuda":
        synchronise(device)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(), step()
        synchronise(device)
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(), step()
    results = profiler.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    assert events, "this torch records no memory events"
    held, peak = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
