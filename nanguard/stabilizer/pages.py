"""Memory for large results: more than half of the time that it takes to write one goes by while the kernel hands out pages.

Linux gives memory in pages of 2 MiB instead of 4 KiB where that is asked for (`madvise(2)`, `MADV_HUGEPAGE`), as NumPy does for
its large arrays. It is a hint; where it is not followed, nothing is lost. Of very large results it is not given: a virtual
machine may hand huge pages back to its host while they are idle, and having many of them again takes longer than small ones.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from nanguard.stabilizer import environment

__all__ = ["LARGE", "LARGEST", "product"]

# In bytes. glibc maps whatever is larger by itself, so that the hint concerns nothing else; and less has few huge pages.
LARGE = 1 << 25
LARGEST = 5 << 25


def product(tensor: Tensor, factor: Tensor) -> Tensor:
    """``tensor * factor``, of a factor that does not change shape and dtype; derivatives are recorded as ever."""
    if torch.is_grad_enabled() or not _may_be_huge(tensor):
        return tensor * factor
    result = torch.empty_like(tensor, requires_grad=False)
    _ask_for_huge_pages(result)
    return torch.mul(tensor, factor, out=result)


def _may_be_huge(tensor: Tensor) -> bool:
    if not tensor.is_cpu or not LARGE <= tensor.numel() * tensor.element_size() <= LARGEST:
        return False
    return not environment.is_surrounded()


def _ask_for_huge_pages(tensor: Tensor) -> None:
    advise = _madvise()
    if advise is None:
        return
    memory = tensor.untyped_storage()
    start = -(-memory.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    advise(start, memory.data_ptr() + memory.nbytes() - start, mmap.MADV_HUGEPAGE)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux") or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    with contextlib.suppress(OSError, AttributeError):
        found = ctypes.CDLL(None).madvise
        found.argtypes, found.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
        return found
    return None
