"""A stable value in the place of a naive one, for values and for derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from nanguard.stabilizer import environment

__all__ = ["Derivative", "Function", "graft", "graft_in_place", "is_worse", "may_be_overwritten"]

Function = Callable[[Tensor], Tensor]
Derivative = Callable[[Tensor, Tensor], Tensor]


def graft(
    naive: Tensor, stable: Tensor, dtype: torch.dtype, fresh: bool, slope: Derivative | None, plain: Function
) -> Tensor:
    """`stable` as a function of the naive tensor that the user's code computed it from.

    Arguments:
        naive: what the user's code computed, such as the argument of the logarithm.
        stable: the value that takes the place of f(naive), of the same shape.
        dtype: of the result.
        fresh: whether `stable` is memory of its own.
        slope: the gradient at `naive`, of the gradient of the result and `naive`; `None` where f is the identity.
        plain: f itself; it stands where the stable value is NaN, as where a logit is +inf.

    The result is memory of its own, laid out as elementwise functions of `naive` are. Derivatives flow through `stable`, and
    through `naive` only where somebody asks for the derivative at an intermediate that `stable` does not come
    from. One call that asks for both at once gets the former only, and torch then raises that the intermediate is unused.
    """
    if not (torch.is_grad_enabled() and stable.requires_grad):
        return _laid_out(naive, stable, dtype, fresh, plain)[0]
    result: Tensor = _Graft.apply(naive, stable, stable.grad_fn, dtype, fresh, slope, plain)  # type: ignore[no-untyped-call]
    return result


def graft_in_place(naive: Tensor, stable: Tensor, slope: Derivative | None) -> Tensor:
    """Like `graft`, but written into `naive`, which must be no view where derivatives are recorded."""
    if not (torch.is_grad_enabled() and stable.requires_grad):
        return naive.copy_(stable)
    result: Tensor = _GraftInPlace.apply(naive, stable, stable.grad_fn, slope)  # type: ignore[no-untyped-call]
    return result


def may_be_overwritten(tensor: Tensor) -> bool:
    """Whether `graft_in_place` may write into it."""
    if environment.in_transform() or tensor._base is not None:
        return False
    return not (tensor.requires_grad and tensor.is_leaf)


def _laid_out(
    naive: Tensor, stable: Tensor, dtype: torch.dtype, fresh: bool, plain: Function
) -> tuple[Tensor, Tensor | None]:
    if _is_watched():
        result = torch.empty_like(naive, dtype=dtype, requires_grad=False)
        result = _with_strides_of(result, stable.to(dtype, copy=True))
    elif naive.is_contiguous() and stable.stride() == naive.stride():
        result = stable if fresh and stable.dtype == dtype else stable.to(dtype, copy=True)
    else:
        result = torch.empty_like(naive, dtype=dtype, requires_grad=False)
        if fresh and stable.dtype == dtype and stable.stride() == result.stride():
            result = stable
        else:
            result.copy_(stable)
    return _without_new_nan(result, naive, plain)


def is_worse(stable: Tensor, naive: Tensor, plain: Function) -> bool:
    """Whether the stable value is not finite somewhere where the plain one is."""
    return _without_new_nan(stable.clone(), naive, plain)[1] is not None


def _without_new_nan(result: Tensor, naive: Tensor, plain: Function) -> tuple[Tensor, Tensor | None]:
    """The plain value where the stable one is NaN, or infinite although the plain one is not: digits are lost in both.

    The second is where that made something finite.
    """
    if result.device.type == "cpu":  # elsewhere the question would wait for the device
        if math.isfinite(result.sum().item()):
            return result, None  # one pass, and no memory
        if bool(result.isfinite().all()):
            return result, None
    with torch._C.DisableTorchFunction():
        original = plain(naive).to(result.dtype)
        worse = result.isnan() | (result.isinf() & original.isfinite())
        repaired = torch.where(worse, original, result)
        finite = worse & original.isfinite()
        repaired = repaired if _is_watched() else result.copy_(repaired)
        return repaired, finite if bool(finite.any()) else None


def _is_watched() -> bool:
    """Whether a selective checkpoint may have kept what operations returned, for its recomputation: it must not be edited."""
    return torch._C._len_torch_dispatch_stack() > 0


def _with_strides_of(template: Tensor, tensor: Tensor) -> Tensor:
    order = sorted(range(template.ndim), key=template.stride, reverse=True)
    dense = tensor.permute(order).contiguous()
    # A view that a function of its own returns could not be edited in place.
    return dense.permute([order.index(dim) for dim in range(template.ndim)]).clone()


def _prepare(ctx: Any, naive: Tensor, node: Any, slope: Derivative | None, repaired: Tensor | None = None) -> None:
    ctx.node, ctx.slope, ctx.repaired = node, slope, repaired
    # What nobody asks about stays undefined: as zeros it would be multiplied by infinities further down.
    ctx.set_materialize_grads(False)
    if slope is not None:
        ctx.save_for_backward(naive)


def _split(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if grad is None:
        return None, None
    # The engine is asked, not ctx.needs_input_grad, which says what was recorded, not what this backward pass is after.
    if torch._C._will_engine_execute_node(ctx.node):
        return (None, grad) if ctx.repaired is None else _shared(ctx, grad, ctx.repaired)
    if ctx.slope is None:
        return grad, None
    (naive,) = ctx.saved_tensors
    with torch._C.DisableTorchFunction():
        return ctx.slope(grad, naive), None


def _shared(ctx: Any, grad: Tensor, repaired: Tensor) -> tuple[Tensor | None, Tensor]:
    """Where the plain value stands, its derivative does as well, by way of the naive tensor."""
    own = grad.masked_fill(~repaired, 0.0)
    if ctx.slope is not None:
        (naive,) = ctx.saved_tensors
        with torch._C.DisableTorchFunction():
            own = ctx.slope(own, naive.masked_fill(~repaired, 1.0)).masked_fill(~repaired, 0.0)
    return own, grad.masked_fill(repaired, 0.0)


@final
class _Graft(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        naive: Tensor,
        stable: Tensor,
        node: Any,
        dtype: torch.dtype,
        fresh: bool,
        slope: Derivative | None,
        plain: Function,
    ) -> Tensor:
        result, repaired = _laid_out(naive, stable, dtype, fresh, plain)
        if repaired is not None and not bool(naive.isfinite().all()):
            repaired = None  # what has overflowed elsewhere would make NaN of a derivative of 0
        _prepare(ctx, naive, node, slope, repaired)
        if result is stable:
            # Handed on as it is, it would count as a view, which could not be edited in place.
            ctx.mark_dirty(stable)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        return (*_split(ctx, grad), None, None, None, None, None)


@final
class _GraftInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, naive: Tensor, stable: Tensor, node: Any, slope: Derivative | None) -> Tensor:
        _prepare(ctx, naive if slope is None else naive.clone(), node, slope)
        ctx.mark_dirty(naive)
        return naive.copy_(stable)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        return (*_split(ctx, grad), None, None)
