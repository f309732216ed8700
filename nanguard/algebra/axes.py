"""Which dim of a result comes from which dim of the tensors it was computed from. No torch in here.

On a square, ``exp(x) / exp(x).sum(1)`` divides columns by the totals of rows. That is a number like any other, but whoever
wrote it meant something else, and it is no softmax: such quotients are not recognised, and stay what they are.
"""

from __future__ import annotations

from nanguard.algebra import operators as ops
from nanguard.algebra.term import Apply, Leaf, Term

__all__ = ["is_misaligned"]

# For each dim of a term, how many dims its leaves have and which of them it runs along; `None` where that is not known, or
# there is none. Leaves of different ranks have no dim in common.
Axes = tuple["tuple[int, int] | None", ...]

_REDUCTIONS = frozenset({ops.LOGSUMEXP, ops.LOGMEANEXP, ops.SUM, ops.AMAX, ops.AMIN, ops.PRODUCT})


def is_misaligned(a: Term, b: Term) -> bool:
    """Whether broadcasting lays different dims of one shape side by side."""
    if not any(isinstance(term, Apply) for term in (a, b)):
        return False
    if len(a.shape) == len(b.shape) and a.shape == b.shape:
        return False
    if {len(leaf.shape) for leaf in (*a.leaves, *b.leaves)} == {1}:
        return False
    one, other = _axes(a), _axes(b)
    pairs = zip(reversed(_sized(one, a)), reversed(_sized(other, b)), strict=False)
    return any(first and second and first[0] == second[0] and first[1] != second[1] for first, second in pairs)


def _sized(axes: Axes, term: Term) -> Axes:
    return tuple(None if size == 1 else axis for axis, size in zip(axes, term.shape, strict=True))


def _axes(term: Term) -> Axes:
    rank = len(term.shape)
    if isinstance(term, Leaf):
        return tuple((rank, dim) for dim in range(rank))
    if term.operator in _REDUCTIONS:
        dims, keepdim = term.params["dim"], term.params["keepdim"]
        inner = enumerate(_axes(term.args[0]))
        return tuple(None if dim in dims else axis for dim, axis in inner if keepdim or dim not in dims)
    if term.operator is ops.PERMUTE:
        whole = _axes(term.args[0])
        return tuple(whole[dim] for dim in term.params["dims"])
    if term.operator is ops.RESHAPE:
        return _reshaped(_axes(term.args[0]), term.args[0].shape, term.shape)
    if term.operator.move:
        return (None,) * rank
    like = next((arg for arg in term.args if arg.shape == term.shape), None)
    return (None,) * rank if like is None else _axes(like)


def _reshaped(axes: Axes, old: tuple[int, ...], new: tuple[int, ...]) -> Axes:
    """Dims of size 1 come and go; whatever else happens to a shape mixes dims."""
    sized = [axis for axis, size in zip(axes, old, strict=True) if size != 1]
    if [size for size in old if size != 1] != [size for size in new if size != 1]:
        return (None,) * len(new)
    left = iter(sized)
    return tuple(None if size == 1 else next(left) for size in new)
