"""What is learnt from the results of calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from nanguard.algebra import Law, Spelling, Term
from nanguard.algebra.decisions import is_remembered
from nanguard.stabilizer import environment
from nanguard.stabilizer.accuracy import Digits, digits_of, digits_of_fraction, digits_of_power, divisor_of
from nanguard.stabilizer.advisor import Advisor
from nanguard.stabilizer.answers import Answer
from nanguard.stabilizer.basis import basis_for
from nanguard.stabilizer.calls import Look
from nanguard.stabilizer.knowledge import Knowledge, Known, origins_of
from nanguard.stabilizer.memo import UNSEEN, Lesson, Memo, Reply
from nanguard.stabilizer.outline import outlined
from nanguard.stabilizer.picked import has_basis
from nanguard.stabilizer.quotients import Quotients
from nanguard.stabilizer.reading import Reading
from nanguard.stabilizer.regions import Stay
from nanguard.stabilizer.restarts import Beginning, Reminder

__all__ = ["Computation", "Student"]

_LESSONS = Memo()


class Computation(NamedTuple):
    """A call that something may be learnt from.

    Attributes:
        law: what it means.
        bound: its arguments by canonical name.
        reading: the call as the algebra sees it.
        in_place: whether it writes its result into its first argument.
        look: what it looks like, where that says all.
        key: what it looks like, its result included.
    """

    law: Law
    bound: Mapping[str, Any]
    reading: Reading
    in_place: bool = False
    look: Look | None = None
    key: Any = None


@final
class Student:
    """Records what is known about results; a quotient may be replaced on the way.

    Arguments:
        knowledge: takes it.
        quotients: replaces them.
        advisor: looks at constants.
        stay: says whether anything may be computed beside the user's code.
    """

    def __init__(self, knowledge: Knowledge, quotients: Quotients, advisor: Advisor, stay: Stay) -> None:
        self._knowledge = knowledge
        self._quotients = quotients
        self._advisor = advisor
        self._stay = stay

    def learn_again(
        self, law: Law, spelling: Spelling, look: Look, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
    ) -> Any:
        """Learn from a call, at once if one that looks the same was learnt from before. Gives what the user's code gets."""
        simple = type(result) is Tensor and not result.is_inference()
        key = (look.key, result.shape, result.dtype, result.requires_grad) if simple else None
        lesson: Any = UNSEEN if key is None or look.holds(result) else _LESSONS.get(key)
        if lesson is None:
            return result
        if lesson is not UNSEEN:
            result = self._repeat(lesson, look, result)
            if not lesson.advised:
                return result
        bound = spelling.bind(args, kwargs)
        if bound is None:
            return result
        if lesson is not UNSEEN:
            self._advisor.learnt(law, bound, look.parents, result)
            return result
        reading = Reading(self._knowledge, bound, keep_source=False)
        return self.learn(Computation(law, bound, reading, False, look, key), result) if reading.sound else result

    def _repeat(self, lesson: Lesson, look: Look, result: Tensor) -> Tensor:
        softmax, reply, parents = result, lesson.quotient, look.parents
        exact = _is_exact(lesson.digits, parents)
        if reply is not None:
            divisor = look.values[reply.subject] if exact and reply.subject >= 0 else None
            sources = reply.values(look)
            swapped = self._quotients.swap(reply.answer, sources, result, parents, divisor)
            result, softmax, exact, beginnings = swapped
            if beginnings:
                self._begin_anew(beginnings, result, sources, parents, exact)
                return result
        values = [look.values[pick] for pick in lesson.picks]
        if lesson.reminder is not None and self._is_reminded(lesson.reminder, values, result, parents, exact):
            return result
        basis = basis_for(softmax, values[0].dtype, exact) if lesson.has_basis else None
        versions = [value._version for value in values]
        self._knowledge.record(
            result, lesson.outline, values, versions, parents, lesson, basis, exact, reply is not None
        )
        return result

    def _is_reminded(
        self,
        reminder: Reminder,
        values: Sequence[Tensor],
        result: Tensor,
        parents: tuple[Known, ...],
        exact: bool,
        repeats: bool = True,
    ) -> bool:
        """Whether the logarithm of a result was computed, and is remembered in the place of where it came from."""
        if environment.in_transform() or not self._stay.may_swap(parents):
            return False
        beginning = reminder.computed(values, result)
        if beginning is None:
            return False
        again = any(known.again for known in parents)
        self._remember(beginning, result, origins_of(values, parents), exact, again, repeats, watched=parents)
        return True

    def _begin_anew(
        self,
        beginnings: Sequence[Beginning],
        result: Tensor,
        sources: Sequence[Tensor],
        parents: tuple[Known, ...],
        exact: bool,
        repeats: bool = True,
    ) -> None:
        origins = origins_of(sources, parents)
        for beginning in beginnings:
            known = parents[beginning.operand] if beginning.operand >= 0 else None
            tensor = result if known is None else known.tensor()
            if tensor is None:
                continue
            if known is None:
                self._remember(beginning, result, origins, exact, True, repeats)
            else:
                lesson = beginning.lesson(tensor, known.again) if repeats else None
                known.begin_anew(beginning.outline, beginning.values, lesson)

    def _remember(
        self,
        beginning: Beginning,
        result: Tensor,
        origins: frozenset[int | None],
        exact: bool,
        again: bool,
        repeats: bool,
        watched: tuple[Known, ...] = (),
    ) -> None:
        outline, values = beginning[1:]
        versions = [value._version for value in values]
        lesson = beginning.lesson(result, again) if repeats else None
        self._knowledge.record(
            result,
            outline,
            values,
            versions,
            (),
            lesson,
            exact=exact,
            again=again,
            origins=origins,
            watched=watched,
        )

    def learn(self, computation: Computation, result: Any) -> Any:
        """Learn from a call. Gives what the user's code gets."""
        law, bound, reading = computation[:3]
        several = isinstance(result, (tuple, list))
        results: list[Any] = list(result) if several else [result]
        advised = self._advisor.concerns(law, bound, reading.parents)
        if all(isinstance(part, Tensor) for part in results):
            for position, part in enumerate(results):
                term = reading.term(law, position, results)
                if any(part is operand for operand in reading.tensors if not computation.in_place):
                    continue
                if part.requires_grad and not torch.is_grad_enabled():
                    continue  # it was edited, and its derivative does not know
                if term is not None:
                    learnt = self._learn(computation, term, part, law.quotient and not several, advised)
                    result = result if several else learnt
                elif reading.repeats and not advised:
                    _LESSONS.put(computation.key, None)
        if advised:
            self._advisor.learnt(law, bound, reading.parents, result)
        return result

    def _learn(self, computation: Computation, term: Term, result: Tensor, may_overflow: bool, advised: bool) -> Tensor:
        law, bound, reading, in_place, look, key = computation
        parents = reading.parents
        outline, values, versions = outlined(term)
        operands = parents if look is None else look.parents
        answer = self._quotients.answer(term, parents, result, in_place, operands) if may_overflow else None
        digits: Digits = "unknown" if in_place else digits_of(law, outline)
        if digits == "unknown" and answer is not None and not in_place:
            digits = digits_of_fraction(law, bound, [known.tensor() for known in parents])
        divisor = divisor_of(law, bound) if digits == "if divisor" and answer is not None else None
        if divisor is None and digits == "if divisor":
            digits = digits_of_power(outline)
        lesson = None
        if look is not None and reading.repeats:
            lesson = _lesson(look, outline, values, answer, divisor, digits, advised)
            if lesson is not None and is_remembered(outline):
                lesson.reminder = Reminder(term, outline, result.dtype)
            if lesson is not None:
                _LESSONS.put(key, lesson)
        softmax, exact = result, _is_exact(digits, parents)
        if answer is not None:
            swapped = self._quotients.swap(*answer, result, parents, divisor if exact else None, in_place)
            result, softmax, exact, beginnings = swapped
            if beginnings:
                self._begin_anew(beginnings, result, answer[1], operands, exact, lesson is not None)
                return result
        if is_remembered(outline) and versions == [value._version for value in values]:
            reminder = Reminder(term, outline, result.dtype) if lesson is None else lesson.reminder
            if reminder is not None and self._is_reminded(
                reminder, values, result, operands, exact, lesson is not None
            ):
                return result
        basis = basis_for(softmax, values[0].dtype, exact) if has_basis(outline) else None
        self._knowledge.record(result, outline, values, versions, parents, lesson, basis, exact, answer is not None)
        return result


def _is_exact(digits: Digits, parents: Sequence[Known]) -> bool:
    return digits == "all" or (digits != "unknown" and all(known.exact for known in parents))


def _lesson(
    look: Look,
    outline: Term,
    values: list[Tensor],
    answer: tuple[Answer, list[Tensor]] | None,
    divisor: Tensor | None,
    digits: Digits,
    advised: bool,
) -> Lesson | None:
    """What calls that look the same teach; `None` where that depends on copies."""
    picks = look.places(values)
    places = [] if answer is None else look.places(answer[1])
    if picks is None or places is None:
        return None
    reply = None if answer is None else Reply(answer[0], places, -1 if divisor is None else look.place(divisor))
    return Lesson(outline, picks, reply, has_basis(outline), advised, digits)
