"""Memory that is filled piece by piece: what it holds is known once every element has been assigned.

What stands in uninitialised memory may be anything, so nothing is known of a buffer of which elements are left: its term is
`UNFINISHED`, and laws other than assignment see a tensor that nothing is known of. Elements are left in boxes: for each
dim, an integer whose bits say which places are meant.
"""

from __future__ import annotations

from typing import Any

from nanguard.algebra import operators as ops
from nanguard.algebra.build import is_op
from nanguard.algebra.term import Apply, Leaf, Shape, Term, Unrecognised

__all__ = ["written"]

Box = tuple[int, ...]

# Of anything filled less orderly nothing is known.
MOST_BOXES = 64


def written(base: Term, value: Term, key: Any, *, mask: bool = False) -> Term:
    """A buffer after an assignment to it. Raises `Unrecognised` where a key may name an element twice, or base is none.

    Arguments:
        base: the buffer: constant, filled, or in the making.
        value: the logarithm of what is assigned.
        key: where.
        mask: whether the key is one tensor of bools.
    """
    if not isinstance(base, Apply) or not is_op(base, ops.FULL, ops.WRITTEN, ops.EMPTY, ops.FILLING):
        raise Unrecognised
    plain = _is_plain(key)
    if not (plain or mask or _is_one_of_each_row(key, base.shape)):
        raise Unrecognised
    if base.operator is ops.WRITTEN:
        return Apply(ops.WRITTEN, (value, base), base.shape, key=key)
    left = _left(base)
    if plain and left:
        left = _without(left, _box(key, base.shape))
    filling = Apply(ops.FILLING, (value, base), base.shape, key=key, left=left)
    return filling if left or not _has_values(filling) else _finished(filling)


def _is_plain(key: Any) -> bool:
    entries = key if isinstance(key, tuple) else (key,)
    return bool(entries) and all(type(entry) in (int, slice) or entry is Ellipsis for entry in entries)


def _is_one_of_each_row(key: Any, shape: Shape) -> bool:
    """Whether it is `[0, 1, ..., n - 1; y]`, which names no element twice."""
    entries = key if isinstance(key, tuple) else ()
    rows = entries[0] if len(entries) == len(shape) > 1 else None
    return (
        isinstance(rows, Leaf)
        and rows.shape == shape[:1]
        and all(isinstance(entry, Leaf) and entry.shape == rows.shape for entry in entries)
        and rows.counts()
    )


def _left(base: Apply) -> tuple[Box, ...]:
    if base.operator is ops.FILLING:
        left: tuple[Box, ...] = base.params["left"]
        return left
    if base.operator is ops.FULL:
        return ()
    if not all(type(size) is int for size in base.shape):
        raise Unrecognised
    return (tuple((1 << size) - 1 for size in base.shape),)


def _box(key: Any, shape: Shape) -> Box:
    entries = key if isinstance(key, tuple) else (key,)
    places = [place for place, entry in enumerate(entries) if entry is Ellipsis]
    if places:
        rest = (slice(None),) * (len(shape) - len(entries) + 1)
        entries = (*entries[: places[0]], *rest, *entries[places[0] + 1 :])
    if len(places) > 1 or len(entries) > len(shape):
        raise Unrecognised
    entries = (*entries, *(slice(None),) * (len(shape) - len(entries)))
    return tuple(_bits(entry, size) for entry, size in zip(entries, shape, strict=True))


def _bits(entry: Any, size: int) -> int:
    if type(entry) is int:
        return 1 << (entry % size) if -size <= entry < size else 0
    if not all(part is None or type(part) is int for part in (entry.start, entry.stop, entry.step)):
        raise Unrecognised
    places = range(size)[entry]
    return (((1 << places.step * len(places)) - 1) // ((1 << places.step) - 1)) << places.start if places else 0


def _without(left: tuple[Box, ...], taken: Box) -> tuple[Box, ...]:
    found: list[Box] = []
    for box in left:
        if not all(mine & other for mine, other in zip(box, taken, strict=True)):
            found.append(box)
            continue
        for dim, (mine, other) in enumerate(zip(box, taken, strict=True)):
            if mine & ~other:
                common = (one & two for one, two in zip(box[:dim], taken[:dim], strict=True))
                found.append((*common, mine & ~other, *box[dim + 1 :]))
    if len(found) > MOST_BOXES:
        raise Unrecognised
    return tuple(found)


def _has_values(filling: Term) -> bool:
    """Whether anything but numbers was assigned."""
    while isinstance(filling, Apply) and filling.operator is ops.FILLING:
        if filling.args[0].leaves:
            return True
        filling = filling.args[1]
    return False


def _finished(filling: Apply) -> Term:
    """The same, where no element of what stood there before is left."""
    steps = []
    base: Term = filling
    while isinstance(base, Apply) and base.operator is ops.FILLING:
        steps.append(base)
        base = base.args[1]
    if is_op(base, ops.EMPTY):
        base = Apply(ops.FULL, (), base.shape, constant=0.0)
    for step in reversed(steps):
        base = Apply(ops.WRITTEN, (step.args[0], base), base.shape, key=step.params["key"])
    return base
