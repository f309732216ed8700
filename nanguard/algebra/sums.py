"""Smart constructors of terms: sums and differences.

Writing l and m for the logarithms of p and q:

1. `logaddexp`, `plus_constant`: log(p + q), log(p + c).
2. `complement`: log(c - p), where the digits are lost once p is close to c. For what is bounded by 1 there is a better way:
   1 - sigmoid(x) = sigmoid(-x); 1 - softmax(x)_k is the share of the others; 1 - tanh(x) = 2 sigmoid(-2 x). Where that is a
   sum, its logarithm loses the digits once p is close to 0, and is computed from p there.
3. `difference`: log(p - q). A total without one of its parts is the sum of the others;
   sigmoid(x) - sigmoid(y) = sigmoid(x) sigmoid(-y) (1 - e^(y - x)).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from nanguard.algebra import build
from nanguard.algebra import operators as ops
from nanguard.algebra.build import is_op, minus, unsigned
from nanguard.algebra.cumulated import between_cumulated
from nanguard.algebra.factors import between_sigmoids, common_factor, mixture
from nanguard.algebra.members import rest_of_members
from nanguard.algebra.others import left_out, rest_of_cumsum, rest_of_sum, without
from nanguard.algebra.pattern import operators
from nanguard.algebra.term import Apply, Leaf, Term, Unrecognised
from nanguard.algebra.totals import clamp, full, total, weigh

__all__ = ["complement", "difference", "logaddexp", "offset", "plus_constant"]


# A constant that differs from 1 by less is 1 and an epsilon.
_CLOSE = 1e-2
# What is left over from sums of constants, as in 1 - .7 - .3.
_ROUNDING = 1e-15
_MIXTURES = (ops.SHIFT, ops.PLUS_CONSTANT, ops.LOGADDEXP)


def logaddexp(a: Term, b: Term) -> Term:
    """The logarithm of p + q."""
    (flip, a), (flop, b) = unsigned(a), unsigned(b)
    if flip != flop:
        return difference(b, a) if flip else difference(a, b)
    both = Apply(ops.LOGADDEXP, (a, b), build.broadcast_shapes(a.shape, b.shape))
    return minus(both) if flip else both


def plus_constant(a: Term, constant: float) -> Term:
    """The logarithm of p + c, for any c."""
    if constant == 0:
        return a
    if isinstance(a, Apply):
        if a.operator is ops.MINUS:
            return complement(a.args[0], constant) if constant > 0 else minus(plus_constant(a.args[0], -constant))
        if a.operator is ops.DIFFERENCE:
            first, second = (_constant(arg) for arg in a.args)
            if second == constant:  # p - c + c
                return a.args[0]
            if first == -constant:  # c - p - c
                return minus(a.args[1])
        if a.operator is ops.PLUS_CONSTANT and a.params["constant"] == -constant:  # p + c - c
            return a.args[0]
        if a.operator is ops.EXPM1 and constant >= 1:  # of a smaller one, e^x + (c - 1) would lose the digits
            return plus_constant(a.args[0], constant - 1.0)
        scale, odd = _times_odd(a)
        if odd is not None and math.isclose(constant, scale, rel_tol=1e-12):
            return build.shift(_of_sum(_one_plus(odd, 1.0), minus(odd)), math.log(scale))
    if constant < 0:
        rest = _rest(a) if constant == -1.0 else None
        return difference(a, full(-constant, a.shape)) if rest is None else minus(rest)
    return Apply(ops.PLUS_CONSTANT, (a,), a.shape, constant=constant)


def _times_odd(a: Term) -> tuple[float, Apply | None]:
    """C and f(x) of c f(x), for functions between -1 and 1."""
    shifted = isinstance(a, Apply) and a.operator is ops.SHIFT
    inner = a.args[0] if shifted else a  # type: ignore[union-attr]
    if not isinstance(inner, Apply) or not is_op(inner, ops.TANH, ops.ERF):
        return 1.0, None
    return math.exp(a.params["other"]) if shifted else 1.0, inner  # type: ignore[union-attr]


def _one_plus(odd: Apply, sign: float) -> Term:
    """Rests on 1 + tanh(x) = 2 sigmoid(2 x), and 1 + erf(x) = 2 ndtr(sqrt(2) x)."""
    if odd.operator is ops.TANH:
        return _twice_sigmoid(odd.args[0], sign * 2.0)
    return build.shift(build.log_ndtr(build.scale(odd.args[0], sign * math.sqrt(2.0))), math.log(2.0))


def _constant(a: Term) -> float | None:
    return a.params["constant"] if isinstance(a, Apply) and a.operator is ops.FULL else None


def _twice_sigmoid(x: Term, factor: float) -> Term:
    return build.shift(build.logsigmoid(build.scale(x, factor)), math.log(2.0))


def complement(a: Term, constant: float) -> Term:
    """The logarithm of c - p, for c > 0."""
    flip, a = unsigned(a)
    if flip:
        return plus_constant(a, constant)
    if is_op(a, *_MIXTURES):
        rest = _rest_of_mixture(a, constant)
        if rest is not None:
            return _of_sum(rest, a) if constant == 1.0 else rest
    else:
        rest = _rest(a)
    if rest is None and abs(constant - 1.0) > _CLOSE:
        return Apply(ops.DIFFERENCE, (full(constant, a.shape), a), a.shape)
    # The logarithm of a constant close to 1 has lost what it differs by.
    rest = Apply(ops.DIFFERENCE, (full(1.0, a.shape), a), a.shape) if rest is None else rest
    return plus_constant(rest, constant - 1.0)


def _rest(a: Term) -> Term | None:
    """The logarithm of 1 - p with all its digits, where there is a way."""
    if not isinstance(a, Apply):
        return None
    if a.operator.move:
        rests = [_rest(arg) for arg in a.args]
        if any(rest is None for rest in rests):
            return None
        return build.rearrange(a.operator, tuple(rest for rest in rests if rest is not None), a.shape, **a.params)
    find = _RESTS.get(a.operator.name)
    return None if find is None else find(a)


def _of_sum(rest: Term, part: Term) -> Term:
    """The logarithm of 1 - p, given a sum that it is."""
    return Apply(ops.COMPLEMENT, (rest, part), rest.shape)


def _as_sum(find: Callable[[Apply], Term | None]) -> Callable[[Apply], Term | None]:
    def found(a: Apply) -> Term | None:
        rest = find(a)
        return None if rest is None else _of_sum(rest, a)

    return found


def _rest_of_mixture(a: Term, constant: float) -> Term | None:
    """Rests on c - (k p + m q + d) = k (1 - p) + m (1 - q) + (c - k - m - d), if the last is not negative."""
    parts, added = mixture(a)
    factors = [factor for factor, _ in parts]
    rests = [_sure(_rest(part)) for _, part in parts]
    if constant == 1.0 and (whole := rest_of_members(full(1.0, ()), a)) is not None:
        return whole
    left, least = math.fsum([constant, -added, *(-factor for factor in factors)]), _ROUNDING * constant
    if not rests or any(rest is None for rest in rests) or left < -least:
        return None
    shares = [
        build.shift(rest, math.log(factor)) for factor, rest in zip(factors, rests, strict=True) if rest is not None
    ]
    whole = functools.reduce(logaddexp, shares)
    return logaddexp(whole, full(left, whole.shape)) if left > least else whole


def _rest_of_product(a: Apply) -> Term | None:
    """Rests on 1 - p q = (1 - p) + p (1 - q)."""
    one, other = (_sure(_rest(arg)) for arg in a.args)
    return None if one is None or other is None else logaddexp(one, build.add(a.args[0], other))


def _sure(rest: Term | None) -> Term | None:
    """What has a logarithm for sure: a distance to what is no label may be larger than 1."""
    return None if rest is None or operators(rest) & {"distance", "closeness"} else rest


def _rest_of_clamped(a: Apply) -> Term | None:
    rest, bound = _rest(a.args[0]), 1.0 - a.params["constant"]
    if rest is None or bound <= 0:
        return rest if a.operator is ops.CLAMP_MAX and bound == 0 else None
    return clamp(rest, None, bound) if a.operator is ops.CLAMP_MIN else clamp(rest, bound, None)


def _rest_of_mean(a: Apply) -> Term | None:
    rest = _rest(a.args[0])
    return None if rest is None else Apply(a.operator, (rest,), a.shape, **a.params)


def _rest_of_square(a: Apply) -> Term | None:
    """Rests on 1 - tanh^2 = (1 - tanh) (1 + tanh), and the same for erf."""
    odd = a.args[0]
    if a.params["exponent"] != 2 or not isinstance(odd, Apply) or not is_op(odd, ops.TANH, ops.ERF):
        return None
    return build.add(_one_plus(odd, 1.0), _one_plus(odd, -1.0))


def _rest_of_power(a: Apply) -> Term | None:
    """Rests on 1 - p^2 = (1 - p) (1 + p)."""
    rest = _rest(a.args[0])
    return None if rest is None or a.params["other"] != 2 else build.add(rest, plus_constant(a.args[0], 1.0))


def _rest_of_choice(a: Apply) -> Term | None:
    one, other = (_rest(arg) for arg in a.args)
    return None if one is None or other is None else Apply(ops.WHERE, (one, other), a.shape, **a.params)


def _rest_of_weighed(a: Apply) -> Term | None:
    """Rests on 1 - w p = (1 - p) + (1 - w) p, which is 1 - p itself where nothing is masked."""
    p, weight = a.args
    rest = _rest(p)
    return None if rest is None else logaddexp(rest, Apply(ops.WEIGH_REST, (p, weight), a.shape))


def _rest_of_constant(a: Apply) -> Term | None:
    constant = a.params["constant"]
    return full(1.0 - constant, a.shape) if 0 <= constant <= 1 else None


def _rest_of_extreme(a: Apply) -> Term | None:
    """Rests on 1 - max(p, q) = min(1 - p, 1 - q)."""
    rests = [_rest(arg) for arg in a.args]
    known = tuple(rest for rest in rests if rest is not None)
    if len(known) < len(rests):
        return None
    params = {name: not value if name in ("largest", "descending") else value for name, value in a.params.items()}
    return Apply(_OPPOSITES.get(a.operator, a.operator), known, a.shape, **params)


_OPPOSITES = {ops.AMAX: ops.AMIN, ops.AMIN: ops.AMAX, ops.MAXIMUM: ops.MINIMUM, ops.MINIMUM: ops.MAXIMUM}


def _rest_of_masked(a: Apply) -> Term | None:
    """Rests on 1 - c where a mask has put the number c."""
    rest, log = _rest(a.args[0]), a.params["value"]
    if rest is None or log > 0:
        return None
    value = 0.0 if log == -math.inf else math.log1p(-math.exp(log)) if log < 0 else -math.inf
    return Apply(a.operator, (rest,), a.shape, **{**a.params, "value": value})


_RESTS: dict[str, Callable[[Apply], Term | None]] = {
    "complement": lambda a: a.args[1],
    **dict.fromkeys(("shift", "plus_constant", "logaddexp"), _as_sum(lambda a: _rest_of_mixture(a, 1.0))),
    "add": _as_sum(_rest_of_product),
    "logsigmoid": lambda a: build.logsigmoid(build.negate(a.args[0])),
    "log_softmax": lambda a: Apply(ops.LOG_REST, a.args, a.shape, **a.params),
    "log_rest": lambda a: build.log_softmax(a.args[0], a.params["dim"]),
    "log_ndtr": lambda a: build.log_ndtr(build.negate(a.args[0])),
    **dict.fromkeys(("tanh", "erf"), _as_sum(lambda a: _one_plus(a, -1.0))),
    "distance": lambda a: Apply(ops.CLOSENESS, a.args, a.shape, **a.params),
    "closeness": lambda a: Apply(ops.DISTANCE, a.args, a.shape, **a.params),
    "power": _as_sum(_rest_of_square),
    "scale": _as_sum(lambda a: _rest_of_power(a)),
    "logcumsumexp": _as_sum(rest_of_cumsum),
    "where": lambda a: _rest_of_choice(a),
    "clamp_min": _rest_of_clamped,
    "clamp_max": _rest_of_clamped,
    "logmeanexp": _as_sum(_rest_of_mean),
    "logsumexp": _as_sum(rest_of_sum),
    "weigh": _as_sum(_rest_of_weighed),
    "full": _rest_of_constant,
    "amax": _rest_of_extreme,
    "amin": _rest_of_extreme,
    "maximum": _rest_of_extreme,
    "minimum": _rest_of_extreme,
    "extreme": _rest_of_extreme,
    "sort": _rest_of_extreme,
    "topk": _rest_of_extreme,
    "masked_fill": _rest_of_masked,
    "set_item": _rest_of_masked,
    "fill_diagonal": _rest_of_masked,
    "pad": _rest_of_masked,
}


def difference(a: Term, b: Term) -> Term:
    """The logarithm of p - q."""
    (flip, a), (flop, b) = unsigned(a), unsigned(b)
    if flip != flop:
        return minus(logaddexp(a, b)) if flip else logaddexp(a, b)
    if flip:
        a, b = b, a
    rest, lack = left_out(a, b), left_out(b, a)
    if rest is not None:
        return rest
    if lack is not None:
        return minus(lack)
    if isinstance(a, Apply):
        if a.operator is ops.NEGATE and _constant(b) == 1.0 and (rest := _rest(a.args[0])) is not None:
            return build.subtract(rest, build.expand(a.args[0], rest.shape))  # 1 / p - 1 = (1 - p) / p
        found = between_sigmoids(a, b) or without(a, b) or rest_of_members(a, b)
        found = found or between_cumulated(a, b, complement) or _factored(a, b) or _of_totals(a, b)
        if found is not None:
            return found
    return Apply(ops.DIFFERENCE, (a, b), build.broadcast_shapes(a.shape, b.shape))


def offset(a: Term, target: Leaf, sign: int) -> Term:
    """T - p, or p - t, for a tensor t that nothing is known about, such as labels: its magnitude will be known."""
    rest = None if a.signed else _rest(a)
    if rest is None or rest.signed or target.tracked:
        raise Unrecognised
    return Apply(ops.OFFSET, (a, rest, target), build.broadcast_shapes(a.shape, target.shape), sign=sign)


def _factored(a: Apply, b: Term) -> Term | None:
    """Rests on p q - p r = p (q - r): what is large in both logarithms would swallow the difference."""
    if a.operator is ops.WEIGH and isinstance(b, Apply) and b.operator is ops.WEIGH and a.args[1] == b.args[1]:
        return weigh(difference(a.args[0], b.args[0]), a.args[1])
    found = common_factor(a, b)
    if found is None:
        return None
    (first, one), (second, other) = found.rests
    if (first is None and (second is None or one > 0)) or (second is None and other > 0):
        return None  # nothing cancels in 2 p - p^2, but it would in the derivatives of p and 2 - p
    if first is None:
        rest = complement(second, math.exp(one))  # type: ignore[arg-type]
    elif second is None:
        rest = plus_constant(build.shift(first, one), -math.exp(other))
    else:
        rest = difference(build.shift(first, one), build.shift(second, other))
    whole = rest if found.factor is None else build.add(found.factor, rest)
    return build.expand(build.shift(whole, found.constant), build.broadcast_shapes(a.shape, b.shape))


def _of_totals(a: Apply, b: Term) -> Term | None:
    """Rests on sum p - sum q = sum (p - q), where the differences are known to more digits than the sums."""
    if a.operator not in (ops.LOGSUMEXP, ops.LOGMEANEXP) or not isinstance(b, Apply) or a.operator is not b.operator:
        return None
    if a.params != b.params or a.args[0].shape != b.args[0].shape:
        return None
    inner = difference(a.args[0], b.args[0])
    return None if is_op(inner, ops.DIFFERENCE) else total(a.operator, inner, **a.params)
