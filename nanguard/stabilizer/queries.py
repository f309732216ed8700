"""Calls that ask for a logarithm, or that are given something else than they expect, and what they are answered."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from nanguard.algebra import Law, Rule, Term, lookup
from nanguard.algebra.decisions import for_logarithm
from nanguard.algebra.families.epsilon import drop_epsilons
from nanguard.stabilizer import environment
from nanguard.stabilizer.accuracy import keeps_digits
from nanguard.stabilizer.advisor import Advisor
from nanguard.stabilizer.answers import Answer, answer_by, grafted
from nanguard.stabilizer.calls import Look
from nanguard.stabilizer.graft import Derivative, Function, graft_in_place, is_worse, may_be_overwritten
from nanguard.stabilizer.knowledge import Knowledge, Known
from nanguard.stabilizer.losses import BinaryCrossEntropy
from nanguard.stabilizer.memo import UNSEEN, Memo, Reply
from nanguard.stabilizer.reading import Reading
from nanguard.stabilizer.regions import Stay
from nanguard.stabilizer.report import Report

__all__ = ["Queries"]

# The gradients of the queries, where somebody asks for the derivative at q itself. They divide: 1 / q overflows sooner.
_SLOPES: dict[str, Derivative] = {
    "log": torch.div,
    "log2": lambda grad, q: grad / (q * math.log(2)),
    "log10": lambda grad, q: grad / (q * math.log(10)),
    "log1p": lambda grad, q: grad / (q + 1),
}
_LOGARITHMS = frozenset({"log", "log2", "log10"})
_REPLIES = Memo()


@final
class _Query:
    """One query.

    Attributes:
        law: what is asked for.
        subject: of which tensor.
        parents: what is known of that.
        call: what the user's code calls.
        floored: what stands under the bounds of `torch.distributions`, where they ask.
    """

    __slots__ = ("call", "floored", "law", "parents", "subject")

    def __init__(
        self, law: Law, subject: Tensor, parents: tuple[Known, ...], call: partial[Any], floored: Term | None = None
    ) -> None:
        self.law = law
        self.subject = subject
        self.parents = parents
        self.call = call
        self.floored = floored

    def plain(self, q: Tensor) -> Tensor:
        """The query as a function of what it asks about; one that works in place gets memory of its own."""
        fresh, subject, call = q.clone(), self.subject, self.call
        named = {name: fresh if value is subject else value for name, value in call.keywords.items()}
        result: Tensor = call.func(*(fresh if value is subject else value for value in call.args), **named)
        return result


@final
class Queries:
    """Answers queries.

    Arguments:
        report: where swaps are noted.
        advisor: looks at what was swapped, and at calls that are misused.
        knowledge: is told about edits.
        stay: says whether a swap may happen where the code is.
        drop: whether small epsilons inside logarithms are dropped.
        repair: whether bounds that libraries put on probabilities are dropped.
    """

    def __init__(
        self, report: Report, advisor: Advisor, knowledge: Knowledge, stay: Stay, drop: bool, repair: bool
    ) -> None:
        self._report = report
        self._advisor = advisor
        self._knowledge = knowledge
        self._stay = stay
        self._drop = drop
        self._repair = repair

    def answer_again(self, law: Law, look: Look, call: partial[Any]) -> Any:
        """The answer to a query that looks like an earlier one; `None` where there is none, `UNSEEN` if there was no such."""
        reply = _REPLIES.get(self._key(look))
        if reply is None or reply is UNSEEN:
            return reply
        query = _Query(law, look.values[reply.subject], look.parents, call)
        return self._answered(query, reply.answer, reply.values(look))

    def answer(
        self, law: Law, reading: Reading, look: Look | None, in_place: bool, call: partial[Any]
    ) -> Tensor | None:
        """The stable value of a query, or `None` where it has to be computed as written."""
        naive = reading.subject
        if naive is None or not reading.parents or not reading.sound or not self._stay.may_swap(reading.parents):
            return None
        written = reading.term(law, 0, [naive])
        key = self._key(look) if look is not None and reading.repeats else None
        if written is None:
            _REPLIES.put(key, None)
            return None
        floored = self._advisor.floored(written)
        floor = torch.finfo(naive.dtype).eps if self._repair else None
        found = for_logarithm(written, drop=self._drop, floored=floored, floor=floor)
        if floored is not None:
            key = None  # it depends on who asks
        if found is None or (in_place and not may_be_overwritten(naive)):
            _REPLIES.put(key, None)
            return None
        rule, term = found
        dtype = naive.dtype if in_place else _result_dtype(naive, reading.tensors)
        answer, values = answer_by(rule, term, dtype)
        answer.differentiable = reading.differentiable
        answer.watched = floored is not None or self._advisor.watches(law, term)
        answer.as_written = law.name in _LOGARITHMS and term == written and dtype == naive.dtype and not answer.watched
        picks = None if look is None else look.places(values)
        if look is not None and picks is not None:
            _REPLIES.put(key, Reply(answer, picks, look.place(naive)))
        query = _Query(law, naive, reading.parents, call, floored)
        return self._answered_in_place(query, answer, values) if in_place else self._answered(query, answer, values)

    def _key(self, look: Look) -> Any:
        return look.key, self._drop, torch.is_autocast_enabled(look.values[0].device.type)

    def _answered(self, query: _Query, answer: Answer, values: Sequence[Tensor]) -> Tensor | None:
        naive, parents = query.subject, query.parents
        exact = answer.as_written and len(parents) == 1 and parents[0].exact
        if exact and self._stay.may_keep(parents) and keeps_digits(naive, answer.near_one):
            # As good as the stable value. It is told all the same, as other numbers change that.
            kept = self._kept(query, answer, values)
            if kept is not None:
                self._report.add(answer.rule, answer.written(values), answer)
                return kept
        if not self._stay.may_swap(parents):
            return None
        stable, fresh = None, True
        if answer.picking is not None and not environment.in_transform():
            stable = answer.picking.picked(values, parents, answer.dtype)
        if stable is None:
            stable, fresh = answer.computed(values, naive), answer.fresh
        if stable is None:
            return None
        self._note(query, answer, values, stable)
        slope = _SLOPES.get(query.law.name) or _derivative(query.plain)
        return grafted(naive, stable, fresh, answer.dtype, slope, query.plain)

    def _kept(self, query: _Query, answer: Answer, values: Sequence[Tensor]) -> Tensor | None:
        """The value as written, with a derivative that costs less where that can be had; `None` where it may not stay."""
        picked: Tensor | None = None
        if answer.picking is not None and query.law.name == "log" and self._stay.may_swap(query.parents):
            picked = answer.picking.exactly(values, query.parents[0], query.subject)
        if picked is None and answer.may_stay:
            picked = query.call()
        return picked

    def _answered_in_place(self, query: _Query, answer: Answer, values: Sequence[Tensor]) -> Tensor | None:
        stable = answer.computed(values, query.subject)
        if stable is None or is_worse(stable, query.subject, query.plain):
            return None
        self._note(query, answer, values, stable)
        self._knowledge.edited(query.subject)
        return graft_in_place(query.subject, stable, _SLOPES[query.law.name])

    def _note(self, query: _Query, answer: Answer, values: Sequence[Tensor], stable: Tensor) -> None:
        written = answer.written(values)
        self._report.add(answer.rule, written, answer)
        if answer.rule.kind != "advice" and answer.watched:
            dtype = query.subject.dtype
            self._advisor.answered(query.law, query.parents, written(), query.floored, stable, dtype)

    def misused(self, law: Law, bound: Mapping[str, Any], reading: Reading, call: partial[Tensor]) -> Tensor | None:
        """Tell about a call that is given something else than it expects; what takes its place, if anything does."""
        naive, rule = reading.subject, lookup(law.advice)
        if naive is None or not reading.parents or not reading.sound:
            return None
        term = reading.term(law, 0, [naive])
        if term is None or not rule.matches(term):
            return None
        if self._repair and law.name == "binary_cross_entropy":
            loss = BinaryCrossEntropy(call, bound)
            if loss.is_replaceable and self._stay.may_swap(reading.parents):
                return self._repaired(rule, term, naive, loss, reading.differentiable)
        self._advisor.misused(law, term, naive, bound.get("target"), getattr(call.func, "__name__", ""))
        return None

    def _repaired(
        self, rule: Rule, term: Term, naive: Tensor, loss: BinaryCrossEntropy, differentiable: bool
    ) -> Tensor | None:
        dtype = loss.dtype()
        answer, values = answer_by(rule, drop_epsilons(term) if self._drop else term, dtype)
        answer.differentiable = differentiable
        stable = answer.computed(values, naive)
        if stable is None:
            return None
        self._report.add(rule, answer.written(values))
        slope = _derivative(loss.elements)
        return loss.whole(grafted(naive, stable, answer.fresh, stable.dtype, slope, loss.elements), dtype)


def _result_dtype(naive: Tensor, operands: Sequence[Tensor]) -> torch.dtype:
    """The dtype that torch answers in: that of what multiplies a logarithm may be wider."""
    dtype = naive.dtype
    for operand in operands:
        if operand is not naive:
            dtype = torch.promote_types(dtype, torch.result_type(naive, operand))
    return environment.result_dtype(naive.device, dtype)


def _derivative(plain: Function) -> Derivative:
    def slope(grad: Tensor, q: Tensor) -> Tensor:
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            point = q.view_as(q) if again else q.detach().requires_grad_()
            return torch.autograd.grad(plain(point), point, grad, create_graph=again)[0]

    return slope
