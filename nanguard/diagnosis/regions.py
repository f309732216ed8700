"""Views of a piece of memory, and masks of elements that are carried from one to another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nanguard.diagnosis.records import Value, Write, storage_of
from nanguard.diagnosis.statistics import anywhere

__all__ = ["carried_over", "covers", "key_of", "told_apart"]


def carried_over(tensor: Tensor, mask: Tensor, other: Tensor) -> Tensor | None:
    """Which elements of `other` lie in the memory of the elements of `tensor` that `mask` marks.

    Args:
        tensor: a view of some memory.
        mask: boolean, of its shape.
        other: another view of the same memory.

    Returns:
        A boolean mask of `other`'s shape, or `None` where the two cannot be compared.
    """
    if tensor.layout is not torch.strided or other.layout is not torch.strided:
        return None
    if _layout(tensor) == _layout(other):
        return mask
    if tensor.element_size() != other.element_size():
        return None
    places = _layout(tensor)
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:  # expanded: many elements in one place
            mask = mask.any(dim, keepdim=True)
    length = tensor.untyped_storage().nbytes() // tensor.element_size()
    flat = torch.zeros(length, dtype=torch.bool, device=mask.device)
    try:
        flat.as_strided(mask.shape, *places[1:]).copy_(mask)
    except RuntimeError:  # elements that overlap in other ways, as those of `unfold`
        return None
    return flat.as_strided(*_layout(other))


def _layout(tensor: Tensor) -> tuple[torch.Size, tuple[int, ...], int]:
    return tensor.shape, tensor.stride(), int(tensor.storage_offset())


def key_of(tensor: Tensor) -> tuple[Any, ...]:
    """What tells one view of a piece of memory from another."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        return (id(tensor),)
    return storage_of(tensor), tensor.storage_offset(), tensor.shape, tensor.stride()


def covers(tensor: Tensor) -> bool:
    """Whether a tensor is all there is in its memory."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        return True
    return tensor.numel() * tensor.element_size() >= tensor.untyped_storage().nbytes()


def told_apart(tensor: Tensor, mask: Tensor, writes: list[Write], outside: list[Value]) -> Value:
    """A non-finite input, told apart into what is bad and what is meant."""
    values = [write.value for write in writes] + outside
    if all(value.meant is None for value in values):
        return Value(tensor.detach(), bad=mask)
    if all(value.bad is None for value in values):
        nan = torch.isnan(tensor)
        return Value(tensor.detach(), meant=mask) if not anywhere(nan) else Value(tensor.detach(), bad=mask)
    meant = torch.zeros_like(mask)
    for value in values:
        if value.meant is not None:
            found = carried_over(value.tensor, value.meant, tensor)
            if found is not None:
                meant |= found
        if value.bad is not None:
            found = carried_over(value.tensor, value.bad, tensor)
            if found is not None:
                meant &= ~found
    meant &= mask & torch.isinf(tensor)
    return Value(tensor.detach(), bad=mask & ~meant, meant=meant)
