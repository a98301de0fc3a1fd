"""Deterministic algorithms: the same command trains the same weights."""

from __future__ import annotations

import os

import torch

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


def use_deterministic_algorithms(deterministic: bool | str | None) -> None:
    """Apply `trainer.deterministic` before anything runs on a device; Lightning does only when a Trainer is made.

    A probe and the feature cache run earlier, and cuBLAS reads its setting once. On a CPU it changes nothing.

    Args:
        deterministic: true: raise for a nondeterministic operation; "warn": warn.
    """
    if deterministic:
        os.environ.setdefault(CUBLAS, ":4096:8")
    torch.use_deterministic_algorithms(bool(deterministic), warn_only=deterministic == "warn")
