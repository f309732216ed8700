"""What can be said about one tensor: whether it is finite, where it is not, and its range."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nanguard.incident import TensorStats

__all__ = ["anywhere", "describe_tensor", "is_finite", "nonfinite", "plain", "stored", "zeros_of"]

_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
_HALF = frozenset((torch.float16, torch.bfloat16))
_REAL = _HALF | {torch.float32, torch.float64}
# So many elements, with what is made of them on the way, stay in a processor's cache.
_BLOCK = 2**16


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
    # A sum is several times cheaper than `isfinite`, and finite only if all elements are. It may overflow: then look again.
    if tensor.numel() == 0 or (not tensor.is_complex() and math.isfinite(_total(tensor))):
        return None
    mask = _by_blocks(tensor)
    if mask is None:
        mask = torch.isfinite(tensor).logical_not_()
    return mask if anywhere(mask) else None


def anywhere(mask: Tensor) -> bool:
    """Whether any element of a boolean tensor is set: `any`, which takes ten times as long on the CPU."""
    return mask.numel() > 0 and bool(mask.view(torch.uint8).amax())


def zeros_of(tensor: Tensor) -> Tensor:
    """Where a tensor is 0. A cast takes an eighth of the time of a comparison on the CPU; a NaN is cast to True."""
    return tensor == 0 if tensor.is_complex() else tensor.to(torch.bool).logical_not_()


def _total(tensor: Tensor) -> float:
    total = tensor.sum(dtype=torch.float32) if tensor.dtype in _HALF else tensor.sum()
    return total.item()


def _by_blocks(tensor: Tensor) -> Tensor | None:
    """Where a tensor on the CPU is not finite; `None` where its elements do not lie in memory one after the other.

    Mostly a few samples are not finite, and their elements lie together: all other blocks need no more than their sum.
    """
    if type(tensor) not in (Tensor, nn.Parameter) or not tensor.is_cpu or tensor.dtype not in _REAL:
        return None
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    values = tensor.detach().permute(order)
    if not values.is_contiguous():
        return None
    mask = torch.zeros_like(tensor, dtype=torch.bool)
    spare = values.new_empty(min(_BLOCK, tensor.numel()))
    places = mask.permute(order).view(-1)
    for block, found in zip(values.view(-1).split(_BLOCK), places.split(_BLOCK), strict=True):
        if not math.isfinite(_total(block)):
            # 0 where it is finite, and NaN elsewhere, which is cast to True.
            found.copy_(torch.sub(block, block, out=spare[: block.numel()]))
    return mask


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
