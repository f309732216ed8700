"""The eager front end of the algebra: it sees every call of torch, and answers the ones whose stable value is known."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nanguard.algebra import Law, Leaf, Spelling, lookup
from nanguard.stabilizer import environment
from nanguard.stabilizer.advisor import Advisor
from nanguard.stabilizer.branches import Branches
from nanguard.stabilizer.calls import Look, look_at
from nanguard.stabilizer.compiled import watch
from nanguard.stabilizer.exchange import Exchange
from nanguard.stabilizer.knowledge import Knowledge, entries
from nanguard.stabilizer.meaning import EDIT, ESCAPE, MEANINGS, PASS, Function, meaning_of
from nanguard.stabilizer.memo import UNSEEN
from nanguard.stabilizer.queries import Queries
from nanguard.stabilizer.quotients import Quotients
from nanguard.stabilizer.reading import Reading
from nanguard.stabilizer.regions import Stay
from nanguard.stabilizer.report import Report
from nanguard.stabilizer.resolve import misuse_table
from nanguard.stabilizer.student import Computation, Student

__all__ = ["StabilizerMode"]

# What this front end computes itself is nobody's call.
_without_modes = torch._C.DisableTorchFunction
# Between a function of torch that calls this mode and the same function called by it.
_FRAMES = 3


@final
class StabilizerMode(TorchFunctionMode):
    """Carries what is known about logarithms beside the tensors of one block, and answers for them.

    Arguments:
        drop: whether small epsilons inside logarithms are dropped.
        report: where swaps and advice are noted.
        repair: whether bounds that libraries put on probabilities are dropped.
    """

    _stabilises = True  # `watch.BLOCK`

    def __init__(self, drop: bool, report: Report, repair: bool = False) -> None:
        super().__init__()
        self.report = report
        self._drop = drop
        self._repair = repair
        self._advisor = Advisor(report, keep=not drop)
        self._knowledge = Knowledge()
        self._branches = Branches()
        self._stay = Stay(self._knowledge, partial(_renewed, drop, repair))
        self._queries = Queries(report, self._advisor, self._knowledge, self._stay, drop, repair)
        self._student = Student(self._knowledge, Quotients(report, self._stay), self._advisor, self._stay)

    def __enter__(self) -> StabilizerMode:
        super().__enter__()  # type: ignore[no-untyped-call]
        self._stay.begin()
        return self

    def close(self) -> None:
        """Forget everything."""
        self._stay.end()
        self._knowledge.clear()
        self._branches.clear()

    @watch.run_as_is
    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.compiler.is_dynamo_compiling():
            watch.tell(watch.tracing(self._drop, self._repair))
            return func(*args, **(kwargs or {}))
        meaning = MEANINGS.get(func)
        if meaning is None:
            meaning = meaning_of(func)
        if not kwargs:
            if meaning is PASS:
                return func(*args)
            kwargs = {}
        elif "_stacklevel" in kwargs and kwargs.get("dim") is None:
            # Nothing is known of an implicit dim, of which torch warns at the line that is as many frames further up.
            return func(*args, **{**kwargs, "_stacklevel": kwargs["_stacklevel"] + _FRAMES})
        elif meaning is PASS:
            if "out" in kwargs or "inplace" in kwargs:
                self._edited(kwargs.get("out", args[:1]))
            return func(*args, **kwargs)
        if type(meaning) is tuple:
            law, spelling = meaning
            known = self._concerns(law, args, kwargs)
            if law.advice and law.role == "source" and self._knowledge.might_know((*args, *kwargs.values())):
                self._look_for_misuse(func, args, kwargs)
            branch = law.branch != "" and self._branches.concern(law, args, kwargs)
            if not (known or branch):
                return self._as_written(spelling, func, args, kwargs)
            if spelling.edits or "out" in kwargs or not args or not self._stay.is_ordinary():
                return self._lawful(law, spelling, known, branch, func, args, kwargs)
            if branch:
                return self._branching(law, spelling, known, True, func, args, kwargs)
            return self._ordinary(law, spelling, func, args, kwargs)
        subject = args[0] if args else None
        if meaning is EDIT:
            self._edited(subject)
        elif meaning is ESCAPE:
            self._knowledge.escaped(subject)
        else:
            self._knowledge.pin(subject)
            self._branches.pin(subject)
        return func(*args, **kwargs)

    @property
    def exchange(self) -> Exchange:
        """The side that compiled code deals with."""
        return Exchange(self._knowledge, self._stay, self.report, self._drop, self.__torch_function__)

    def is_renewed(self) -> bool:
        """Whether a backward pass that recomputes the code that runs now will do so in a mode like this one."""
        self._stay.look()
        return self._stay.admits()

    def _edited(self, subject: Any) -> None:
        if len(self._knowledge) or len(self._branches):
            for entry in entries(subject):
                self._knowledge.edited(entry)
                self._branches.edited(entry)

    def _lawful(
        self,
        law: Law,
        spelling: Spelling,
        known: bool,
        branch: bool,
        func: Function,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A call that something may be known of, or that may be or select a branch, whatever surrounds it."""
        if environment.is_tracing() or not self._stay.look():
            return self._as_written(spelling, func, args, kwargs)
        if branch and not spelling.in_place and torch.is_grad_enabled() and not environment.in_transform():
            return self._branching(law, spelling, known, False, func, args, kwargs)
        if known:
            return self._concerned(law, spelling, func, args, kwargs)
        return self._as_written(spelling, func, args, kwargs)

    def _ordinary(
        self, law: Law, spelling: Spelling, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A call that something may be known of, with nothing around it: the short way."""
        look = None if law.role == "misuse" else look_at(self._knowledge, func, args, kwargs)
        if look is None:
            return self._concerned(law, spelling, func, args, kwargs)
        if law.role == "query":
            answer = self._queries.answer_again(law, look, partial(func, *args, **kwargs))
            if answer is UNSEEN:
                return self._concerned(law, spelling, func, args, kwargs)
            return func(*args, **kwargs) if answer is None else answer
        return self._student.learn_again(law, spelling, look, args, kwargs, func(*args, **kwargs))

    def _branching(
        self,
        law: Law,
        spelling: Spelling,
        known: bool,
        ordinary: bool,
        func: Function,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A call that may be, or select, a branch; `known` says whether anything may be known of its arguments, and `ordinary`
        whether the short way will do.
        """
        branches = self._branches
        branches.region = self._knowledge.region
        chosen = None
        if law.branch == "selects" and self._stay.admits():
            chosen = branches.selected(law, spelling, args, kwargs)
        if not known:
            result = self._as_written(spelling, func, args, kwargs)
        elif ordinary:
            result = self._ordinary(law, spelling, func, args, kwargs)
        else:
            result = self._concerned(law, spelling, func, args, kwargs)
        if law.branch != "selects":
            branches.note(law, func, args, kwargs, result)
        if chosen is None:
            return result
        learnt = self._knowledge.find(result)
        if learnt is not None:
            self._knowledge.record(
                chosen, learnt.outline, learnt.values, learnt.versions, learnt.parents, learnt.lesson
            )
        self.report.add(lookup("NG401"), lambda: Leaf(chosen, tuple(chosen.shape)))
        return chosen

    def _concerns(self, law: Law, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether anything is, or may be, known of what a law is asked about. Cheap, as most calls of a network are none."""
        if law.role == "source" and law.begins(args):
            return True
        known = self._knowledge.might_know
        return known(args) or (bool(kwargs) and known(tuple(kwargs.values())))

    def _as_written(self, spelling: Spelling, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs or spelling.edits:
            self._before_edit(spelling, args, kwargs)
        return func(*args, **kwargs)

    def _concerned(
        self, law: Law, spelling: Spelling, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        with _without_modes():
            look = self._look(spelling, func, args, kwargs) if law.role != "misuse" else None
            if law.role == "query" or law.role == "misuse":
                answer = self._answer(law, spelling, look, partial(func, *args, **kwargs))
                if answer is not None:
                    return answer
        if law.role == "query" or law.role == "misuse":
            return self._as_written(spelling, func, args, kwargs)
        if look is None:
            return self._computed(law, spelling, func, args, kwargs)
        result = func(*args, **kwargs)
        with _without_modes():
            return self._student.learn_again(law, spelling, look, args, kwargs, result)

    def _look_for_misuse(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A source that may be given something else than it expects."""
        if not environment.is_tracing() and self._stay.look():
            with _without_modes():
                self._answer(*misuse_table()[func], None, partial(func, *args, **kwargs))

    def _answer(self, law: Law, spelling: Spelling, look: Look | None, call: partial[Any]) -> Tensor | None:
        if look is not None:
            answer = self._queries.answer_again(law, look, call)
            if answer is not UNSEEN:
                return answer  # type: ignore[no-any-return]
        bound = spelling.bind(call.args, call.keywords)
        if bound is None:
            return None
        reading = Reading(self._knowledge, bound, keep_source=False)
        if law.role == "query":
            return self._queries.answer(law, reading, look, spelling.in_place, call)
        return self._queries.misused(law, bound, reading, call)

    def _computed(
        self, law: Law, spelling: Spelling, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        with _without_modes():
            bound = spelling.bind(args, kwargs)
            reading = None
            if bound is not None:
                reading = Reading(self._knowledge, bound, spelling.in_place and law.role == "source")
        self._before_edit(spelling, args, kwargs)
        result = func(*args, **kwargs)
        with _without_modes():
            if bound is None or reading is None or not reading.sound:
                return result
            if result is None:  # an assignment: its result is what was edited
                self._student.learn(Computation(law, bound, reading, spelling.in_place), reading.subject)
                return None
            return self._student.learn(Computation(law, bound, reading, spelling.in_place), result)

    def _look(
        self, spelling: Spelling, func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Look | None:
        if (
            not args
            or "out" in kwargs
            or (spelling.edits and (spelling.in_place or spelling.asks_to_edit(args, kwargs)))
        ):
            return None
        return None if environment.in_transform() else look_at(self._knowledge, func, args, kwargs)

    def _before_edit(self, spelling: Spelling, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if spelling.in_place or spelling.asks_to_edit(args, kwargs):
            self._edited(args[0] if args else kwargs.get("input"))
        if "out" in kwargs:
            self._edited(kwargs["out"])


def _renewed(drop: bool, repair: bool) -> StabilizerMode:
    return StabilizerMode(drop, Report([], silent=True), repair)
