"""Settings of glibc's memory allocator."""

from __future__ import annotations

import ctypes


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory. Returns False if glibc is not used or rejects the settings.

    By default, each batch causes thousands of page faults on a CPU, 2 to 4 % of the training step of a fusion.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # M_TRIM_THRESHOLD is -1, M_MMAP_THRESHOLD is -3, at most 32 MiB before glibc 2.35.
    return bool(mallopt(-1, 1 << 30)) and any(mallopt(-3, size) for size in (1 << 30, 32 << 20))
