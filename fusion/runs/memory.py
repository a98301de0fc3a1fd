"""Settings of glibc's memory allocator and of Python's garbage collector."""

from __future__ import annotations

import contextlib
import ctypes
import gc

# Resident memory for a byte of activations on a CPU, since glibc (2.36) does not reuse all freed memory for aligned
# blocks: 1.6 to 1.75 in float32 for 128 to 4096 tokens per batch. Separate mappings (M_MMAP_THRESHOLD) need 1.0, but a
# training step takes a third longer.
GLIBC_OVERHEAD = 1.7
_USUAL_THRESHOLDS = gc.get_threshold()  # of collections, which differ between versions of Python


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


def return_freed_memory() -> None:
    """Return memory that glibc has kept to the system, such as that of an earlier job of a sweep."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def collect_rarely() -> None:
    """Collect garbage rarely during imports, which allocate millions of objects that stay."""
    gc.set_threshold(100_000)  # allocations minus deallocations between two collections


def collect_as_usual() -> None:
    """Collect garbage as often as before `collect_rarely` from now on."""
    gc.set_threshold(*_USUAL_THRESHOLDS)
