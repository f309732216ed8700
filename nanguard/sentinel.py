"""The cheap alarm: are a loss and all its gradients finite? One fused check, one device synchronisation."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["all_finite", "finite_flags", "nonfinite_names", "norms", "norms_and", "small_norms", "values_of"]

# Below so many elements, in so few tensors, calls of kernels cost more than what they do.
_SMALL, _FEW = 65536, 16


def small_norms(tensors: list[Tensor]) -> list[float] | None:
    """The L2 norms of a few small tensors on the CPU, each finite only if its tensor is; elsewhere `None`.

    A norm may overflow, or be NaN, on finite values that are very large: a suspicion, as with `norms`.
    """
    if len(tensors) > _FEW:
        return None
    for tensor in tensors:
        plain = type(tensor) is Tensor and tensor.is_cpu and tensor.layout is torch.strided
        if not plain or tensor.dtype not in _FULL or tensor.numel() > _SMALL:
            return None
    return [norm.item() for norm in torch._foreach_norm(tensors, 2.0)] if tensors else []


_FULL = frozenset((torch.float32, torch.float64))


def norms(tensors: Iterable[Tensor]) -> Tensor | None:
    """Numbers that are all finite only if every element of every tensor is; no synchronisation.

    The L2 norm is the fastest fused reduction that propagates NaN and infinities, ten times as fast as the maximum norm on CPU.
    It may overflow on finite values, so a non-finite norm is a suspicion; `finite_flags` gives the verdict.

    Args:
        tensors: real or complex floating tensors of any shape, dtype, device and layout; others are ignored.

    Returns:
        A 1-D tensor (float32 or wider, on the device of the first tensor), or `None` where there is nothing to check.
    """
    tensors = list(tensors)
    if _alike(tensors):
        return torch.stack(_norms(tensors)).detach()  # the common case: nothing to ask about each of them
    with torch.no_grad():
        groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for tensor in tensors:
            values = values_of(tensor)
            if values is not None:
                groups.setdefault((values.device, values.dtype), []).append(values)
        if not groups:
            return None
        stacked = [torch.stack(_norms(group)) for group in groups.values()]
        if len(stacked) == 1:
            return stacked[0]
        return torch.cat([part.to(stacked[0].device, torch.float64) for part in stacked])


def norms_and(tensors: list[Tensor], scalars: list[Tensor]) -> Tensor | None:
    """The `norms` of tensors that are all alike, and behind them scalars as they are, in one 1-D tensor; no synchronisation.

    `None` where the tensors, or the scalars and the norms, differ in type, dtype, device or layout.
    """
    if not _alike(tensors):
        return None
    found = _norms(tensors)
    kind = found[0].dtype, found[0].device
    if any((type(entry), entry.dtype, entry.device, entry.ndim) != (Tensor, *kind, 0) for entry in scalars):
        return None
    return torch.stack([*found, *scalars]).detach()


def _alike(tensors: list[Tensor]) -> bool:
    if len({(type(t), t.dtype, t.device, t.layout) for t in tensors}) != 1:
        return False
    return values_of(tensors[0]) is tensors[0]


def _norms(alike: list[Tensor]) -> list[Tensor]:
    # Half-precision norms overflow at 65504 on perfectly healthy gradients.
    half = alike[0].dtype in (torch.float16, torch.bfloat16)
    return list(torch._foreach_norm(alike, 2.0, torch.float32 if half else None))


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every element of every tensor is finite: one synchronisation, and an exact second look where it alarms."""
    tensors = list(tensors)
    found = norms(tensors)
    if found is None or math.isfinite(sum(found.tolist())):
        return True
    return all(finite_flags(tensors))


def finite_flags(tensors: Iterable[Tensor]) -> list[bool]:
    """For each tensor whether all its elements are finite, exactly; tensors that cannot hold NaN count as finite."""
    flags = []
    for tensor in tensors:
        values = values_of(tensor)
        flags.append(values is None or bool(torch.isfinite(values).all()))
    return flags


def nonfinite_names(named: Iterable[tuple[str, Tensor | None]]) -> list[str]:
    """The names of the tensors that hold a non-finite value, in order."""
    pairs = [(name, tensor) for name, tensor in named if tensor is not None]
    flags = finite_flags(tensor for _, tensor in pairs)
    return [name for (name, _), finite in zip(pairs, flags, strict=True) if not finite]


def values_of(tensor: Tensor) -> Tensor | None:
    """What of a tensor can be non-finite, in strided memory of this process; `None` where its dtype cannot hold a NaN."""
    if type(tensor) is Tensor and tensor.layout is torch.strided and tensor.is_floating_point():
        return tensor  # the common case, without any further question
    tensor = tensor.detach()
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return None
    if hasattr(tensor, "to_local"):  # a DTensor: each rank judges its own shard
        tensor = tensor.to_local()
    if tensor.layout is torch.sparse_coo:
        return tensor._values()
    if tensor.layout is not torch.strided and tensor.layout is not torch.jagged:
        return tensor.values()
    return tensor
