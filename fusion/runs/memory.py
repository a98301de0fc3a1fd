"""What a step and a job free, and when: the C library's allocator and Python's garbage collector."""

from __future__ import annotations

import ctypes
import gc

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_LARGE = 1 << 30
_LARGEST_MMAP = 32 << 20  # what glibc before 2.35 allows at most


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for this process in place of handing it back after every batch.

    By default glibc returns the top of its heap to the system, which has to clear every page of it when the next
    batch asks for as much again: thousands of page faults a step on a CPU, two to four hundredths of a fusion's
    step. Where there is no glibc, nothing is done.

    Returns:
        Whether it was done.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    trimmed = mallopt(_TRIM_THRESHOLD, _LARGE) == 1
    mapped = mallopt(_MMAP_THRESHOLD, _LARGE) == 1 or mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP) == 1
    return trimmed and mapped


def give_back_memory() -> bool:
    """Hand freed memory back to the system after all, once: what is asked for next may be of another kind.

    Returns:
        Whether there was any, and a C library that can do it.
    """
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0) == 1)
    except (AttributeError, OSError, TypeError):
        return False


def free_cycles() -> None:
    """Free a model whose training is over, which the next job or the next model would otherwise come on top of.

    A Lightning Trainer is a reference cycle and holds the model, its gradients and the optimizer's state. Python
    frees cycles by a count of new objects, of which a job makes few: a sweep would hold several models at once.
    """
    gc.collect()
