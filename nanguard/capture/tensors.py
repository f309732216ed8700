"""One tensor on disk: its exact bits, and what else makes a computation on it come out the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Unstorable", "pack", "unpack"]

# What every safetensors reader knows; the rest is stored as integers of the same width, or as real numbers.
_NATIVE = frozenset(
    [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    ]
)
_BY_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SPARSE = {
    torch.sparse_csr: ("crow_indices", "col_indices"),
    torch.sparse_csc: ("ccol_indices", "row_indices"),
    torch.sparse_bsr: ("crow_indices", "col_indices"),
    torch.sparse_bsc: ("ccol_indices", "row_indices"),
}
# A slice of a huge tensor is not worth its gaps, and a damaged file must not ask for a huge allocation.
_WIDEST_GAPS = 64


class Unstorable(Exception):
    """A value cannot be stored; the message is the reason."""


def pack(tensor: Tensor, put: Callable[[Tensor, str], str]) -> dict[str, Any]:
    """The JSON description of a tensor of any shape, dtype, device and layout; its bits go through `put`.

    Args:
        tensor: any plain tensor or parameter.
        put: called with a contiguous CPU tensor of a dtype that safetensors knows, and a suffix; returns the name that it
            is stored under.

    Raises:
        Unstorable: where the tensor is of an unknown subclass, quantized, nested, on the meta device or of an unknown dtype.
    """
    _refuse(tensor)
    node: dict[str, Any] = {"kind": "tensor", "shape": list(tensor.shape), "dtype": str(tensor.dtype)[6:]}
    node["device"] = str(tensor.device)
    if tensor.requires_grad:
        node["requires_grad"] = True
    if isinstance(tensor, torch.nn.Parameter):
        node["parameter"] = True
    plain = tensor.detach()
    node.update(_counts(plain))
    if plain.layout is torch.strided:
        node.update(_pack_dense(plain, put, ""))
    else:
        node["layout"] = str(plain.layout)[6:]
        node["parts"] = {
            name: _pack_dense(part.clone(memory_format=torch.contiguous_format), put, f".{name}")
            for name, part in _parts(plain).items()
        }
        if plain.layout is torch.sparse_coo:
            node["coalesced"] = plain.is_coalesced()
    return node


def unpack(node: dict[str, Any], get: Callable[[str], Tensor]) -> Tensor:
    """The inverse of `pack`, on the CPU. Shares no memory with what `get` returns.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: where the description is damaged.
    """
    dtype, shape = getattr(torch, node["dtype"]), node["shape"]
    if not isinstance(dtype, torch.dtype) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"found dtype {node['dtype']!r} and shape {shape!r}; expected those of a tensor")
    tensor = (_unpack_sparse if "layout" in node else _unpack_dense)(node, dtype, shape, get)
    if node.get("parameter"):
        return torch.nn.Parameter(tensor, requires_grad=bool(node.get("requires_grad")))
    return tensor.requires_grad_(bool(node.get("requires_grad")))


def _refuse(tensor: Tensor) -> None:
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        raise Unstorable("a tensor subclass that captures do not know")
    if tensor.is_quantized:
        raise Unstorable("a quantized tensor")
    if tensor.is_nested:
        raise Unstorable("a nested tensor")
    if tensor.device.type == "meta":
        raise Unstorable("a tensor on the meta device has no values")
    if tensor.layout is not torch.strided and tensor.layout is not torch.sparse_coo and tensor.layout not in _SPARSE:
        raise Unstorable(f"a tensor of layout {tensor.layout}")
    if _is_wrapped(tensor):
        raise Unstorable("a tensor inside a function transform has no values of its own")


def _is_wrapped(tensor: Tensor) -> bool:
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def _counts(tensor: Tensor) -> dict[str, int]:
    """How many elements are not finite, so that a capture can be shown without reading its tensors."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return {}
    values = tensor if tensor.layout is torch.strided else _parts(tensor)["values"]
    try:
        nan, infinite = int(torch.isnan(values).sum()), int(torch.isinf(values).sum())
    except (RuntimeError, NotImplementedError):  # float8 has no such kernels everywhere
        wide = values.to(torch.float32)
        nan, infinite = int(torch.isnan(wide).sum()), int(torch.isinf(wide).sum())
    return {key: count for key, count in (("nan", nan), ("inf", infinite)) if count}


