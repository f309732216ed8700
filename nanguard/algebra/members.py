"""Which elements of a line a sum consists of, so that a sum without some of its own summands is the sum of the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from nanguard.algebra import build
from nanguard.algebra import operators as ops
from nanguard.algebra.build import is_op, reduced
from nanguard.algebra.pattern import constant_of
from nanguard.algebra.term import Apply, Term
from nanguard.algebra.totals import as_total, logsumexp

__all__ = ["line", "picked_dim", "rest_of_members"]


class Members(NamedTuple):
    """The sum of some of the elements along a dim.

    Attributes:
        base: what the elements are taken from.
        dim: along which dim.
        places: which ones, in order, none of them twice.
    """

    base: Term
    dim: int
    places: Sequence[int]


def rest_of_members(whole: Term, part: Term) -> Term | None:
    """What is left of a sum without some of its own summands; `None` where these are no part of it."""
    found = _without_largest(whole, part)
    if found is not None:
        return found
    taken = _members(part)
    if taken is None:
        return None
    base, dim = taken.base, taken.dim
    places = _everything(whole, base, dim)
    if places is None or whole.shape not in (part.shape, ()):
        return None
    runs = _runs_without(places, taken.places)
    left = sum(map(len, runs))
    if not left or left + len(taken.places) != len(places):
        return None
    return build.reshape(_sum_of(base, dim, runs), part.shape)


def _everything(whole: Term, base: Term, dim: int) -> Sequence[int] | None:
    """The places of a sum along the same line: probabilities that sum to 1 are what 1 consists of."""
    source = base.args[0] if isinstance(base, Apply) and is_op(base, ops.SORTED) and base.params["dim"] == dim else base
    if constant_of(whole) == 1.0:
        complete = isinstance(source, Apply) and source.operator is ops.LOG_SOFTMAX and source.params["dim"] == dim
        return range(source.shape[dim]) if complete and type(source.shape[dim]) is int else None
    members = _members(whole)
    if members is None or members.dim != dim:
        return None
    if members.base != base and (members.base != source or len(members.places) != source.shape[dim]):
        return None
    return members.places


def _without_largest(whole: Term, part: Term) -> Term | None:
    """Rests on the same for the k largest, or smallest, which are chosen as they were."""
    total = as_total(_unfolded(part))
    top = total.args[0] if isinstance(total, Apply) and total.operator is ops.LOGSUMEXP else None
    if not isinstance(total, Apply) or not isinstance(top, Apply) or top.operator is not ops.TOPK or total.signed:
        return None
    dim, source, params = top.params["dim"], top.args[0], top.params
    if total.params["dim"] != (dim,) or whole.shape not in (part.shape, ()) or type(source.shape[dim]) is not int:
        return None
    places = _everything(whole, source, dim)
    if places is None or len(places) != source.shape[dim] or not 0 < params["k"] < len(places):
        return None
    rest = Apply(ops.WITHOUT_TOP, (source,), source.shape, **params)
    return build.reshape(logsumexp(rest, (dim,), True), part.shape)


def _members(term: Term) -> Members | None:
    """The summands that a number consists of, where they can be told apart."""
    term = as_total(_unfolded(term))
    if not isinstance(term, Apply) or term.signed:
        return None
    if term.operator is ops.LOGSUMEXP:
        return _of_total(term)
    if term.operator is ops.LOGADDEXP:
        one, other = map(_members, term.args)
        if one is None or other is None or one[:2] != other[:2] or set(one.places) & set(other.places):
            return None
        alike = term.args[0].shape == term.args[1].shape
        return Members(one.base, one.dim, sorted((*one.places, *other.places))) if alike else None
    return _of_pick(term)


def _unfolded(term: Term) -> Term:
    """A sum that has other dims of size 1, or that is known to be 1 minus something."""
    while isinstance(term, Apply) and term.operator in (ops.RESHAPE, ops.COMPLEMENT):
        inner = term.args[0]
        if term.operator is ops.RESHAPE and not _is_squeezed(term.shape, inner.shape):
            return term
        term = inner
    return term


def _is_squeezed(shape: Sequence[object], other: Sequence[object]) -> bool:
    short, long = sorted((tuple(shape), tuple(other)), key=len)
    return any(long[:place] + long[place + 1 :] == short and long[place] == 1 for place in range(len(long)))


def _of_total(term: Apply) -> Members | None:
    if len(term.params["dim"]) != 1:
        return None
    dim = term.params["dim"][0]
    found = line(term.args[0], dim)
    if found is None or _repeats(found[1]):
        return None
    return Members(found[0], dim, found[1])


def _of_pick(term: Apply) -> Members | None:
    """One element, or the sum of all others, or of all up to it."""
    dim = picked_dim(term)
    if dim is None:
        return None
    shapes = [reduced(term.args[0].shape, (dim,), keep) for keep in (True, False)]
    found = _line(term, dim)
    if found is None or term.shape not in shapes or len(found[1]) != 1:
        return None
    inner, (place,) = found
    if not isinstance(inner, Apply) or inner.params.get("dim") != dim:
        return Members(inner, dim, (place,))
    if inner.operator not in (ops.LOG_OTHERS, ops.LOG_REST, ops.LOGCUMSUMEXP):
        return Members(inner, dim, (place,))
    source = inner.args[0]
    if inner.operator is ops.LOG_REST:
        source = build.log_softmax(source, dim)
    whole = line(source, dim)
    if whole is None or _repeats(whole[1]):
        return None
    base, places = whole
    if inner.operator is ops.LOGCUMSUMEXP:
        return Members(base, dim, places[: place + 1])
    return Members(base, dim, [*places[:place], *places[place + 1 :]])


def picked_dim(term: Apply) -> int | None:
    """The only dim along which elements are picked."""
    if term.operator in (ops.SELECT, ops.NARROW):
        return int(term.params["dim"])
    if term.operator is not ops.INDEX:
        return None
    key = _key(term)
    dims = [place for place, entry in enumerate(key or ()) if not (type(entry) is slice and entry == slice(None))]
    return dims[0] if len(dims) == 1 else None


def line(term: Term, dim: int) -> tuple[Term, Sequence[int]] | None:
    """What the elements along `dim` were picked from, and which they are; `None` where nobody knows how many there are."""
    return _line(term, dim) if len(term.shape) > dim else None


def _line(term: Term, dim: int) -> tuple[Term, Sequence[int]] | None:
    if isinstance(term, Apply) and term.operator in (ops.SELECT, ops.NARROW, ops.INDEX) and picked_dim(term) == dim:
        source = _line(term.args[0], dim)
        chosen = None if source is None else _chosen(term, dim, len(source[1]))
        if source is not None and chosen is not None:
            return source[0], _nested(source[1], chosen)
    size = term.shape[dim] if len(term.shape) > dim else None
    return (term, range(size)) if type(size) is int else None


def _chosen(term: Apply, dim: int, size: int) -> Sequence[int] | None:
    """The places that are picked from a line."""
    if term.operator is ops.NARROW:
        start, length = term.params["start"], term.params["length"]
        return range(start % size, start % size + length) if type(start) is type(length) is int else None
    entry = term.params["index"] if term.operator is ops.SELECT else (_key(term) or ())[dim]
    if type(entry) is int:
        return [entry % size]
    if type(entry) is slice:
        numbers = all(type(part) in (int, type(None)) for part in (entry.start, entry.stop, entry.step))
        return range(*entry.indices(size)) if numbers else None
    if isinstance(entry, (list, range)) and all(type(place) is int for place in entry):
        return [place % size for place in entry]
    return None


def _key(term: Apply) -> tuple[object, ...] | None:
    """What is picked along each dim; `None` for keys that add dims."""
    key = term.params["key"]
    entries: tuple[object, ...] = key if isinstance(key, tuple) else (key,)
    rank = len(term.args[0].shape)
    dots = [place for place, entry in enumerate(entries) if entry is Ellipsis]
    missing = (slice(None),) * (rank - len(entries) + len(dots))
    place = dots[0] if dots else len(entries)
    entries = (*entries[:place], *missing, *entries[place + 1 :])
    simple = all(type(entry) in (int, slice, list, range) for entry in entries)
    return entries if simple and len(entries) == rank else None


def _nested(places: Sequence[int], chosen: Sequence[int]) -> Sequence[int]:
    """Places among places; neighbours stay a range, however many there are."""
    if isinstance(chosen, range):
        return places[chosen.start : chosen.stop : chosen.step]
    return [places[place] for place in chosen]


def _repeats(places: Sequence[int]) -> bool:
    return not isinstance(places, range) and len(set(places)) != len(places)


def _runs_without(places: Sequence[int], taken: Sequence[int]) -> list[range]:
    """The neighbours that are left."""
    if isinstance(places, range) and isinstance(taken, range) and places.step == taken.step == 1 and taken:
        ends = [range(places.start, min(taken.start, places.stop)), range(max(taken.stop, places.start), places.stop)]
        return [run for run in ends if run]
    gone = taken if isinstance(taken, range) else set(taken)
    runs: list[range] = []
    for place in sorted(places):
        if place in gone:
            continue
        if runs and place == runs[-1].stop:
            runs[-1] = range(runs[-1].start, place + 1)
        else:
            runs.append(range(place, place + 1))
    return runs


def _sum_of(base: Term, dim: int, runs: Sequence[range]) -> Term:
    """The sum of these elements, in as few pieces as they lie in; more than two are collected first."""
    if len(runs) > 2:
        places = [place for run in runs for place in run]
        key = (*(slice(None),) * dim, places)
        shape = (*base.shape[:dim], len(places), *base.shape[dim + 1 :])
        return logsumexp(build.rearrange(ops.INDEX, (base,), shape, key=key), (dim,), True)
    sums = [_sum_of_run(base, dim, run.start, len(run)) for run in runs]
    return sums[0] if len(sums) == 1 else Apply(ops.LOGADDEXP, tuple(sums), sums[0].shape)


def _sum_of_run(base: Term, dim: int, start: int, length: int) -> Term:
    if length == base.shape[dim]:
        return logsumexp(base, (dim,), True)
    shape = (*base.shape[:dim], length, *base.shape[dim + 1 :])
    run = build.rearrange(ops.NARROW, (base,), shape, dim=dim, start=start, length=length)
    return run if length == 1 else logsumexp(run, (dim,), True)
