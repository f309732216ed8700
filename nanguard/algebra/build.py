"""Smart constructors of terms: products, powers, and elements moved. Each states an equation, and simplifies where it can.

Writing l for the logarithm of p, the constructors are, with the equation that each rests on:

1. `add`, `subtract`: log(p q) = l + m, log(p / q) = l - m; x - logsumexp(x, d) = log_softmax(x, d); 0 - x = -x.
2. `scale`: log p^k = k l. `shift`: log(c p) = l + log c.
3. `minus`: -p has no logarithm, but is known all the same; the sign is kept outermost.
4. `reshape`, `expand`, `rearrange`: the logarithm is elementwise, so it commutes with everything that only moves elements.

Sums, differences and bounds are in `nanguard.algebra.sums`.
"""

from __future__ import annotations

import math
from typing import Any

from nanguard.algebra import operators as ops
from nanguard.algebra.term import Apply, Operator, Shape, Term, Unrecognised

__all__ = ["broadcast_shapes"]


def broadcast_shapes(*shapes: Shape) -> Shape:
    """The shape that these broadcast to. Raises `Unrecognised` where they do not."""
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    result = []
    for sizes in zip(*padded, strict=True):
        distinct = {size for size in sizes if size != 1}
        if len(distinct) > 1:
            raise Unrecognised
        result.append(distinct.pop() if distinct else 1)
    return tuple(result)


def is_op(term: Term, *operators: Operator) -> bool:
    """Whether a term is one of these operators applied to something."""
    return isinstance(term, Apply) and term.operator in operators


def positive(term: Term) -> Term:
    """The term itself. Raises `Unrecognised` where its number may be negative."""
    if term.signed:
        raise Unrecognised
    return term


def minus(a: Term) -> Term:
    """The number -p."""
    return a.args[0] if isinstance(a, Apply) and a.operator is ops.MINUS else Apply(ops.MINUS, (a,), a.shape)


def unsigned(a: Term) -> tuple[bool, Term]:
    """Whether a term is a negated one, and what is negated."""
    return (True, a.args[0]) if isinstance(a, Apply) and a.operator is ops.MINUS else (False, a)


def _with_sign(negative: bool, a: Term) -> Term:
    return minus(a) if negative else a


def add(a: Term, b: Term) -> Term:
    """Rests on log(p q) = l + m."""
    (flip, a), (flop, b) = unsigned(a), unsigned(b)
    for one, other in ((a, b), (b, a)):
        divided = _divided(one, other)
        if divided is not None:
            return _with_sign(flip != flop, divided)
    if a is b or a == b:
        return scale(a, 2.0)
    return _with_sign(flip != flop, Apply(ops.ADD, (a, b), broadcast_shapes(a.shape, b.shape)))


def _divided(a: Term, b: Term) -> Term | None:
    """Rests on log(p c / q) = l - m + log c, where b is c / q, whose elements may have been moved or repeated since."""
    found = _inverse(b)
    return None if found is None else shift(subtract(a, found[0]), found[1])


def _inverse(a: Term) -> tuple[Term, float] | None:
    """The log q and the log c of c / q: dividing commutes with all that moves elements."""
    if not isinstance(a, Apply):
        return None
    if a.operator is ops.NEGATE:
        return a.args[0], 0.0
    moves = a.operator.move and len(a.args) == 1
    found = _inverse(a.args[0]) if moves or a.operator is ops.SHIFT else None
    if found is None:
        return None
    inner, constant = found
    return (_moved(a, inner), constant) if moves else (inner, constant + a.params["other"])


def _moved(move: Apply, a: Term) -> Term:
    """The elements of another term moved, or repeated, in the same way."""
    if move.operator is ops.RESHAPE:
        return reshape(a, move.shape)
    return (
        expand(a, move.shape)
        if move.operator is ops.EXPAND
        else rearrange(move.operator, (a,), move.shape, **move.params)
    )


def subtract(a: Term, b: Term) -> Term:
    """Rests on log(p / q) = l - m; x - logsumexp(x) is log_softmax(x), and x - log(e^x + e^y) is logsigmoid(x - y)."""
    (flip, a), (flop, b) = unsigned(a), unsigned(b)
    shape = broadcast_shapes(a.shape, b.shape)
    while isinstance(b, Apply) and b.operator is ops.EXPAND and broadcast_shapes(a.shape, b.args[0].shape) == shape:
        b = b.args[0]
    found = None if a.signed or b.signed or not isinstance(b, Apply) else _share(a, b)
    return _with_sign(flip != flop, found or Apply(ops.SUBTRACT, (a, b), shape))


def _share(a: Term, total: Apply) -> Term | None:
    """What a part of a total is, where the field has a name for it."""
    if total.operator is ops.PLUS_CONSTANT and total.args[0] == a:
        return logsigmoid(shift(a, -math.log(total.params["constant"])))
    if total.operator is ops.LOGADDEXP and a in total.args:
        other = total.args[1] if total.args[0] == a else total.args[0]
        return logsigmoid(subtract(a, other)) if a.shape == total.shape else None
    one = total.operator is ops.LOGSUMEXP and len(total.params["dim"]) == 1 and _aligned(total)
    return log_softmax(a, total.params["dim"][0]) if one and total.args[0] == a else None


