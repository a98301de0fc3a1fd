"""Memory-mapped weights."""

from __future__ import annotations

import ctypes
import mmap

from torch import Tensor

MADV_PAGEOUT = 21  # since Linux 5.4


def page_out(tensor: Tensor) -> None:
    """Remove the pages of a memory-mapped tensor from memory, where the kernel supports it; its values do not change.

    safetensors maps a file into memory as a whole, so pages that were read would stay until its last tensor is deleted.
    """
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if length > 0 and hasattr(library := ctypes.CDLL(None), "madvise"):
        library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), MADV_PAGEOUT)
