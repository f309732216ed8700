"""Smart constructors of terms: sums and differences.

Writing l and m for the logarithms of p and q:

1. `logaddexp`, `plus_constant`: log(p + q), log(p + c).
2. `complement`: log(c - p), where the digits are lost once p is close to c. For what is bounded by 1 there is a better way:
   1 - sigmoid(x) = sigmoid(-x); 1 - softmax(x)_k is the share of the others; 1 - tanh(x) = 2 sigmoid(-2 x).
3. `difference`: log(p - q). A total without one of its parts is the sum of the others;
   sigmoid(x) - sigmoid(y) = sigmoid(x) sigmoid(-y) (1 - e^(y - x)).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from nanguard.algebra import build
from nanguard.algebra import operators as ops
from nanguard.algebra.build import is_op, minus, unsigned
from nanguard.algebra.others import left_out, without
from nanguard.algebra.term import Apply, Leaf, Term, Unrecognised
from nanguard.algebra.totals import clamp, full, logsumexp

__all__ = ["complement", "difference", "logaddexp", "offset", "plus_constant"]


# A constant that differs from 1 by less is 1 and an epsilon.
_CLOSE = 1e-2


def logaddexp(a: Term, b: Term) -> Term:
    """The logarithm of p + q."""
    (flip, a), (flop, b) = unsigned(a), unsigned(b)
    if flip != flop:
        return difference(b, a) if flip else difference(a, b)
    total = Apply(ops.LOGADDEXP, (a, b), build.broadcast_shapes(a.shape, b.shape))
    return minus(total) if flip else total


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
        if a.operator is ops.EXPM1:
            return plus_constant(a.args[0], constant - 1.0)
        scale, odd = _times_odd(a)
        if odd is not None and math.isclose(constant, scale, rel_tol=1e-12):
            return build.shift(_one_plus(odd, 1.0), math.log(scale))
    if constant < 0:
        return difference(a, full(-constant, a.shape))
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
    scale, odd = _times_odd(a)
    if odd is not None and scale != 1.0 and math.isclose(constant, scale, rel_tol=1e-12):
        return build.shift(_one_plus(odd, -1.0), math.log(scale))
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


def _rest_of_clamped(a: Apply) -> Term | None:
    rest, bound = _rest(a.args[0]), 1.0 - a.params["constant"]
    if rest is None or bound <= 0:
        return rest if a.operator is ops.CLAMP_MAX and bound == 0 else None
    return clamp(rest, None, bound) if a.operator is ops.CLAMP_MIN else clamp(rest, bound, None)


def _rest_of_mean(a: Apply) -> Term | None:
    rest = _rest(a.args[0])
    return None if rest is None else Apply(a.operator, (rest,), a.shape, **a.params)


def _rest_of_sum(a: Apply) -> Term | None:
    """Rests on 1 - sum w p = sum (1 - w) p, for probabilities that sum to 1."""
    weighed = a.args[0]
    if not isinstance(weighed, Apply):
        return None
    if weighed.operator in (ops.NARROW, ops.INDEX):
        return _rest_of_neighbours(a, weighed)
    if weighed.operator not in (ops.WEIGH, ops.WEIGH_REST):
        return None
    p, weight = weighed.args
    if not isinstance(p, Apply) or p.operator is not ops.LOG_SOFTMAX or a.params["dim"] != (p.params["dim"],):
        return None
    other = ops.WEIGH_REST if weighed.operator is ops.WEIGH else ops.WEIGH
    return Apply(a.operator, (Apply(other, (p, weight), weighed.shape),), a.shape, **a.params)


def _rest_of_neighbours(a: Apply, part: Apply) -> Term | None:
    """Rests on 1 - (p_i + ... + p_j) = the sum of those before and after, for probabilities that sum to 1."""
    p = part.args[0]
    if not isinstance(p, Apply) or p.operator is not ops.LOG_SOFTMAX or a.params["dim"] != (p.params["dim"],):
        return None
    dim, size = p.params["dim"], p.shape[p.params["dim"]]
    if part.operator is ops.NARROW:
        start, stop = part.params["start"] % size, part.params["start"] % size + part.params["length"]
        if part.params["dim"] != dim:
            return None
    else:
        key = part.params["key"]
        key = key if isinstance(key, tuple) else (key,)
        full = all(type(entry) is slice and (entry == slice(None) or place == dim) for place, entry in enumerate(key))
        if (
            not full
            or len(key) <= dim
            or not all(type(end) in (int, type(None)) for end in (key[dim].start, key[dim].stop))
        ):
            return None
        start, stop, step = key[dim].indices(size)
        if step != 1:
            return None
    pieces = [(first, last - first) for first, last in ((0, start), (stop, size)) if last > first]
    if not pieces:
        return None
    totals = [_total_of_piece(p, dim, first, length, a.params["keepdim"]) for first, length in pieces]
    return totals[0] if len(totals) == 1 else logaddexp(totals[0], totals[1])


def _total_of_piece(p: Apply, dim: int, start: int, length: int, keepdim: bool) -> Term:
    shape = (*p.shape[:dim], length, *p.shape[dim + 1 :])
    return logsumexp(build.rearrange(ops.NARROW, (p,), shape, dim=dim, start=start, length=length), (dim,), keepdim)


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


def _rest_of_cumsum(a: Apply) -> Term | None:
    """Rests on 1 - (p_1 + ... + p_k) = p_(k+1) + ... + p_n, for probabilities that sum to 1."""
    p, dim = a.args[0], a.params["dim"]
    if not isinstance(p, Apply) or p.operator is not ops.LOG_SOFTMAX or p.params["dim"] != dim:
        return None
    return Apply(ops.LOG_TAIL, p.args, a.shape, dim=dim)


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
    "logsigmoid": lambda a: build.logsigmoid(build.negate(a.args[0])),
    "log_softmax": lambda a: Apply(ops.LOG_REST, a.args, a.shape, **a.params),
    "log_rest": lambda a: build.log_softmax(a.args[0], a.params["dim"]),
    "log_ndtr": lambda a: build.log_ndtr(build.negate(a.args[0])),
    "tanh": lambda a: _one_plus(a, -1.0),
    "erf": lambda a: _one_plus(a, -1.0),
    "distance": lambda a: Apply(ops.CLOSENESS, a.args, a.shape, **a.params),
    "closeness": lambda a: Apply(ops.DISTANCE, a.args, a.shape, **a.params),
    "power": _rest_of_square,
    "scale": lambda a: _rest_of_power(a),
    "logcumsumexp": lambda a: _rest_of_cumsum(a),
    "where": lambda a: _rest_of_choice(a),
    "clamp_min": _rest_of_clamped,
    "clamp_max": _rest_of_clamped,
    "logmeanexp": _rest_of_mean,
    "logsumexp": _rest_of_sum,
    "weigh": _rest_of_weighed,
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
        x, y = _logit(a), _logit(b)
        if x is not None and y is not None:
            return _between_sigmoids(x, y)
        others = without(a, b)
        if others is not None:
            return others
    return Apply(ops.DIFFERENCE, (a, b), build.broadcast_shapes(a.shape, b.shape))


def offset(a: Term, target: Leaf, sign: int) -> Term:
    """T - p, or p - t, for a tensor t that nothing is known about, such as labels: its magnitude will be known."""
    rest = None if a.signed else _rest(a)
    if rest is None or rest.signed or target.tracked:
        raise Unrecognised
    return Apply(ops.OFFSET, (a, rest, target), build.broadcast_shapes(a.shape, target.shape), sign=sign)


def _logit(a: Term) -> Term | None:
    """The x of sigmoid(x), moved as the sigmoid was."""
    if isinstance(a, Apply) and a.operator is ops.LOG_SIGMOID:
        return a.args[0]
    if isinstance(a, Apply) and a.operator.move and len(a.args) == 1:
        inner = _logit(a.args[0])
        return None if inner is None else Apply(a.operator, (inner,), a.shape, **a.params)
    return None


def _between_sigmoids(x: Term, y: Term) -> Term:
    return Apply(ops.BETWEEN, (x, y), build.broadcast_shapes(x.shape, y.shape))
