"""Numbers of either sign, far beyond the range of floats: a factor times an exponential.

A `Scaled` stands for factor * exp(log). Which part of a number stands in the factor and which in the exponent is free, and
never shows in values or derivatives. So sums are formed after their largest exponent has been taken out, as logsumexp does,
with weights of either sign, and quotients of sums lose nothing to the size of their exponents.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanguard.stabilizer import environment
from nanguard.stabilizer.exponentials import exponential, ratio, weighted
from nanguard.stabilizer.exponents import (
    hidden_in,
    is_differentiated,
    kept,
    larger,
    largest,
    may_be_zero,
    over,
    vanishing,
)

__all__ = [
    "Scaled",
    "difference",
    "logarithm",
    "logarithm_of_complement",
    "logarithm_of_difference",
    "logarithm_of_sum",
    "masked",
    "moved",
    "multiplied",
    "number",
    "product",
    "product_of",
    "quotient",
    "running_product",
    "running_total",
    "settled",
    "shares",
    "total",
    "weighed",
]


# Smaller factors are left over from a sum whose largest part cancelled, or weighed nothing.
_TINY = 1e-9
# What is added to 1, and its logarithm taken: beyond this, the sum itself has as many digits.
_LITTLE = 0.5


class Scaled(NamedTuple):
    """The number factor * exp(log), both of one shape; a factor of `None` is 1."""

    log: Tensor
    factor: Tensor | None = None


def logarithm(number: Scaled, *, floor: bool = False) -> Tensor:
    """The logarithm, which is NaN for negative numbers, or -inf with `floor`. At 0 it is -inf with derivative 0."""
    log, factor = number
    if factor is None:
        return log
    if floor:
        factor = factor.clamp(min=0)
    zero = factor.detach() == 0
    return log + factor.masked_fill(zero, 1.0).log().masked_fill(zero, -math.inf)


def moved(function: Callable[..., Tensor], numbers: list[Scaled]) -> Scaled:
    """What a function that only moves elements makes of numbers."""
    logs = function(*(number.log for number in numbers))
    if all(number.factor is None for number in numbers):
        return Scaled(logs)
    return Scaled(logs, function(*(_factor(number) for number in numbers)))


def product(a: Scaled, b: Scaled) -> Scaled:
    """P q."""
    log = a.log + b.log
    if a.factor is None or b.factor is None:
        return _of(log, a.factor if b.factor is None else b.factor)
    return Scaled(log, a.factor * b.factor)


def quotient(a: Scaled, b: Scaled) -> Scaled:
    """P / q."""
    b = _settled(b)
    log = a.log - b.log
    if b.factor is None:
        return _of(log, a.factor)
    return _of(log, b.factor.reciprocal() if a.factor is None else ratio(a.factor, b.factor))


def _settled(number: Scaled) -> Scaled:
    """The same number, with a tiny factor moved into the exponent: the derivative of its reciprocal would overflow."""
    return settled(number, _TINY)


def settled(number: Scaled, least: float = math.inf) -> Scaled:
    """The same number, with factors of at most that size moved into the exponent: what is left of them is their sign."""
    log, factor = number
    if factor is None:
        return number
    size = factor.detach().abs()
    size = size.masked_fill((size == 0) | (size > least) | size.isinf(), 1.0)
    return Scaled(log + size.log(), factor / size)


def power(a: Scaled, exponent: int) -> Scaled:
    """The power p^k of a positive integer k."""
    return Scaled(exponent * a.log, None if a.factor is None else a.factor**exponent)


def weighed(a: Scaled, weight: Tensor) -> Scaled:
    """W p."""
    log, weight = torch.broadcast_tensors(a.log, weight)
    if not is_differentiated(weight):  # what weighs nothing is nothing to compare others to
        log = log.masked_fill(weight == 0, -math.inf)
    return Scaled(log, weight if a.factor is None else a.factor * weight)


def masked(a: Scaled, mask: Tensor, value: float) -> Scaled:
    """P, but the number with that logarithm where there is a mask."""
    factor = None if a.factor is None else a.factor.masked_fill(mask, 1.0)
    return Scaled(a.log.masked_fill(mask, value), factor)


def multiplied(a: Scaled, dim: tuple[int, ...], keepdim: bool) -> Scaled:
    """The product over `dim`."""
    log, sign = _with_signs(a)
    return Scaled(log.sum(dim, keepdim=keepdim), _product(sign, dim, keepdim))


def running_product(a: Scaled, dim: int) -> Scaled:
    """The cumulated product along `dim`."""
    log, sign = _with_signs(a)
    return Scaled(log.cumsum(dim), sign.cumprod(dim))


def product_of(x: Tensor, dim: tuple[int, ...], keepdim: bool) -> Scaled:
    """The product over `dim` of numbers that are given as they are."""
    return multiplied(Scaled(torch.zeros_like(x.detach()), x), dim, keepdim)


def _with_signs(a: Scaled) -> tuple[Tensor, Tensor]:
    """The logarithm of the magnitude, and the sign; a factor of 0 is a sign, as its logarithm would have no derivative."""
    factor = _factor(a)
    sign = torch.where(factor.detach() < 0, -1.0, 1.0).to(factor.dtype)
    if not may_be_zero(factor):
        return a.log + (factor * sign).log(), sign
    zero = factor.detach() == 0
    return a.log + (factor * sign).masked_fill(zero, 1.0).log(), torch.where(zero, factor, sign)


def _product(factor: Tensor, dims: tuple[int, ...], keepdim: bool) -> Tensor:
    for dim in sorted(dims, reverse=True):
        factor = factor.prod(dim, keepdim=keepdim)
    return factor


def negative(a: Scaled) -> Scaled:
    """-p."""
    return Scaled(a.log, -_factor(a))


def total(a: Scaled, dim: tuple[int, ...], keepdim: bool) -> Scaled:
    """The sum over `dim`."""
    hidden = hidden_in(a)
    most = largest(a, dim, hidden)
    factor = over(a, most, hidden).sum(dim, keepdim=keepdim)
    return Scaled(kept(most).reshape(factor.shape), factor)


def shares(a: Scaled, dim: tuple[int, ...]) -> Tensor:
    """What each is of the sum over `dim`, in one go: what their derivatives have in common cancels before it overflows."""
    hidden = hidden_in(a)
    part = over(a, largest(a, dim, hidden), hidden)
    size = part.detach().sum(dim, keepdim=True).abs()
    part = part / size.masked_fill((size == 0) | (size > _TINY), 1.0)
    return part / part.sum(dim, keepdim=True)


def running_total(a: Scaled, dim: int) -> Scaled:
    """The cumulated sum along `dim`; what comes before its largest part, and would vanish beside it, is summed apart."""
    hidden = hidden_in(a)
    whole = _running_total(a, dim, hidden)
    early = vanishing(a, whole.log, dim, hidden)
    first = _running_total(Scaled(a.log.masked_fill(~early, -math.inf), a.factor), dim, hidden)
    return Scaled(torch.where(early, first.log, whole.log), torch.where(early, _factor(first), _factor(whole)))


def _running_total(a: Scaled, dim: int, hidden: Tensor | None) -> Scaled:
    most = largest(a, (dim,), hidden)
    terms = over(a, most, hidden)
    return Scaled(kept(most).expand_as(terms), terms.cumsum(dim))


def added(a: Scaled, b: Scaled) -> Scaled:
    """P + q, with broadcasting."""
    one, other = (Scaled(log, factor) for log, factor in zip(*_broadcast(a, b), strict=True))
    hidden = hidden_in(one), hidden_in(other)
    most = larger(one, other, hidden)
    return Scaled(kept(most), over(one, most, hidden[0]) + over(other, most, hidden[1]))


def difference(a: Scaled, b: Scaled) -> Scaled:
    """P - q; of two positive numbers it keeps all the digits that their logarithms have."""
    if a.factor is not None or b.factor is not None:
        return added(a, negative(b))
    high, lost = _gap(a.log, b.log)
    return Scaled(high, lost)


def logarithm_of_sum(a: Scaled, b: Scaled) -> Tensor:
    """log(p + q): log p + log(1 + q / p) where p is positive and q small beside it, which has all digits for p near 1."""
    whole = logarithm(added(a, b))
    if (a.factor is None) == (b.factor is None):
        return whole
    return _with_little(*((a.log, b) if a.factor is None else (b.log, a)), whole)


def logarithm_of_complement(rest: Tensor, part: Scaled) -> Tensor:
    """log(1 - p), given what it is where p is not small."""
    return _with_little(torch.zeros_like(rest.detach()), negative(part), rest)


def _with_little(log: Tensor, little: Scaled, whole: Tensor) -> Tensor:
    """log(e^log + q) where q is little, and elsewhere what it is as a whole."""
    log, exponent, factor, whole = torch.broadcast_tensors(log, little.log, _factor(little), whole)
    gap = exponent - log
    near = (torch.exp(gap.detach()) * factor.detach()).abs() < _LITTLE
    ratio = torch.exp(torch.where(near, gap, 0.0)) * torch.where(near, factor, 0.0)
    return torch.where(near, log + torch.log1p(ratio), whole)


def logarithm_of_difference(a: Tensor, b: Tensor) -> Tensor:
    """log(e^a - e^b); NaN where that is negative.

    Of log(1 - e^g) one form keeps its digits for small gaps g, and the other for large ones, in value and derivative
    (Maechler, Accurately computing log(1 - exp(-|a|))).
    """
    swap, high, gap = _high_and_gap(*torch.broadcast_tensors(a, b))
    near = gap.detach() > -math.log(2)
    small = torch.log(-torch.expm1(torch.where(near, gap, -0.5)))
    large = torch.log1p(-torch.exp(torch.where(near, -1.0, gap)))
    return (high + torch.where(near, small, large)).masked_fill(swap, math.nan)


def _high_and_gap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whether b is the larger, the larger, and how far the smaller is below it."""
    swap = b.detach() > a.detach()
    high, low = torch.where(swap, b, a), torch.where(swap, a, b)
    # Infinities of the same sign have no gap.
    equal = (low.detach() == high.detach()) & high.detach().isinf()
    return swap, high, (low - high.masked_fill(equal, 0.0)).masked_fill(equal, 0.0)


