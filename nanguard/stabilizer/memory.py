"""What a tensor is made of, and what memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = [
    "addresses_of_foreign",
    "is_plain",
    "is_real",
    "keeps_too_much_alive",
    "lie_in",
    "owns_memory",
    "storage_key",
]

# What is remembered may keep that many bytes alive, or that many times its largest part.
MOST_MEMORY = 128 << 20
MOST_PARTS = 4

# Under functorch, and of parameters that a lazy module has not initialised.
_NO_MEMORY = (NotImplementedError, RuntimeError, ValueError)
_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_dispatch_keys = torch._C._dispatch_keys
# By the dispatch keys of a tensor, which say all that makes one of no subclass plain or not.
_ARE_PLAIN: dict[int, bool] = {}


def is_plain(tensor: Tensor) -> bool:
    """Whether it is an ordinary dense tensor, of no subclass, that counts its versions."""
    if type(tensor) not in _PLAIN:
        return False
    keys = _dispatch_keys(tensor).raw_repr()
    plain = _ARE_PLAIN.get(keys)
    if plain is None:
        plain = _ARE_PLAIN[keys] = _is_plain(tensor)
    return plain


def _is_plain(tensor: Tensor) -> bool:
    if tensor.layout is not torch.strided:
        return False
    return not (tensor.is_inference() or tensor.is_neg() or tensor.is_meta or tensor.is_nested)


def is_real(tensor: Tensor) -> bool:
    """Whether its numbers are real and have digits: a cast to fewer than 16 bits gives others, of which most are 0."""
    return tensor.is_floating_point() and tensor.dtype.itemsize > 1


def owns_memory(tensor: Tensor) -> bool:
    """Whether torch alone holds the memory: what it shares with NumPy, a buffer or another process cannot be resized."""
    try:
        return bool(tensor.untyped_storage().resizable())
    except _NO_MEMORY:
        return True


def storage_key(tensor: Tensor) -> int | None:
    """What tensors of the same memory have in common; `None` for those without memory."""
    try:
        key: int = tensor.untyped_storage()._cdata
    except _NO_MEMORY:
        return None
    return key


def _bytes_of(tensor: Tensor) -> int:
    """How much memory is kept alive by a tensor."""
    try:
        return tensor.untyped_storage().nbytes()
    except _NO_MEMORY:
        return 0


def keeps_too_much_alive(values: Sequence[Tensor], tensor: Tensor) -> bool:
    """Whether the leaves of a term, such as all that went into a running average, take far more memory than a tensor does."""
    if len(values) <= MOST_PARTS:
        return False
    parts = {storage_key(value): _bytes_of(value) for value in values}
    return sum(parts.values()) > max(MOST_MEMORY, MOST_PARTS * max(_bytes_of(tensor), *parts.values()))


def addresses_of_foreign(tensor: Tensor) -> range | None:
    """The addresses of memory that torch shares with others, as what came by DLPack: other storages may hold it, too.

    `None` where torch alone holds it.
    """
    try:
        memory = tensor.untyped_storage()
        if memory.resizable():
            return None
        return range(memory.data_ptr(), memory.data_ptr() + memory.nbytes())
    except _NO_MEMORY:
        return None


def lie_in(tensors: Iterable[Tensor | None], addresses: range) -> bool:
    """Whether the storage of any of these tensors overlaps these addresses."""
    for tensor in tensors:
        if tensor is None:
            continue
        try:
            memory = tensor.untyped_storage()
            start = memory.data_ptr()
        except _NO_MEMORY:
            continue
        if start < addresses.stop and addresses.start < start + memory.nbytes():
            return True
    return False
