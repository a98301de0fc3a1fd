"""Settings of glibc's memory allocator."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory. Returns False if glibc is not used or rejects the settings.

    By default, each batch causes thousands of page faults on a CPU, 2 to 4 % of the training step of a fusion.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # The second value is the maximum before glibc 2.35.
    return bool(mallopt(_TRIM_THRESHOLD, 1 << 30)) and any(
        mallopt(_MMAP_THRESHOLD, size) for size in (1 << 30, 32 << 20)
    )
