"""What can be said about one tensor: whether it is finite, where it is not, and its range."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nanguard.incident import TensorStats

__all__ = ["describe_tensor", "is_finite", "nonfinite", "plain", "readable"]

_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
_HALF = frozenset((torch.float16, torch.bfloat16))


def plain(tensor: Tensor) -> bool:
    """Whether a tensor can hold a NaN, in memory that can be looked at."""
    return (tensor.is_floating_point() or tensor.is_complex()) and tensor.layout is torch.strided


def readable(value: Any) -> Any:
    """A tensor whose memory can be looked at.

    That is the values of a sparse tensor, and zeros in place of those without memory which torch makes in second derivatives;
    all else as it is.
    """
    if not isinstance(value, Tensor):
        return value
    if value.layout is torch.sparse_coo:
        return value._values()
    if value.layout in _COMPRESSED:
        return value.values()
    if not value._is_zerotensor():
        return value
    return torch.zeros((), dtype=value.dtype, device=value.device).expand(value.shape)


def is_finite(tensor: Tensor) -> bool:
    """Whether all elements are finite; tensors that are not `plain` count as finite, sparse ones are judged by their values."""
    if tensor.layout is torch.sparse_coo:
        tensor = tensor._values()
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
