"""Where recursions go on from: the logarithm of what was replaced, as a tensor.

The logarithm of a quotient that was replaced has been computed. What is remembered of it is then not where it comes from, but
that tensor, as part of its graph: the next step of a recursion (scaled forward probabilities, Sinkhorn, particle weights) is
computed from there, and not from the first step on.

1. Of softmaxes and sigmoids it is their argument that is remembered so: they stay what they are.
2. What was divided is remembered so, too, if it has a long history of its own, and so is its total.
3. Numbers that may be negative are remembered as a factor times an exponential.

That is sound since a quotient is replaced only where nobody watches derivatives at anything that it came from: derivatives of
the quotient itself do not go by there any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from nanguard.algebra import Apply, Leaf, Term
from nanguard.algebra import operators as ops
from nanguard.algebra.decisions import is_long, stem
from nanguard.algebra.totals import weigh
from nanguard.stabilizer.evaluate import exponential_with_parts
from nanguard.stabilizer.outline import outlined_together
from nanguard.stabilizer.scaled import Scaled

__all__ = ["Beginning", "Restart"]


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
        assert isinstance(whole, Apply)
        outline, leaves = _as_term(own, whole.shape if stem(whole) is whole else stem(whole).shape)
        if stem(whole) is not whole:
            outline = Apply(whole.operator, (outline,), whole.shape, **whole.params)
        found = [Beginning(-1, outline, leaves)]
        terms = []
        for at, part in zip(self._upper, parts, strict=True):
            outline, leaves = _as_term(part, tuple(part.log.shape))
            terms.append((outline, leaves))
            found.append(Beginning(at, outline, leaves))
        for at, place, total in self._totals:
            outline, leaves = terms[place]
            found.append(Beginning(at, Apply(total.operator, (outline,), total.shape, **total.params), leaves))
        return result, found


_TOTALS = (ops.LOGSUMEXP, ops.LOGMEANEXP)


def _as_term(number: Scaled, shape: tuple[int, ...]) -> tuple[Term, list[Tensor]]:
    values = [part.expand(shape) for part in number if part is not None]
    leaves = [Leaf(place, shape, 0, value.requires_grad) for place, value in enumerate(values)]
    return (leaves[0] if len(leaves) == 1 else weigh(leaves[0], leaves[1])), values


def _contains(term: Term, part: Term) -> bool:
    return term is part or (isinstance(term, Apply) and any(_contains(arg, part) for arg in term.args))
