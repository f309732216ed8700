"""Smart constructors of terms: totals, weights and bounds.

Writing l for the logarithm of p:

1. `logsumexp`, `logmeanexp`, `logcumsumexp`: log sum p = logsumexp l; the mean has - log n.
2. `weigh`: w p for a tensor w about whose sign nothing is known.
3. `clamp`: log is increasing, so log clamp(p, a, b) = clamp(l, log a, log b).
"""

from __future__ import annotations

import math

from nanguard.algebra import build
from nanguard.algebra import operators as ops
from nanguard.algebra.build import minus, reduced, unsigned
from nanguard.algebra.term import Apply, Leaf, Operator, Shape, Term, Unrecognised

__all__ = [
    "as_total",
    "clamp",
    "full",
    "logcumsumexp",
    "logmeanexp",
    "logsumexp",
    "scatter_add",
    "total",
    "unknown",
    "weigh",
]


# Logarithms of constants that differ by less are those of the same constant.
_ROUNDING = 1e-15


def logsumexp(a: Term, dims: tuple[int, ...], keepdim: bool) -> Term:
    """Rests on log sum p = logsumexp l."""
    return total(ops.LOGSUMEXP, a, dims, keepdim)


def logmeanexp(a: Term, dims: tuple[int, ...], keepdim: bool) -> Term:
    """Rests on log mean p = logsumexp l - log n."""
    return total(ops.LOGMEANEXP, a, dims, keepdim, count=math.prod(a.shape[dim] for dim in dims))


def total(operator: Operator, a: Term, dim: tuple[int, ...], keepdim: bool, **params: int) -> Term:
    """The logarithm of a sum or a mean over these dims."""
    if not dim:
        return a
    flip, a = unsigned(a)
    result = Apply(operator, (a,), reduced(a.shape, dim, keepdim), dim=dim, keepdim=keepdim, **params)
    return minus(result) if flip else result


def as_total(a: Term) -> Term:
    """Rests on n mean p = sum p."""
    mean = a.args[0] if isinstance(a, Apply) and a.operator is ops.SHIFT else a
    if not isinstance(a, Apply) or not isinstance(mean, Apply) or mean.operator is not ops.LOGMEANEXP or mean is a:
        return a
    count = mean.params["count"]
    if type(count) is not int or abs(a.params["other"] - math.log(count)) > _ROUNDING * max(1.0, math.log(count)):
        return a
    return total(ops.LOGSUMEXP, mean.args[0], mean.params["dim"], mean.params["keepdim"])


def logcumsumexp(a: Term, dim: int) -> Term:
    """Rests on log cumsum p = logcumsumexp l."""
    flip, a = unsigned(a)
    total = Apply(ops.LOGCUMSUMEXP, (a,), a.shape, dim=dim)
    return minus(total) if flip else total


def full(constant: float, shape: Shape) -> Term:
    """The logarithm of a constant, of 0 too. Raises `Unrecognised` below."""
    if constant < 0:
        raise Unrecognised
    return Apply(ops.FULL, (), shape, constant=constant)


def weigh(a: Term, weight: Term) -> Term:
    """The number w p, given w itself."""
    flip, a = unsigned(a)
    product = Apply(ops.WEIGH, (a, weight), build.broadcast_shapes(a.shape, weight.shape))
    return minus(product) if flip else product


def unknown(weight: Leaf) -> Term:
    """A tensor of either sign that nothing else is known about."""
    return weigh(full(1.0, weight.shape), weight)


def clamp(a: Term, minimum: float | None, maximum: float | None) -> Term:
    """Bounds above zero for p are bounds for l: log is increasing."""
    if minimum is not None:
        a = Apply(ops.CLAMP_MIN, (a,), a.shape, constant=minimum)
    if maximum is not None:
        a = Apply(ops.CLAMP_MAX, (build.positive(a),), a.shape, constant=maximum)
    return a


def scatter_add(a: Term, b: Term, dim: int, index: Leaf) -> Term:
    """The logarithm of p after q was added to it at the places of an index."""
    if a.signed or b.signed or b.shape != index.shape:
        raise Unrecognised
    return Apply(ops.SCATTER_ADD, (a, b), a.shape, dim=dim, index=index)
