"""Masks of elements, carried from one view of a piece of memory to another."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["carried_over"]


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