def _aligned(total: Apply) -> bool:
    """Whether a total over one dim broadcasts back to where it came from: without keepdim, only for the first dim."""
    return bool(total.params["keepdim"]) or total.params["dim"] == (0,)


def negate(a: Term) -> Term:
    """Rests on log(1 / p) = -l, with -log(1 + e^x) = logsigmoid(-x)."""
    flip, a = unsigned(a)
    if isinstance(a, Apply) and a.operator is ops.NEGATE:
        found = a.args[0]
    elif isinstance(a, Apply) and a.operator is ops.PLUS_CONSTANT and a.params["constant"] == 1.0 and not a.signed:
        found = logsigmoid(negate(a.args[0]))
    elif isinstance(a, Apply) and a.operator is ops.SUBTRACT and not a.signed:
        found = subtract(a.args[1], a.args[0])
    else:
        found = Apply(ops.NEGATE, (a,), a.shape)
    return _with_sign(flip, found)


def scale(a: Term, factor: float) -> Term:
    """Rests on log p^k = k l; only even powers of what may be negative are known."""
    if factor == 1.0:
        return a
    if factor == -1.0:
        return negate(a)
    if not a.signed:
        return Apply(ops.SCALE, (a,), a.shape, other=factor)
    if factor <= 0 or factor % 2:
        raise Unrecognised
    return Apply(ops.POWER, (unsigned(a)[1],), a.shape, exponent=int(factor))


def shift(a: Term, constant: float) -> Term:
    """Rests on log(c p) = l + log c, given log c."""
    flip, a = unsigned(a)
    if isinstance(a, Apply) and a.operator is ops.SHIFT:
        constant, a = a.params["other"] + constant, a.args[0]
    if math.isnan(constant):  # 0 / 0
        raise Unrecognised
    none = abs(constant) < 1e-15  # what log c and -log c leave over
    if not none and is_op(a, ops.COMPLEMENT):
        return _with_sign(flip, shift(a.args[0], constant))  # type: ignore[union-attr] # it is close to 1 no more
    return _with_sign(flip, a if none else Apply(ops.SHIFT, (a,), a.shape, other=constant))


def log_softmax(a: Term, dim: int) -> Term:
    """The logarithm of softmax(x, d). Probabilities that are normalised already stay as they are."""
    if isinstance(a, Apply) and a.operator is ops.LOG_SOFTMAX and a.params["dim"] == dim:
        return a
    return Apply(ops.LOG_SOFTMAX, (a,), a.shape, dim=dim)


def logsigmoid(a: Term) -> Term:
    """Rests on log sigmoid(x)."""
    return Apply(ops.LOG_SIGMOID, (a,), a.shape)


def log_ndtr(a: Term) -> Term:
    """The logarithm of the normal distribution function."""
    return Apply(ops.LOG_NDTR, (a,), a.shape)


def expand(a: Term, shape: Shape) -> Term:
    """Elements repeated along new or single dims."""
    flip, a = unsigned(a)
    return _with_sign(flip, a if shape == a.shape else Apply(ops.EXPAND, (a,), shape, size=shape))


def reshape(a: Term, shape: Shape) -> Term:
    """Another shape for the same elements in the same order; a reduction may so get its reduced dims back."""
    if shape == a.shape:
        return a
    if isinstance(a, Apply):
        if a.operator is ops.MINUS:
            return minus(reshape(a.args[0], shape))
        if a.operator is ops.RESHAPE:
            return reshape(a.args[0], shape)
        if a.operator in (ops.LOGSUMEXP, ops.LOGMEANEXP):
            for keepdim in (True, False):
                if shape == reduced(a.args[0].shape, a.params["dim"], keepdim):
                    return Apply(a.operator, a.args, shape, **{**a.params, "keepdim": keepdim})
    return Apply(ops.RESHAPE, (a,), shape, sizes=shape)


def reduced(shape: Shape, dims: tuple[int, ...], keepdim: bool) -> Shape:
    """The shape after a reduction. Raises `Unrecognised` for an empty one: it is nobody's logarithm."""
    if any(shape[dim] == 0 for dim in dims):
        raise Unrecognised
    return tuple(1 if dim in dims else size for dim, size in enumerate(shape) if keepdim or dim not in dims)


def rearrange(operator: Operator, args: tuple[Term, ...], shape: Shape, **params: Any) -> Term:
    """Elements picked or moved by `operator`: the logarithm commutes with it, and so does the sign."""
    signs, bare = zip(*map(unsigned, args), strict=True)
    if all(signs):
        return minus(Apply(operator, bare, shape, **params))
    return Apply(operator, args, shape, **params)
