"""Quotients that may overflow although their logarithm does not, and what takes their place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor

from nanguard.algebra import Apply, Term
from nanguard.algebra.decisions import for_quotient, is_begun_anew
from nanguard.stabilizer import environment
from nanguard.stabilizer.accuracy import keeps_digits
from nanguard.stabilizer.answers import Answer, answer_by, grafted
from nanguard.stabilizer.evaluate import compute_dtype
from nanguard.stabilizer.graft import graft_in_place, may_be_overwritten
from nanguard.stabilizer.knowledge import Known
from nanguard.stabilizer.picked import LARGE
from nanguard.stabilizer.regions import Stay
from nanguard.stabilizer.report import Report
from nanguard.stabilizer.restarts import Beginning, Restart

__all__ = ["Quotient", "Quotients"]

_SAVE_NO_RESULT = frozenset({"DivBackward0", "MulBackward0"})


class Quotient(NamedTuple):
    """What the user's code gets.

    Attributes:
        value: the quotient.
        differentiable: what of it derivatives flow through.
        exact: whether it has all its digits.
        beginnings: what is remembered of it, where that is not where it came from.
    """

    value: Tensor
    differentiable: Tensor
    exact: bool
    beginnings: Sequence[Beginning] = ()


@final
class Quotients:
    """Replaces quotients.

    Arguments:
        report: where swaps are noted.
        stay: says whether a swap may happen where the code is.
    """

    def __init__(self, report: Report, stay: Stay) -> None:
        self._report = report
        self._stay = stay

    def answer(
        self, term: Term, parents: Sequence[Known], naive: Tensor, in_place: bool, operands: Sequence[Known]
    ) -> tuple[Answer, list[Tensor]] | None:
        """What takes the place of a result, and what it is computed from; `None` where it stays.

        Arguments:
            term: its logarithm.
            parents: what is known of its operands.
            naive: as the user's code computed it.
            in_place: whether it did so in place.
            operands: the parents in the order that they have in all calls that look the same.
        """
        differentiable = naive.requires_grad or environment.in_transform()
        found = for_quotient(term, (known.term for known in parents), in_place=in_place, differentiable=differentiable)
        if found is None:
            return None
        answer, values = answer_by(*found, naive.dtype)
        again = any(known.again for known in parents)
        if isinstance(term, Apply) and not in_place and is_begun_anew(term, again=again):
            restart = Restart(term, [known.term for known in operands], compute_dtype(term, naive.dtype))
            if list(map(id, restart.values)) == list(map(id, values)):
                answer.restart = restart
        return answer, values

    def swap(
        self,
        answer: Answer,
        values: Sequence[Tensor],
        naive: Tensor,
        parents: tuple[Known, ...],
        divisor: Tensor | None,
        in_place: bool = False,
    ) -> Quotient:
        """What the user's code gets.

        Arguments:
            answer: what takes its place.
            values: what that is computed from.
            naive: the quotient as written.
            parents: what is known of its operands.
            divisor: what it was divided by, where the quotient has all its digits if that is moderate.
            in_place: whether the user's code computed it in place.
        """
        kept = Quotient(naive, naive, exact=False)
        forced = answer.restart is not None and answer.restart.forced
        if divisor is not None and not forced and self._stay.may_keep(parents) and keeps_digits(divisor):
            self._report.add(answer.rule, answer.written(values), answer)
            return Quotient(naive, naive, exact=True)
        if (in_place and not may_be_overwritten(naive)) or not self._stay.may_swap(parents):
            return kept
        stable, beginnings = answer.computed_with_beginnings(values, naive)
        if stable is None:
            return kept
        self._report.add(answer.rule, answer.written(values), answer)
        if in_place:
            return Quotient(graft_in_place(naive, stable, None), stable, exact=False)
        if _may_take_its_memory(naive, stable, answer.dtype):
            return Quotient(graft_in_place(naive, stable, None), stable, True, beginnings)
        value = grafted(naive, stable, answer.fresh, answer.dtype, None, _unchanged)
        return Quotient(value, stable, True, beginnings)


def _may_take_its_memory(naive: Tensor, stable: Tensor, dtype: torch.dtype) -> bool:
    """Whether a large quotient, which nobody has seen yet, may be overwritten: then no more memory need be had for another."""
    if naive.numel() < LARGE or naive.dtype != dtype or stable.dtype != dtype:
        return False
    if type(naive.grad_fn).__name__ not in _SAVE_NO_RESULT or naive._base is not None:
        return False
    if not environment.may_look(naive.device):
        return False
    return torch.is_grad_enabled() and stable.requires_grad and math.isfinite(stable.detach().sum().item())


def _unchanged(naive: Tensor) -> Tensor:
    return naive
