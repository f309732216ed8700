"""The cheap alarm: are a loss and all its gradients finite? One fused check, one device synchronisation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["all_finite", "finite_flags", "nonfinite_names", "norms", "small_total"]

# Below so many elements, in so few tensors, calls of kernels cost more than what they do.
_SMALL, _FEW = 65536, 16


def small_total(tensors: Sequence[Tensor]) -> float | None:
    """The sum of all elements of a few small tensors on the CPU, which is finite only if each of them is; elsewhere `None`.

    It may overflow, or be NaN, on finite values that are very large: a suspicion, as with `norms`.
    """
    if len(tensors) > _FEW:
        return None
    total = 0.0
    for tensor in tensors:
        plain = type(tensor) is Tensor and tensor.is_cpu and tensor.layout is torch.strided
        if not plain or tensor.dtype not in _FULL or tensor.numel() > _SMALL:
            return None
        total += tensor.sum().item()
    return total


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
    if len({(type(t), t.dtype, t.device, t.layout) for t in tensors}) == 1 and _values(tensors[0]) is tensors[0]:
        return _norms(tensors).detach()  # the common case: all alike, and nothing to ask about each of them
    with torch.no_grad():
        groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for tensor in tensors:
            values = _values(tensor)
            if values is not None:
                groups.setdefault((values.device, values.dtype), []).append(values)
        if not groups:
            return None
        stacked = [_norms(group) for group in groups.values()]
        if len(stacked) == 1:
            return stacked[0]
        return torch.cat([part.to(stacked[0].device, torch.float64) for part in stacked])


def _norms(alike: list[Tensor]) -> Tensor:
    if alike[0].dtype in (torch.float16, torch.bfloat16):
        # Half-precision norms overflow at 65504 on perfectly healthy gradients.
        return torch.stack(torch._foreach_norm(alike, 2.0, torch.float32))
    return torch.stack(torch._foreach_norm(alike, 2.0))


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
        values = _values(tensor)
        flags.append(values is None or bool(torch.isfinite(values).all()))
    return flags


def nonfinite_names(named: Iterable[tuple[str, Tensor | None]]) -> list[str]:
    """The names of the tensors that hold a non-finite value, in order."""
    pairs = [(name, tensor) for name, tensor in named if tensor is not None]
    flags = finite_flags(tensor for _, tensor in pairs)
    return [name for (name, _), finite in zip(pairs, flags, strict=True) if not finite]


def _values(tensor: Tensor) -> Tensor | None:
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
