"""Memory that torch shares with others, such as what came by DLPack: tensors may lie in it that another storage holds."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

__all__ = ["addresses_of_foreign", "lie_in"]


def addresses_of_foreign(tensor: Tensor) -> range | None:
    """The addresses that a tensor's storage spans, or `None` where torch alone holds them."""
    try:
        memory = tensor.untyped_storage()
        if memory.resizable():
            return None
        return range(memory.data_ptr(), memory.data_ptr() + memory.nbytes())
    except (NotImplementedError, RuntimeError):  # under functorch
        return None


def lie_in(tensors: Iterable[Tensor | None], addresses: range) -> bool:
    """Whether the storage of any of these tensors overlaps these addresses."""
    for tensor in tensors:
        if tensor is None:
            continue
        try:
            memory = tensor.untyped_storage()
            start = memory.data_ptr()
        except (NotImplementedError, RuntimeError):
            continue
        if start < addresses.stop and addresses.start < start + memory.nbytes():
            return True
    return False