def _parts(tensor: Tensor) -> dict[str, Tensor]:
    if tensor.layout is torch.sparse_coo:
        return {"indices": tensor._indices(), "values": tensor._values()}
    outer, inner = _SPARSE[tensor.layout]
    return {"outer": getattr(tensor, outer)(), "inner": getattr(tensor, inner)(), "values": tensor.values()}


def _pack_dense(tensor: Tensor, put: Callable[[Tensor, str], str], suffix: str) -> dict[str, Any]:
    node: dict[str, Any] = {}
    shape, strides = tuple(tensor.shape), tuple(tensor.stride())
    if strides != _contiguous_strides(shape):
        if _restorable(shape, strides):
            node["stride"] = list(strides)
        for dim, (size, stride) in enumerate(zip(shape, strides, strict=True)):
            if stride == 0 and size > 1 and "stride" in node:
                tensor = tensor.narrow(dim, 0, 1)
    values = tensor.resolve_conj().resolve_neg().cpu().contiguous()
    if values.dtype not in _NATIVE:
        values = _as_native(values)
    node["name"] = put(values, suffix)
    return node


def _as_native(values: Tensor) -> Tensor:
    try:
        return torch.view_as_real(values) if values.is_complex() else values.view(_BY_WIDTH[values.dtype.itemsize])
    except (RuntimeError, KeyError, NotImplementedError):
        raise Unstorable(f"a tensor of dtype {values.dtype}") from None


def _unpack_dense(node: dict[str, Any], dtype: torch.dtype, shape: list[int], get: Callable[[str], Tensor]) -> Tensor:
    strides = node.get("stride")
    once = list(shape)
    if strides is not None:
        if not _restorable(tuple(shape), tuple(strides)):
            raise ValueError(f"found strides {strides} for shape {shape}")
        once = [1 if stride == 0 and size > 1 else size for size, stride in zip(shape, strides, strict=True)]
    stored = get(node["name"])
    native = dtype if dtype in _NATIVE else dtype.to_real() if dtype.is_complex else _BY_WIDTH[dtype.itemsize]
    expected = (*once, 2) if dtype.is_complex else tuple(once)
    if stored.dtype != native or stored.shape != expected:
        raise ValueError(f"found {stored.dtype} {tuple(stored.shape)}; expected {native} {expected}")
    # A copy of its own: memory that the allocator aligned, as the original's was, and nobody else's.
    values = torch.empty_strided(
        once, strides if strides is not None else _contiguous_strides(tuple(once)), dtype=dtype
    )
    (values if dtype in _NATIVE else _as_native(values)).copy_(stored)
    return values.expand(shape) if once != list(shape) else values


def _unpack_sparse(node: dict[str, Any], dtype: torch.dtype, shape: list[int], get: Callable[[str], Tensor]) -> Tensor:
    parts = {name: get(part["name"]) for name, part in node["parts"].items()}
    tensors = {name: part.clone() for name, part in parts.items()}
    if dtype not in _NATIVE:
        raw = tensors["values"]
        tensors["values"] = torch.view_as_complex(raw) if dtype.is_complex else raw.view(dtype)
    layout = getattr(torch, node["layout"])
    # Indices out of range would read foreign memory later on.
    if layout is torch.sparse_coo:
        return torch.sparse_coo_tensor(
            tensors["indices"],
            tensors["values"],
            shape,
            is_coalesced=bool(node.get("coalesced")),
            check_invariants=True,
        )
    if layout not in _SPARSE:
        raise ValueError(f"found layout {node['layout']!r}")
    return torch.sparse_compressed_tensor(
        tensors["outer"], tensors["inner"], tensors["values"], shape, layout=layout, check_invariants=True
    )


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _restorable(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether strides can be rebuilt: no two elements share a place, apart from expanded dimensions, and no wide gaps."""
    if len(shape) != len(strides) or not all(type(stride) is int and 0 <= stride < 2**62 for stride in strides):
        return False
    span, numel = 1, 1
    for stride, size in sorted(
        (stride, size) for stride, size in zip(strides, shape, strict=True) if size > 1 and stride
    ):
        if stride < span:
            return False
        span += (size - 1) * stride
        numel *= size
    return span <= _WIDEST_GAPS * numel
