"""Exponentials and sigmoids with derivatives that torch's own do not have."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from nanguard.stabilizer import environment

__all__ = ["exponential", "ratio", "sigmoid", "weighted"]


def exponential(l: Tensor) -> Tensor:  # noqa: E741
    """exp(l), whose derivative is 0 where nobody asks for one (that of torch is 0 * inf = NaN where exp(l) is inf)."""
    if environment.in_transform():
        return torch.exp(l)
    result: Tensor = _Exponential.apply(l)  # type: ignore[no-untyped-call]
    return result


@final
class _Exponential(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, l: Tensor) -> Tensor:  # noqa: E741
        result = torch.exp(l)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (result,) = ctx.saved_tensors
        derivative: Tensor = grad * result.masked_fill(grad == 0, 0.0)
        return derivative


def weighted(value: Tensor, weight: Tensor) -> Tensor:
    """A weight times what may be infinite, whose derivative at the weight is 0 where nobody asks for one (torch: NaN).

    Beyond a mask nobody does; the same is true of `torch.xlogy`.
    """
    if not weight.requires_grad or environment.in_transform():
        return weight * value
    result: Tensor = _Weighted.apply(*torch.broadcast_tensors(value, weight))  # type: ignore[no-untyped-call]
    return result


@final
class _Weighted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(value, weight)
        return weight * value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        value, weight = ctx.saved_tensors
        return grad * weight, grad * value.masked_fill(grad == 0, 0.0)


def ratio(above: Tensor, below: Tensor) -> Tensor:
    """The quotient, whose derivative at what is below is 0 where 0 stands above, whatever arrives (torch: NaN for inf)."""
    if not (above.requires_grad and below.requires_grad) or environment.in_transform():
        return above / below
    result: Tensor = _Ratio.apply(*torch.broadcast_tensors(above, below))  # type: ignore[no-untyped-call]
    return result


@final
class _Ratio(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, above: Tensor, below: Tensor) -> Tensor:
        ctx.save_for_backward(above, below)
        return above / below

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        above, below = ctx.saved_tensors
        nothing = (above == 0) & ~grad.isfinite()
        return grad / below, -(grad.masked_fill(nothing, 0.0) * (above / below)) / below


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), whose derivative keeps its digits where the sigmoid rounds to 1 (that of torch is 0 there)."""
    if not environment.is_surrounded():
        result: Tensor = _Sigmoid.apply(x)  # type: ignore[no-untyped-call]
        return result
    positive = x.detach() >= 0
    small = torch.exp(torch.where(positive, -x, x))
    return torch.where(positive, 1.0, small) / (1.0 + small)


@final
class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        small = x.abs().neg_().exp_()
        result = torch.where(x >= 0, 1.0, small)
        return result.div_(small.add_(1.0))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return grad * torch.sigmoid(x) * torch.sigmoid(-x)
        small = x.abs().neg_().exp_()
        return grad * torch.square(small + 1.0).reciprocal_().mul_(small)
