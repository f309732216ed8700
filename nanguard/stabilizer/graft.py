"""A stable value in the place of a naive one, for values and for derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

__all__ = ["graft", "graft_in_place"]

Derivative = Callable[[Tensor], Tensor]


def graft(naive: Tensor, stable: Tensor, like: Tensor, dtype: torch.dtype, fresh: bool, slope: Derivative) -> Tensor:
    """`stable` as a function of the naive tensor that the user's code computed it from.

    Arguments:
        naive: what the user's code computed, such as the argument of the logarithm.
        stable: the value that takes the place of f(naive), of the same shape.
        like: a tensor with the strides of the result.
        dtype: of the result.
        fresh: whether `stable` is memory of its own.
        slope: the derivative f' at `naive`.

    The result is memory of its own, laid out as elementwise functions of `like` are. Derivatives flow through `stable`, and
    through `naive` only where somebody asks for the derivative at an intermediate that `stable` does not come
    from. One call that asks for both at once gets the former only, and torch then raises that the intermediate is unused.
    """
    if not (torch.is_grad_enabled() and stable.requires_grad):
        return _laid_out(stable, like, dtype, fresh)
    result: Tensor = _Graft.apply(naive, stable, stable.grad_fn, like, dtype, fresh, slope)  # type: ignore[no-untyped-call]
    return result


def graft_in_place(naive: Tensor, stable: Tensor, slope: Derivative) -> Tensor:
    """Like `graft`, but written into `naive`, which must be no view where derivatives are recorded."""
    if not (torch.is_grad_enabled() and stable.requires_grad):
        return naive.copy_(stable)
    result: Tensor = _GraftInPlace.apply(naive, stable, stable.grad_fn, slope)  # type: ignore[no-untyped-call]
    return result


def _laid_out(stable: Tensor, like: Tensor, dtype: torch.dtype, fresh: bool) -> Tensor:
    result = torch.empty_like(like, dtype=dtype, requires_grad=False)
    if fresh and stable.dtype == dtype and stable.stride() == result.stride():
        return stable
    return result.copy_(stable)


def _split(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    # The engine is asked, not ctx.needs_input_grad, which says what was recorded, not what this backward pass is after.
    if torch._C._will_engine_execute_node(ctx.node):
        return None, grad
    (naive,) = ctx.saved_tensors
    with torch._C.DisableTorchFunction():
        return grad * ctx.slope(naive), None


@final
class _Graft(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        naive: Tensor,
        stable: Tensor,
        node: Any,
        like: Tensor,
        dtype: torch.dtype,
        fresh: bool,
        slope: Derivative,
    ) -> Tensor:
        ctx.node, ctx.slope = node, slope
        ctx.save_for_backward(naive)
        result = _laid_out(stable, like, dtype, fresh)
        if result is stable:
            # Handed on as it is, it would count as a view, which could not be edited in place.
            ctx.mark_dirty(stable)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return (*_split(ctx, grad), None, None, None, None, None)


@final
class _GraftInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, naive: Tensor, stable: Tensor, node: Any, slope: Derivative) -> Tensor:
        ctx.node, ctx.slope = node, slope
        ctx.save_for_backward(naive.clone())
        ctx.mark_dirty(naive)
        return naive.copy_(stable)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return (*_split(ctx, grad), None, None)