def _gap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The larger, and 1 - e^-|a - b| with the sign of a - b."""
    swap, high, gap = _high_and_gap(a, b)
    near = gap.detach() > -math.log(2)
    # The derivative of expm1 loses its digits where expm1 is close to -1.
    lost = torch.where(near, torch.expm1(torch.where(near, gap, 0.0)), torch.exp(torch.where(near, -1.0, gap)) - 1.0)
    return high, torch.where(swap, lost, -lost) + 0.0  # no -0, whose reciprocal has the other sign


def number(value: Scaled) -> Tensor:
    """The number itself."""
    log, factor = value
    if factor is None:
        return exponential(log)
    if _is_below_overflow(log):
        return exponential(log) * factor
    nothing = (factor.detach() == 0) & torch.exp(log.detach()).isinf()
    return weighted(exponential(log.masked_fill(nothing, 0.0)), factor)


def _is_below_overflow(log: Tensor) -> bool:
    """Whether no exponential is inf, where that can be asked."""
    if not log.numel() or not environment.may_look(log.device):
        return False
    return log.detach().amax().item() < math.log(torch.finfo(log.dtype).max)


def _of(log: Tensor, factor: Tensor | None) -> Scaled:
    return Scaled(log, None if factor is None else factor.expand(log.shape))


def between_sigmoids(x: Tensor, y: Tensor) -> Scaled:
    """The difference sigmoid(x) - sigmoid(y) = sigmoid(x) sigmoid(-y) (1 - e^(y - x)); its mirror image where x < y."""
    x, y = torch.broadcast_tensors(x, y)
    log = torch.nn.functional.logsigmoid(torch.maximum(x, y)) + torch.nn.functional.logsigmoid(-torch.minimum(x, y))
    return Scaled(log, _gap(x, y)[1])


def _factor(number: Scaled) -> Tensor:
    return torch.ones_like(number.log.detach()) if number.factor is None else number.factor


def _broadcast(a: Scaled, b: Scaled) -> tuple[list[Tensor], list[Any]]:
    logs = torch.broadcast_tensors(a.log, b.log)
    factors = [None if number.factor is None else number.factor.expand(logs[0].shape) for number in (a, b)]
    return list(logs), factors
