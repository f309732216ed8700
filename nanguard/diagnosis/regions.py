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
    if (tensor.shape, tensor.stride(), tensor.storage_offset()) == (
        other.shape,
        other.stride(),
        other.storage_offset(),
    ):
        return mask.clone()
    if tensor.element_size() != other.element_size():
        return None
    length = tensor.untyped_storage().nbytes() // tensor.element_size()
    flat = torch.zeros(length, dtype=torch.bool, device=mask.device)
    marked = _offsets(tensor)[mask.to(tensor.device)]
    flat[marked] = True
    return flat[_offsets(other)]


def _offsets(tensor: Tensor) -> Tensor:
    """For each element its place in the memory, counted in elements."""
    places = torch.full((), int(tensor.storage_offset()), dtype=torch.long, device=tensor.device)
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        shape = [1] * tensor.ndim
        shape[dim] = size
        places = places + (torch.arange(size, device=tensor.device) * stride).reshape(shape)
    return places.expand(tensor.shape)
