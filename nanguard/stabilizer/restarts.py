"""Where recursions go on from: the logarithm of what was replaced, as a tensor.

The logarithm of a quotient that was replaced has been computed. What is remembered of it is then not where it comes from, but
that tensor, as part of its graph: the next step of a recursion (scaled forward probabilities, Sinkhorn, particle weights) is
computed from there, and not from the first step on.

What is no quotient, but comes from a long history, is remembered as well (`Reminder`): its logarithm is computed beside it,
from those of what it came from, which were begun anew themselves. What the user's code gets stays as it is.

1. Of softmaxes and sigmoids it is their argument that is remembered so: they stay what they are.
2. What was divided is remembered so, too, if it has a long history of its own, and so is its total.
3. Numbers that may be negative are remembered as a factor times an exponential.

That is sound since a quotient is replaced only where nobody watches derivatives at anything that it came from: derivatives of
the quotient itself do not go by there any more. Those of what is no quotient do: whoever begins to watch them later is seen
by the `Lineage`, which stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from nanguard.algebra import Apply, Leaf, Term
from nanguard.algebra import operators as ops
from nanguard.algebra.decisions import is_long, stem
from nanguard.stabilizer.evaluate import compute_dtype, evaluate_stem, exponential_with_parts
from nanguard.stabilizer.outline import outlined_together
from nanguard.stabilizer.scaled import Scaled, settled

__all__ = ["Beginning", "Reminder", "Restart"]


class Beginning(NamedTuple):
    """What is remembered.

    Attributes:
        operand: of which operand; -1 for the quotient itself.
        outline: its logarithm.
        values: what that consists of.
    """

    operand: int
    outline: Term
    values: list[Tensor]

    def lesson(self, tensor: Tensor, again: bool) -> object:
        """What the tensor that it is about is learnt by: the same for all that look the same."""
        looks = tuple((value.shape, value.dtype, value.device, value.requires_grad) for value in (tensor, *self.values))
        if len(_LESSONS) >= _MOST:
            _LESSONS.clear()
        return _LESSONS.setdefault((_form(self.outline), looks, again), object())


_LESSONS: dict[Any, object] = {}
_MOST = 4096
# Of larger tensors nothing is computed that nobody has asked for.
_MOST_ELEMENTS = 1 << 16


def _form(outline: Term) -> Any:
    if isinstance(outline, Leaf):
        return outline.value, outline.tracked
    return outline.operator.name, outline.shape, tuple(outline.params.items()), tuple(map(_form, outline.args))


@final
class Restart:
    """How a quotient is computed together with what is remembered of it.

    Arguments:
        term: its logarithm.
        operands: the logarithms of its operands.
        dtype: what to compute in.

    Attributes:
        values: the tensors that it is computed from, this time.
        forced: whether the quotient is replaced although it has all its digits, as too much would be remembered otherwise.
    """

    __slots__ = ("_run", "_totals", "_upper", "_whole", "forced", "values")

    def __init__(self, term: Apply, operands: Sequence[Term], dtype: torch.dtype) -> None:
        self.forced = is_long(term)
        self._upper = [at for at, operand in enumerate(operands) if is_long(operand) and _contains(term, operand)]
        self._totals: list[tuple[int, int, Apply]] = []
        for at, operand in enumerate(operands):
            for place, upper in enumerate(self._upper):
                if isinstance(operand, Apply) and operand.operator in _TOTALS and operand.args[0] == operands[upper]:
                    self._totals.append((at, place, operand))
        (whole, *parts), self.values = outlined_together([term, *(operands[at] for at in self._upper)])
        self._whole = whole
        self._run = exponential_with_parts(whole, parts, dtype)

    def computed(self, values: Sequence[Tensor]) -> tuple[Tensor, list[Beginning]]:
        """The quotient from these tensors, and what is remembered."""
        result, own, parts = self._run(values)
        whole = self._whole
        found = [_beginning(whole, own)]
        terms = []
        for at, part in zip(self._upper, parts, strict=True):
            outline, leaves = _as_term(part, tuple(part.log.shape))
            terms.append((outline, leaves))
            found.append(Beginning(at, outline, leaves))
        for at, place, total in self._totals:
            outline, leaves = terms[place]
            found.append(Beginning(at, Apply(total.operator, (outline,), total.shape, **total.params), leaves))
        return result, found


@final
class Reminder:
    """How the logarithm of what is no quotient is computed in order to be remembered.

    Arguments:
        term: its logarithm.
        outline: the outline of that.
        dtype: of the tensor that it is the logarithm of.
    """

    __slots__ = ("_inner", "_outline")

    def __init__(self, term: Term, outline: Term, dtype: torch.dtype) -> None:
        self._outline = outline
        self._inner = compute_dtype(term, dtype)

    def computed(self, values: Sequence[Tensor], naive: Tensor) -> Beginning | None:
        """What is remembered of a tensor, given what its logarithm consists of; `None` where that is not to be had."""
        if naive.numel() > _MOST_ELEMENTS or any(value.device != naive.device for value in values):
            return None
        kind = naive.device.type
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            beginning = _beginning(self._outline, evaluate_stem(self._outline, self._inner, values))
        same = any(value.requires_grad for value in beginning.values) == naive.requires_grad
        return beginning if same else None


_TOTALS = (ops.LOGSUMEXP, ops.LOGMEANEXP)


def _beginning(whole: Term, number: Scaled) -> Beginning:
    """What is remembered of an outline, given the number that its stem is."""
    if stem(whole) is whole:
        return Beginning(-1, *_as_term(number, whole.shape))
    assert isinstance(whole, Apply)
    outline, leaves = _as_term(number, stem(whole).shape)
    return Beginning(-1, Apply(whole.operator, (outline,), whole.shape, **whole.params), leaves)


def _as_term(number: Scaled, shape: tuple[int, ...]) -> tuple[Term, list[Tensor]]:
    values = [part.expand(shape) for part in settled(number) if part is not None]
    leaves = [Leaf(place, shape, 0, value.requires_grad) for place, value in enumerate(values)]
    return (leaves[0] if len(leaves) == 1 else Apply(ops.FACTOR, tuple(leaves), shape)), values


def _contains(term: Term, part: Term) -> bool:
    return term is part or (isinstance(term, Apply) and any(_contains(arg, part) for arg in term.args))
