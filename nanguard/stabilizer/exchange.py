"""What a block is told by compiled code, and tells it.

A recomputation is told nothing, and has no block to ask: no checkpoint may be around.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from nanguard.algebra import Apply, Term
from nanguard.algebra import operators as ops
from nanguard.algebra.decisions import for_logarithm
from nanguard.algebra.pattern import operators
from nanguard.algebra.term import Operator
from nanguard.stabilizer import environment
from nanguard.stabilizer.knowledge import Knowledge, Known
from nanguard.stabilizer.memory import owns_memory
from nanguard.stabilizer.outline import outlined
from nanguard.stabilizer.regions import Stay
from nanguard.stabilizer.report import Report

__all__ = ["Exchange", "is_probability"]

# Inside a term these may have made a number negative, or 0 where derivatives at a weight are needed.
_OF_EITHER_SIGN = frozenset(
    operator.name
    for operator in vars(ops).values()
    if isinstance(operator, Operator) and operator.sign in ("any", "as first")
) | {ops.DISTANCE.name, ops.CLOSENESS.name, ops.POWER.name}
# What is looked at here is looked at by nobody else.
_without_modes = torch._C.DisableTorchFunction


@final
class Exchange:
    """The side of a block that compiled code deals with.

    Arguments:
        knowledge: what the block knows.
        stay: where the code is.
        report: where answers are noted; not those to compiled code, which has a record of its own.
        drop: whether small epsilons inside logarithms are dropped.
        answer: what the block makes of a call of torch.
    """

    def __init__(
        self, knowledge: Knowledge, stay: Stay, report: Report, drop: bool, answer: Callable[..., Any]
    ) -> None:
        self._knowledge = knowledge
        self._stay = stay
        self._report = report
        self._drop = drop
        self._answer = answer

    def receive(self, tensor: Tensor, term: Term, parents: tuple[Known, ...] = ()) -> None:
        """Learn the logarithm of what compiled code has computed.

        Arguments:
            tensor: that.
            term: the logarithm.
            parents: what was known of the tensors that it was computed from.
        """
        outline, values, versions = outlined(term)
        trusted = all(map(self._knowledge.is_trusted, (tensor, *values))) and all(map(owns_memory, values))
        if trusted and self._is_alone():
            self._knowledge.record(tensor, outline, values, versions, parents)

    def known(self, tensor: Tensor) -> Known | None:
        """What is known about a tensor that compiled code is given."""
        with _without_modes():
            known = self._knowledge.find(tensor) if self._is_alone() else None
            return None if known is None or self._knowledge.are_pinned((known,)) else known

    def replaces(self, known: Known) -> bool:
        """Whether its logarithm says all, and is not computed as written."""
        return not _may_be_negative(known.outline) and for_logarithm(known.term, drop=self._drop) is not None

    def logarithm(self, tensor: Tensor, odds: bool) -> Tensor | None:
        """The logarithm of such a tensor, or that of its odds p / (1 - p), as the user's code would get it."""
        known = self.known(tensor)
        if known is None or _may_be_negative(known.outline) or (odds and not is_probability(known.outline)):
            return None
        with _without_modes(), self._report.muted():
            logarithm: Tensor = self._answer(torch.log, (), (tensor,))
            if not odds:
                return logarithm
            rest: Tensor = self._answer(torch.log, (), (self._answer(torch.rsub, (), (tensor, 1)),))
            return logarithm - rest

    def _is_alone(self) -> bool:
        return not environment.is_tracing() and self._stay.look() and self._stay.may_keep(())


def _may_be_negative(term: Term) -> bool:
    """Whether there is more to a number than its logarithm."""
    return term.signed or bool(operators(term) & _OF_EITHER_SIGN)


def is_probability(term: Term) -> bool:
    """Whether it is the logarithm of (some elements of) a softmax or a sigmoid."""
    while isinstance(term, Apply) and term.operator.move and len(term.args) == 1:
        term = term.args[0]
    return isinstance(term, Apply) and term.operator in (ops.LOG_SOFTMAX, ops.LOG_SIGMOID)
