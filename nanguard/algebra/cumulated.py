"""Differences of cumulated sums and products: what was added, or left over, in between."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from nanguard.algebra import build
from nanguard.algebra import operators as ops
from nanguard.algebra.build import is_op
from nanguard.algebra.members import line, picked_dim
from nanguard.algebra.pattern import constant_of
from nanguard.algebra.term import Apply, Term
from nanguard.algebra.totals import logcumsumexp, logsumexp

__all__ = ["between_cumulated"]

Complement = Callable[[Term, float], Term]


class _Part(NamedTuple):
    """Neighbours in a cumulated sum or product along a dim."""

    source: Apply
    dim: int
    start: int
    length: int


def between_cumulated(a: Term, b: Term, complement: Complement) -> Term | None:
    """The logarithm of the difference of two cumulated sums, or products, of the same numbers."""
    found = _of_whole(a, b, complement)
    if found is not None:
        return found
    one, other = _part(a), _part(b)
    if one is None or other is None or a.shape != b.shape or one.source != other.source:
        return None
    lag = one.start - other.start
    if lag == 0 or (one.dim, one.length) != (other.dim, other.length):
        return None
    later, earlier = (one, other) if lag > 0 else (other, one)
    if one.source.operator is ops.LOGCUMSUMEXP:
        inner = _sum_between(later, earlier)
        return inner if lag > 0 else build.minus(inner)
    if abs(lag) > 1:
        return None
    # p_1 ... p_k - p_1 ... p_(k+1) = p_1 ... p_k (1 - p_(k+1))
    factor = _narrowed(one.source.args[0], one.dim, later.start, later.length)
    lost = build.add(b if lag > 0 else a, complement(factor, 1.0))
    return build.minus(lost) if lag > 0 else lost


def _part(term: Term) -> _Part | None:
    """Neighbours along the dim of a cumulated sum or product."""
    source = term
    while isinstance(source, Apply) and source.operator in (ops.NARROW, ops.INDEX):
        source = source.args[0]
    if not is_op(source, ops.LOGCUMSUMEXP, ops.CUMSUM) or source.signed or len(term.shape) != len(source.shape):
        return None
    assert isinstance(source, Apply)
    dim = source.params["dim"]
    found = line(term, dim)
    if found is None or found[0] != source or (term is not source and picked_dim(term) != dim):  # type: ignore[arg-type]
        return None
    places = found[1]
    if not places or list(places) != list(range(places[0], places[0] + len(places))):
        return None
    return _Part(source, dim, places[0], len(places))


def _narrowed(term: Term, dim: int, start: int, length: int) -> Term:
    if length == term.shape[dim]:
        return term
    shape = (*term.shape[:dim], length, *term.shape[dim + 1 :])
    return build.rearrange(ops.NARROW, (term,), shape, dim=dim, start=start, length=length)


def _sum_between(later: _Part, earlier: _Part) -> Term:
    """The sum of those from one place to the next, for each."""
    lag, dim, x = later.start - earlier.start, later.dim, later.source.args[0]
    between = _narrowed(x, dim, earlier.start + 1, later.length + lag - 1)
    if lag == 1:
        return between
    shape = (*x.shape[:dim], later.length, *x.shape[dim + 1 :], lag)
    windows = build.rearrange(ops.UNFOLD, (between,), shape, dimension=dim, size=lag, step=1)
    return logsumexp(windows, (len(x.shape),), False)


def _of_whole(a: Term, b: Term, complement: Complement) -> Term | None:
    """A cumulated sum, or product, and what it is compared to as a whole."""
    if isinstance(b, Apply) and b.operator is ops.LOGCUMSUMEXP and not b.signed:
        total = isinstance(a, Apply) and a.operator is ops.LOGSUMEXP and a.args[0] == b.args[0]
        if total and a.params["dim"] == (b.params["dim"],) and a.params["keepdim"]:  # type: ignore[union-attr]
            return _behind(b)
    if isinstance(a, Apply) and a.operator is ops.LOGCUMSUMEXP and not a.signed and a.args[0] == b:
        return _before(a)
    turned = _turned(a, b)
    if turned is not None and (found := _before(turned)) is not None:
        return build.rearrange(ops.FLIP, (found,), a.shape, dims=(turned.params["dim"],))
    if isinstance(b, Apply) and b.operator is ops.CUMSUM and not b.signed and _is_shifted(a, b):
        return build.add(a, complement(b.args[0], 1.0))
    return None


def _turned(a: Term, b: Term) -> Apply | None:
    """The cumulated sum, from the last to the first, that was turned around once more; of what it is compared to."""
    inner = a.args[0] if isinstance(a, Apply) and a.operator is ops.FLIP else None
    if not isinstance(inner, Apply) or inner.operator is not ops.LOGCUMSUMEXP or inner.signed:
        return None
    source, dims = inner.args[0], (inner.params["dim"],)
    turned = isinstance(source, Apply) and source.operator is ops.FLIP and source.args[0] == b
    return inner if turned and a.params["dims"] == source.params["dims"] == dims else None  # type: ignore[union-attr]


def _before(total: Apply) -> Term | None:
    """The sums of those before each: the first of them is empty."""
    dim, rank = total.params["dim"], len(total.shape)
    if type(total.shape[dim]) is not int or total.shape[dim] < 2:
        return None
    earlier = _narrowed(total, dim, 0, total.shape[dim] - 1)
    pad = (0, 0) * (rank - 1 - dim) + (1, 0)
    return Apply(ops.PADDED, (earlier,), total.shape, pad=pad, value=-math.inf)


def _behind(total: Apply) -> Term | None:
    """The sums of those behind each: the last of them is empty."""
    dim, rank = total.params["dim"], len(total.shape)
    if type(total.shape[dim]) is not int or total.shape[dim] < 2:
        return None
    later = _narrowed(total.args[0], dim, 1, total.shape[dim] - 1)
    turned = build.rearrange(ops.FLIP, (later,), later.shape, dims=(dim,))
    sums = build.rearrange(ops.FLIP, (logcumsumexp(turned, dim),), later.shape, dims=(dim,))
    pad = (0, 0) * (rank - 1 - dim) + (0, 1)
    return Apply(ops.PADDED, (sums,), total.shape, pad=pad, value=-math.inf)


def _is_shifted(a: Term, b: Apply) -> bool:
    """Whether it is a cumulated product that starts from 1, one place behind."""
    dim, rank = b.params["dim"], len(b.shape)
    if not isinstance(a, Apply) or a.shape != b.shape or type(b.shape[dim]) is not int:
        return False
    if a.operator is ops.PADDED:
        begins = tuple(a.params["pad"]) == (0, 0) * (rank - 1 - dim) + (1, 0) and a.params["value"] == 0.0
    else:
        begins = a.operator is ops.CAT and a.params["dim"] == dim and len(a.args) == 2
        begins = begins and constant_of(a.args[0]) == 1.0 and a.args[0].shape[dim] == 1
    earlier = _part(a.args[-1]) if begins else None
    return earlier is not None and earlier.source == b and (earlier.start, earlier.length) == (0, b.shape[dim] - 1)
