"""The same command, the same weights: what has to be said before anything runs on a device."""

from __future__ import annotations

import os

import torch

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


def use_deterministic_algorithms(asked: bool | str | None) -> None:
    """`trainer.deterministic`, from the start: Lightning says it only once a trainer is made.

    What looks at the target before it trains (a probe, the feature cache) runs on the device earlier, and cuBLAS reads
    its setting once, when it starts. On a CPU the algorithms are deterministic as they are.

    Args:
        asked: true: an operation that is not deterministic is an error; "warn": a warning.
    """
    if asked:
        os.environ.setdefault(CUBLAS, ":4096:8")
    torch.use_deterministic_algorithms(bool(asked), warn_only=asked == "warn")
