"""What can be said about one tensor: whether it is finite, where it is not, and its range."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nanguard.incident import TensorStats

__all__ = ["describe_tensor", "is_finite", "nonfinite", "plain", "stored"]

_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
_HALF = frozenset((torch.float16, torch.bfloat16))


def plain(tensor: Tensor) -> bool:
    """Whether a tensor can hold a NaN, in memory that can be looked at."""
    return (tensor.is_floating_point() or tensor.is_complex()) and tensor.layout is torch.strided


def stored(tensor: Tensor) -> Tensor:
    """The tensor that holds the elements: of a sparse one, that of its values; of zeros without memory, which torch makes in
    second derivatives, one that can be read.
    """
    if tensor.layout is torch.sparse_coo:
        return tensor._values()
    if tensor.layout in _COMPRESSED:
        return tensor.values()
    if tensor._is_zerotensor():
        return torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
    return tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether all elements are finite; tensors that are not `plain` count as finite, sparse ones are judged by their values."""
    tensor = stored(tensor)
    if not plain(tensor) or tensor.is_nested:
        return True
    return nonfinite(tensor) is None


def nonfinite(tensor: Tensor) -> Tensor | None:
    """Where a `plain` tensor is NaN or infinite, a boolean tensor of its shape; `None` for nowhere."""
    if tensor.numel() == 0:
        return None
    if not tensor.is_complex():
        # A sum is several times cheaper than `isfinite`, and finite only if all elements are. It may overflow: then look again.
        total = tensor.sum(dtype=torch.float32) if tensor.dtype in _HALF else tensor.sum()
        if math.isfinite(total.item()):
            return None
    mask = torch.isfinite(tensor).logical_not_()
    return mask if bool(mask.any()) else None


def describe_tensor(name: str, tensor: Tensor) -> TensorStats:
    """Shape, dtype, range of the finite elements and counts of the others."""
    values = tensor.detach()
    dtype = str(tensor.dtype).removeprefix("torch.")
    if values.layout is not torch.strided or values.is_complex() or values.is_nested or values.numel() == 0:
        return TensorStats(name, tuple(tensor.shape), dtype)
    # Integers lose nothing that counts here, and halves are exact.
    wide = values if values.dtype in (torch.float32, torch.float64) else values.to(torch.float64)
    finite = torch.isfinite(wide)
    within = wide if bool(finite.all()) else wide[finite]
    low, high = (float(within.min()), float(within.max())) if within.numel() else (None, None)
    whole = within is wide
    return TensorStats(
        name,
        tuple(tensor.shape),
        dtype,
        low,
        high,
        nan=0 if whole else int(torch.isnan(wide).sum()),
        posinf=0 if whole else int(torch.isposinf(wide).sum()),
        neginf=0 if whole else int(torch.isneginf(wide).sum()),
        zeros=int((wide == 0).sum()),
    )
