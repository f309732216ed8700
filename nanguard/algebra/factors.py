"""What two numbers have in common as products, and what a number consists of as a sum. No torch in here."""

from __future__ import annotations

import math
from typing import NamedTuple

from nanguard.algebra import build
from nanguard.algebra import operators as ops
from nanguard.algebra.term import Apply, Term
from nanguard.algebra.totals import logsumexp

__all__ = ["Common", "between_sigmoids", "common_factor", "mixture"]

# Logarithms of constants that differ by less are those of the same constant.
_ROUNDING = 1e-15

_Factors = list["tuple[Term, float]"]


class Common(NamedTuple):
    """A factor of two numbers, and what is left of each.

    Attributes:
        factor: its logarithm, but for a constant; `None` for 1.
        constant: the logarithm of that constant.
        rests: of each number the logarithms of what is left of it (`None` for 1), and of a constant factor.
    """

    factor: Term | None
    constant: float
    rests: tuple[tuple[Term | None, float], tuple[Term | None, float]]


def common_factor(a: Term, b: Term) -> Common | None:
    """The factor that two numbers have in common; `None` where they have none."""
    mine, c = _factors(a, 1.0)
    theirs, d = _factors(b, 1.0)
    if math.isinf(c) or math.isinf(d):  # it was multiplied by 0
        return None
    shared: _Factors = []
    for factor, power in mine:
        other = next((exponent for found, exponent in theirs if found == factor), 0.0)
        if power * other > 0:
            shared.append((factor, math.copysign(min(abs(power), abs(other)), power)))
    same = abs(c - d) <= _ROUNDING * max(1.0, abs(c))
    if not shared and not (same and c):
        return None
    rests = tuple(
        (_product(_without(factors, shared)), 0.0 if same else left) for factors, left in ((mine, c), (theirs, d))
    )
    return Common(_product(shared), c if same else 0.0, (rests[0], rests[1]))


def _factors(a: Term, power: float) -> tuple[_Factors, float]:
    """Factors of a number with their exponents, and the logarithm of the constant one."""
    if isinstance(a, Apply):
        if a.operator is ops.SHIFT:
            factors, constant = _factors(a.args[0], power)
            return factors, constant + power * a.params["other"]
        if a.operator is ops.SCALE:
            return _factors(a.args[0], power * a.params["other"])
        if a.operator is ops.NEGATE:
            return _factors(a.args[0], -power)
        if a.operator in (ops.ADD, ops.SUBTRACT):
            one, c = _factors(a.args[0], power)
            other, d = _factors(a.args[1], power if a.operator is ops.ADD else -power)
            return _merged(one, other), c + d
        if a.operator is ops.LOGMEANEXP and type(a.params["count"]) is int:
            total = logsumexp(a.args[0], a.params["dim"], a.params["keepdim"])
            return [(total, power)], -power * math.log(a.params["count"])
        if a.operator is ops.FULL and a.params["constant"] > 0:
            return [], power * math.log(a.params["constant"])
    return [(a, power)], 0.0


def _merged(one: _Factors, other: _Factors) -> _Factors:
    result = list(one)
    for factor, power in other:
        place = next((place for place, (known, _) in enumerate(result) if known == factor), None)
        if place is None:
            result.append((factor, power))
        else:
            result[place] = (factor, result[place][1] + power)
    return result


def _without(factors: _Factors, shared: _Factors) -> _Factors:
    return [(factor, power) for factor, power in _merged(factors, [(f, -p) for f, p in shared]) if power]


def _product(factors: _Factors) -> Term | None:
    """The logarithm of a product: those below the line last."""
    result: Term | None = None
    for factor, power in sorted(factors, key=lambda entry: entry[1] < 0):
        part = build.scale(factor, abs(power))
        if power < 0:
            result = build.negate(part) if result is None else build.subtract(result, part)
        else:
            result = part if result is None else build.add(result, part)
    return result


def mixture(a: Term, factor: float = 1.0) -> tuple[list[tuple[float, Term]], float]:
    """The factors and the numbers of k p + m q + ... + c, and c."""
    if factor == 0:
        return [], 0.0
    if isinstance(a, Apply):
        if a.operator is ops.SHIFT:
            return mixture(a.args[0], factor * math.exp(a.params["other"]))
        if a.operator is ops.PLUS_CONSTANT:
            parts, constant = mixture(a.args[0], factor)
            return parts, constant + factor * a.params["constant"]
        if a.operator is ops.LOGADDEXP:
            (one, c), (other, d) = (mixture(arg, factor) for arg in a.args)
            return one + other, c + d
        if a.operator is ops.FULL:
            return [], factor * a.params["constant"]
    return [(factor, a)], 0.0


def between_sigmoids(a: Term, b: Term) -> Term | None:
    """The logarithm of the difference of two sigmoids, moved as they were; `None` for other numbers."""
    x, y = _logit(a), _logit(b)
    if x is None or y is None:
        return None
    return Apply(ops.BETWEEN, (x, y), build.broadcast_shapes(x.shape, y.shape))


def _logit(a: Term) -> Term | None:
    """The x of sigmoid(x), moved as the sigmoid was."""
    if isinstance(a, Apply) and a.operator is ops.LOG_SIGMOID:
        return a.args[0]
    if isinstance(a, Apply) and a.operator.move and len(a.args) == 1:
        inner = _logit(a.args[0])
        return None if inner is None else Apply(a.operator, (inner,), a.shape, **a.params)
    return None
