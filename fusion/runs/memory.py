"""Memory between steps and between jobs: glibc's allocator and Python's garbage collector."""

from __future__ import annotations

import ctypes
import gc

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_LARGE = 1 << 30
_LARGEST_MMAP = 32 << 20  # what glibc before 2.35 allows at most


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory instead of returning it to the system after every batch.

    By default the next batch causes thousands of page faults on a CPU, 2 to 4 % of a fusion's step.

    Returns:
        Whether glibc is there and was set.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    trimmed = mallopt(_TRIM_THRESHOLD, _LARGE) == 1
    mapped = mallopt(_MMAP_THRESHOLD, _LARGE) == 1 or mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP) == 1
    return trimmed and mapped


def free_cycles() -> None:
    """Free the model of a finished training before the next one is loaded.

    A Lightning Trainer is a reference cycle and holds the model, its gradients and the optimizer's state. Python
    collects cycles by the number of new objects, and a job creates few: a sweep would hold multiple models at once.
    """
    gc.collect()
