"""Stable functions of logarithms that torch lacks, or whose derivative in torch is NaN at -inf.

`l` is the logarithm of a tensor throughout; every function takes and gives real floating tensors of any shape, and its
derivative is never NaN at l = -inf, which stands for a probability of exactly 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "cat",
    "clamp_max",
    "clamp_min",
    "floor_zero",
    "index",
    "logaddexp",
    "logmeanexp",
    "logsumexp",
    "plus_constant",
    "reshape",
    "sigmoid",
    "stack",
]


def logsumexp(l: Tensor, dim: tuple[int, ...], keepdim: bool = False) -> Tensor:  # noqa: E741
    """The logarithm of sum exp(l) over `dim`. Where all of l is -inf, the result is -inf and the derivative 0 (torch: NaN).

    The result shares no memory with `l`, and no derivative has saved `l` itself.
    """
    dead = l.detach().amax(dim, keepdim=True) == -math.inf
    total = torch.logsumexp(l.masked_fill(dead, 0.0), dim, keepdim)
    return total.masked_fill(dead if keepdim else _squeezed(dead, dim), -math.inf)


def logmeanexp(l: Tensor, dim: tuple[int, ...], keepdim: bool = False, *, count: int) -> Tensor:  # noqa: E741
    """The logarithm of mean exp(l) over `dim`, which have `count` elements in all; otherwise as `logsumexp`."""
    return logsumexp(l, dim, keepdim) - math.log(count)


def logaddexp(l: Tensor, m: Tensor) -> Tensor:  # noqa: E741
    """The logarithm of exp(l) + exp(m), with broadcasting. Where both are -inf, so is it, with derivative 0 (torch: NaN)."""
    swap = m.detach() > l.detach()
    high, low = torch.where(swap, m, l), torch.where(swap, l, m)
    gap = low - high
    # Infinities of the same sign have no gap.
    gap = torch.where(gap.detach().isnan() & (high.detach() == low.detach()), 0.0, gap)
    # log(1 + e^gap). The second derivative of torch.logaddexp is NaN where the gap is wide.
    return high - torch.nn.functional.logsigmoid(-gap)


def plus_constant(l: Tensor, constant: float) -> Tensor:  # noqa: E741
    """The logarithm of exp(l) + constant for a constant above 0."""
    return logaddexp(l, l.new_full((), math.log(constant)))


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), whose derivative keeps its digits where the sigmoid rounds to 1 (that of torch is 0 there)."""
    positive = x.detach() >= 0
    small = torch.exp(torch.where(positive, -x, x))
    return torch.where(positive, 1.0, small) / (1.0 + small)


def clamp_min(l: Tensor, constant: float) -> Tensor:  # noqa: E741
    """The logarithm of exp(l) bounded from below by a constant above 0."""
    return torch.clamp(l, min=math.log(constant))


def clamp_max(l: Tensor, constant: float) -> Tensor:  # noqa: E741
    """The logarithm of exp(l) bounded from above by a constant above 0."""
    return torch.clamp(l, max=math.log(constant))


def floor_zero(l: Tensor, constant: float) -> Tensor:  # noqa: E741
    """`l`, but log(constant) with derivative 0 where l is -inf."""
    return l.masked_fill(l.detach() == -math.inf, math.log(constant))


def reshape(l: Tensor, sizes: tuple[int, ...]) -> Tensor:  # noqa: E741
    """The same elements in the same order, in another shape."""
    return l.reshape(sizes)


def cat(*parts: Tensor, dim: int) -> Tensor:
    """The parts one after the other."""
    return torch.cat(parts, dim)


def stack(*parts: Tensor, dim: int) -> Tensor:
    """The parts side by side, along a new dim."""
    return torch.stack(parts, dim)


def index(l: Tensor, key: Any) -> Tensor:  # noqa: E741
    """`l[key]`."""
    return l[key]


def _squeezed(mask: Tensor, dim: tuple[int, ...]) -> Tensor:
    return mask.reshape([size for place, size in enumerate(mask.shape) if place not in dim])
