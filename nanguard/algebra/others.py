"""What is left of a total without one of its parts: the sum of the others, which a difference would lose the digits of."""

from __future__ import annotations

import math

from nanguard.algebra import build
from nanguard.algebra import operators as ops
from nanguard.algebra.build import reduced
from nanguard.algebra.members import rest_of_members
from nanguard.algebra.term import Apply, Leaf, Shape, Term
from nanguard.algebra.totals import as_total, full

__all__ = ["left_out", "rest_of_cumsum", "rest_of_sum", "without"]


def left_out(whole: Term, part: Term) -> Term | None:
    """What elements are left of a tensor when a part of them is subtracted, as p - w p = (1 - w) p; `None` for other parts."""
    if not isinstance(part, Apply):
        return None
    if part.operator is ops.WEIGH and part.args[0] == whole and part.shape == whole.shape:
        return Apply(ops.WEIGH_REST, part.args, part.shape)
    if part.operator is not ops.ON_DIAGONAL or len(whole.shape) != 2 or whole.signed:
        return None
    square = whole.shape[0] == whole.shape[1] and part.params["offset"] == 0 and part.params["dim1"] == 0
    diagonal = build.rearrange(ops.DIAGONAL, (whole,), part.args[0].shape, offset=0, dim1=0, dim2=1)
    if not square or part.args[0] != diagonal:
        return None
    return Apply(ops.FILLED_DIAGONAL, (whole,), whole.shape, value=-math.inf, wrap=False)


def without(whole: Apply, part: Term) -> Term | None:
    """A total over one dim without a part of it, row by row; `None` where the part does not stand in the rows of the total."""
    total = as_total(whole)
    assert isinstance(total, Apply)
    if total.operator is ops.LOGADDEXP:
        for one, other in (total.args, reversed(total.args)):
            rest = without(one, part) if isinstance(one, Apply) and one.shape == total.shape else None
            if rest is not None:
                return Apply(ops.LOGADDEXP, (rest, other), total.shape)
    if total.operator is not ops.LOGSUMEXP or len(total.params["dim"]) != 1 or total.signed:
        return None
    (x,), dim, keepdim = total.args, total.params["dim"][0], total.params["keepdim"]
    others = Apply(ops.LOG_OTHERS, (x,), x.shape, dim=dim)
    if part == x:
        return others if keepdim or dim == 0 else None
    picked = part.args[0] if isinstance(part, Apply) and part.operator is ops.RESHAPE else part
    picked = _of_row(picked, x)
    if not isinstance(picked, Apply) or len(picked.args) != 1 or picked.args[0] != x or part.shape != total.shape:
        return None
    if picked.operator in (ops.AMAX, ops.AMIN, ops.EXTREME):
        return _without_extreme(others, picked, dim, part.shape)
    if not _one_of_each_row(picked, x.shape, dim) or picked.shape not in (
        reduced(x.shape, (dim,), keep) for keep in (True, False)
    ):
        return None
    return build.reshape(build.rearrange(picked.operator, (others,), picked.shape, **picked.params), part.shape)


def _without_extreme(others: Apply, picked: Apply, dim: int, shape: Shape) -> Term | None:
    """Rests on sum p - max p = min (sum p - p)."""
    if picked.params["dim"] not in (dim, (dim,)):
        return None
    params = {name: not value if name == "largest" else value for name, value in picked.params.items()}
    opposite = {ops.AMAX: ops.AMIN, ops.AMIN: ops.AMAX}.get(picked.operator, picked.operator)
    return build.reshape(Apply(opposite, (others,), picked.shape, **params), shape)


def _of_row(picked: Term, row: Term) -> Term:
    """`x[i, j]` as `x[i][j]`, where `x[i]` is the row."""
    if not (build.is_op(picked, ops.INDEX) and build.is_op(row, ops.INDEX)):
        return picked
    places, place = picked.params["key"], row.params["key"]  # type: ignore[union-attr]
    if isinstance(place, tuple) and place[1:] == (slice(None),) * len(place[1:]):
        place = place[0]
    numbers = isinstance(places, tuple) and all(type(entry) is int for entry in (*places, place))
    if not numbers or places[0] != place or picked.args != row.args:  # type: ignore[union-attr]
        return picked
    return Apply(ops.INDEX, (row,), picked.shape, key=places[1:])


def _one_of_each_row(picked: Apply, shape: Shape, dim: int) -> bool:
    """Whether one element is picked along `dim`, from every row in turn."""
    params = picked.params
    if picked.operator is ops.DIAGONAL:
        return len(shape) == 2 and shape[0] == shape[1] and params["offset"] == 0
    if picked.operator in (ops.SELECT, ops.NARROW, ops.GATHER):
        return bool(params["dim"] == dim)
    if picked.operator is ops.INDEX:
        key = params["key"] if isinstance(params["key"], tuple) else (params["key"],)
        key = (*key, *(slice(None),) * (len(shape) - len(key))) if all(type(entry) is slice for entry in key) else key
        return len(key) == len(shape) and _indexes_rows(key, shape, dim)
    return False


def _indexes_rows(key: tuple[object, ...], shape: Shape, dim: int) -> bool:
    """Whether it is `[:, k]`, `[:, k:k + 1]`, or `[0, 1, ..., n - 1; y]`."""
    if type(key[dim]) is int or _is_single(key[dim], shape[dim]):
        return all(type(entry) is slice and entry == slice(None) for place, entry in enumerate(key) if place != dim)
    if len(shape) != 2:
        return False
    rows, size = key[1 - dim], shape[1 - dim]
    if isinstance(rows, Leaf):
        return rows.shape == (size,) and rows.counts()
    return isinstance(rows, (list, range)) and list(rows) == list(range(size))


def _is_single(entry: object, size: object) -> bool:
    """Whether it is `k:k + 1`."""
    if type(entry) is not slice or type(size) is not int:
        return False
    numbers = all(type(part) in (int, type(None)) for part in (entry.start, entry.stop, entry.step))
    return numbers and len(range(*entry.indices(size))) == 1


def rest_of_sum(a: Apply) -> Term | None:
    """Rests on 1 - sum w p = sum (1 - w) p, for probabilities that sum to 1."""
    weighed = a.args[0]
    rest = rest_of_members(full(1.0, ()), a)
    if rest is not None or not isinstance(weighed, Apply):
        return rest
    if weighed.operator not in (ops.WEIGH, ops.WEIGH_REST):
        return None
    p, weight = weighed.args
    if not isinstance(p, Apply) or p.operator is not ops.LOG_SOFTMAX or a.params["dim"] != (p.params["dim"],):
        return None
    other = ops.WEIGH_REST if weighed.operator is ops.WEIGH else ops.WEIGH
    return Apply(a.operator, (Apply(other, (p, weight), weighed.shape),), a.shape, **a.params)


def rest_of_cumsum(a: Apply) -> Term | None:
    """Rests on 1 - (p_1 + ... + p_k) = p_(k+1) + ... + p_n, for probabilities that sum to 1."""
    p, dim = a.args[0], a.params["dim"]
    if not isinstance(p, Apply) or p.operator is not ops.LOG_SOFTMAX or p.params["dim"] != dim:
        return None
    return Apply(ops.LOG_TAIL, p.args, a.shape, dim=dim)
