"""Differences of positive numbers, with the digits that the numbers themselves have.

The logarithm of a sum as large as e^60 is known to 2e-6 only, as are all numbers beside 60, so that a difference of two such
logarithms has lost what the difference of the sums themselves would have kept. Here each number is a factor of moderate size
times an exponential whose exponent is exact, or nearly so, such as the largest of the logits. Of a sum, the largest summand
is the factor, and the others are kept apart: where that is what is subtracted again, it leaves them as they are.

Of p = f e^l and q = g e^m, with d = m - l and r = g / f:

1. p - q = p (1 - r e^d), where the second is computed without anything large in between.
2. Of sums, p = (f + s) e^l and q = (g + t) e^m, p - q = (f - g e^d + s - t e^d) e^l, so that what is in both leaves no trace.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nanguard.stabilizer import scaled
from nanguard.stabilizer.scaled import Scaled

__all__ = [
    "Mantissa",
    "added",
    "difference",
    "logarithm_of_difference",
    "masked",
    "mean",
    "moved",
    "plus_constant",
    "product",
    "quotient",
    "shift",
    "sigmoid",
    "softmax",
    "total",
]

# Numbers that are further apart lose no digits to each other.
_HALF = 0.5
# What is left of a difference has no digits below the smallest number by this, and a reciprocal that overflows.
_UNDERFLOW = 1e-6
# The exponentials of larger ones go into the exponent.
_MODERATE = 30.0


class Mantissa(NamedTuple):
    """The number (factor + low) * exp(log), all of one shape; a factor of `None` is 1, and a `low` of `None` is 0."""

    log: Tensor
    factor: Tensor | None = None
    low: Tensor | None = None

    @property
    def whole(self) -> Scaled:
        """The same, in one."""
        return Scaled(self.log, self.factor if self.low is None else _factor(self) + self.low)

    @property
    def is_exact(self) -> bool:
        """Whether the exponent says it all."""
        return self.factor is None and self.low is None


class _Relation(NamedTuple):
    """Two numbers beside each other: q / p is a factor `ratio` times e^gap.

    Attributes:
        near: where they are within a factor of 2.
        far: where q is smaller than that.
    """

    gap: Tensor
    ratio: Tensor
    near: Tensor
    far: Tensor


def softmax(x: Tensor, dim: int) -> Mantissa:
    """The shares of exp(x) in its total along `dim`."""
    largest = x.detach().amax(dim, keepdim=True)
    log = x - largest.masked_fill(largest.isinf(), 0.0)
    total = torch.exp(log).sum(dim, keepdim=True)
    return Mantissa(log, total.masked_fill(total.detach() == 0, 1.0).reciprocal().expand_as(log))


def sigmoid(x: Tensor) -> Mantissa:
    """1 / (1 + e^-x) = e^min(x, 0) / (1 + e^-|x|)."""
    return Mantissa(x.clamp(max=0.0), torch.sigmoid(x.abs()))


def shift(a: Mantissa, other: float) -> Mantissa:
    """C p, given log c."""
    if abs(other) > _MODERATE:
        return Mantissa(a.log + other, a.factor, a.low)
    return _times(a, math.exp(other))


def mean(a: Mantissa, dim: tuple[int, ...], keepdim: bool, count: int) -> Mantissa:
    """The mean over `dim`, which have `count` elements in all."""
    return _times(total(a, dim, keepdim), 1 / count)


def total(a: Mantissa, dim: tuple[int, ...], keepdim: bool) -> Mantissa:
    """The sum over `dim`: of one dim, its largest summand and all others."""
    if len(dim) != 1 or a.low is not None:
        return Mantissa(*scaled.total(a.whole, dim, keepdim))
    place = a.log.detach().argmax(dim[0], keepdim=True)
    largest = a.log.detach().gather(dim[0], place)
    terms = torch.exp(a.log - largest.masked_fill(largest.isinf(), 0.0))
    terms = terms if a.factor is None else terms * a.factor
    low = terms.scatter(dim[0], place, 0.0).sum(dim, keepdim=keepdim)
    log = largest.masked_fill(largest == math.inf, 0.0).reshape(low.shape)
    return Mantissa(log, terms.gather(dim[0], place).reshape(low.shape), low)


def moved(function: Callable[..., Tensor], numbers: Sequence[Mantissa]) -> Mantissa:
    """What a function that only moves elements makes of numbers."""
    log = function(*(number.log for number in numbers))
    if all(number.is_exact for number in numbers):
        return Mantissa(log)
    factor = function(*map(_factor, numbers))
    if all(number.low is None for number in numbers):
        return Mantissa(log, factor)
    return Mantissa(log, factor, function(*map(_low, numbers)))


def product(a: Mantissa, b: Mantissa) -> Mantissa:
    """P q."""
    return Mantissa(*scaled.product(a.whole, b.whole))


def quotient(a: Mantissa, b: Mantissa) -> Mantissa:
    """P / q."""
    return Mantissa(*scaled.quotient(a.whole, b.whole))


def masked(a: Mantissa, mask: Tensor, value: float) -> Mantissa:
    """P, but the number with that logarithm where there is a mask."""
    return Mantissa(*scaled.masked(a.whole, mask, value))


def added(a: Mantissa, b: Mantissa) -> Mantissa:
    """P + q."""
    return Mantissa(*scaled.added(a.whole, b.whole))


def plus_constant(a: Mantissa, constant: float) -> Mantissa:
    """P + c."""
    log = a.log.detach()
    return added(a, Mantissa(torch.zeros_like(log), torch.full_like(log, constant)))


def logarithm_of_difference(a: Mantissa, b: Mantissa, log: Tensor) -> Tensor:
    """log(p - q), given log p; NaN where that is negative, and where it is 0, -inf with derivative 0."""
    relation = _relation(a, b)
    gap, ratio, near, far = relation
    left = _left(a, b, relation)
    none = left.detach().abs() < torch.finfo(left.dtype).tiny / _UNDERFLOW
    close = left.masked_fill(none, 1.0).log().masked_fill(none, -math.inf)
    little = torch.log1p(-torch.exp(torch.where(far, gap, 0.0)) * torch.where(far, ratio, 0.0))
    start = log if _is_relative(a, b) else a.log
    result = torch.where(near, start + close, log + little)
    return result.masked_fill(~(near | far), math.nan)


def difference(a: Mantissa, b: Mantissa, logs: tuple[Tensor, Tensor]) -> Scaled:
    """P - q, given log p and log q: the larger times what the smaller leaves of it."""
    relation = _relation(a, b)
    gap, ratio, near, far = relation
    beyond, close = ~(near | far), _left(a, b, relation)
    smaller = 1.0 - torch.exp(torch.where(far, gap, 0.0)) * torch.where(far, ratio, 0.0)
    inverse = torch.where(beyond & (ratio.detach() != 0), ratio, 1.0).reciprocal()
    larger = torch.exp(torch.where(beyond, -gap, 0.0)) * inverse.masked_fill(~beyond, 0.0) - 1.0
    start = logs[0] if _is_relative(a, b) else torch.where(near, a.log, logs[0])
    factor = torch.where(near, close, torch.where(far, smaller, larger))
    return Scaled(torch.where(beyond, logs[1], start), factor + 0.0)  # no -0, whose reciprocal has the other sign


def _is_relative(a: Mantissa, b: Mantissa) -> bool:
    """Whether 1 - q / p is what is computed, and not p - q: factors that are the same fall out of its derivative."""
    return a.low is None and b.low is None


def _relation(a: Mantissa, b: Mantissa) -> _Relation:
    first, second = a.whole, b.whole
    log, other, one, two = torch.broadcast_tensors(first.log, second.log, _factor(first), _factor(second))
    # Infinities of the same sign have no gap.
    equal = (log.detach() == other.detach()) & log.detach().isinf()
    gap = (other - log.masked_fill(equal, 0.0)).masked_fill(equal, 0.0)
    ratio = two / one.masked_fill(one.detach() == 0, 1.0)
    size = torch.exp(gap.detach()) * ratio.detach()
    return _Relation(gap, ratio, (size > _HALF) & (size < 1 / _HALF), size <= _HALF)


def _left(a: Mantissa, b: Mantissa, relation: _Relation) -> Tensor:
    """What q leaves of p where they are near each other, by p or by e^l, and 0 elsewhere."""
    near = relation.near
    gap = torch.where(near, relation.gap, 0.0)
    one, other, low, lower = (
        part.expand(near.shape).masked_fill(~near, fill)
        for part, fill in ((_factor(a), 1.0), (_factor(b), 1.0), (_low(a), 0.0), (_low(b), 0.0))
    )
    if _is_relative(a, b):
        return _without(torch.ones_like(one), other / one, (one - other) / one, gap)
    return _without(one, other, one - other, gap) + (low - lower * torch.exp(gap))


def _without(one: Tensor, other: Tensor, rest: Tensor, gap: Tensor) -> Tensor:
    """The number f - g e^d, given f - g: nothing in between is larger than f, and all is exact where f and g are the same."""
    below = gap.detach() <= 0
    down, up = torch.where(below, gap, 0.0), torch.where(below, 0.0, gap)
    return torch.where(below, rest * torch.exp(down) - one * torch.expm1(down), rest - other * torch.expm1(up))


def _times(a: Mantissa, constant: float) -> Mantissa:
    return Mantissa(a.log, _factor(a) * constant, None if a.low is None else a.low * constant)


def _factor(a: Mantissa | Scaled) -> Tensor:
    return torch.ones_like(a.log.detach()) if a.factor is None else a.factor


def _low(a: Mantissa) -> Tensor:
    return torch.zeros_like(a.log.detach()) if a.low is None else a.low
