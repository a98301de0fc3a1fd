"""Memory between steps: the allocator of glibc."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_LARGE = 1 << 30
_LARGEST_MMAP = 32 << 20  # what glibc before 2.35 allows at most


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory; returns whether glibc is there and was set.

    By default the next batch causes thousands of page faults on a CPU, 2 to 4 % of a fusion's step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    trimmed = mallopt(_TRIM_THRESHOLD, _LARGE) == 1
    mapped = mallopt(_MMAP_THRESHOLD, _LARGE) == 1 or mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP) == 1
    return trimmed and mapped
