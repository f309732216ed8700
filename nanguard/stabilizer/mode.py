"""The eager front end of the algebra: it sees every call of torch, and answers the ones whose stable value is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nanguard.algebra import Apply, Law, Leaf, Rule, Spelling, Term, lookup, match
from nanguard.algebra.families.epsilon import drop_epsilons
from nanguard.algebra.linear import exponential, fails_in_gradient_only
from nanguard.algebra.operators import FLOOR_ZERO
from nanguard.algebra.pattern import is_softmax_of_logits
from nanguard.stabilizer import environment
from nanguard.stabilizer.advisor import Advisor
from nanguard.stabilizer.branches import Branches
from nanguard.stabilizer.compiled import watch
from nanguard.stabilizer.evaluate import compute_dtype, evaluate, is_fresh
from nanguard.stabilizer.graft import graft, graft_in_place
from nanguard.stabilizer.knowledge import Knowledge, entries
from nanguard.stabilizer.losses import BinaryCrossEntropy
from nanguard.stabilizer.meaning import EDIT, ESCAPE, MEANINGS, PASS, Function, meaning_of
from nanguard.stabilizer.picked import basis_for, pick
from nanguard.stabilizer.reading import Reading
from nanguard.stabilizer.regions import Stay
from nanguard.stabilizer.report import Report

__all__ = ["StabilizerMode"]

Slope = Callable[[Tensor], Tensor]

# f'(q) of the queries, where somebody asks for the derivative at q itself.
_SLOPES: dict[str, Slope] = {
    "log": torch.reciprocal,
    "log2": lambda q: 1.4426950408889634 / q,
    "log10": lambda q: 0.4342944819032518 / q,
    "log1p": lambda q: 1 / (1 + q),
}


def _warned(kwargs: dict[str, Any], frames: int) -> dict[str, Any]:
    """The same arguments, except that a warning about an implicit dim looks as many frames further up as lie between."""
    if "_stacklevel" in kwargs and kwargs.get("dim") is None:
        return {**kwargs, "_stacklevel": kwargs["_stacklevel"] + frames}
    return kwargs


@final
class StabilizerMode(TorchFunctionMode):
    """Carries what is known about logarithms beside the tensors of one block, and answers for them.

    Arguments:
        drop: whether small epsilons inside logarithms are dropped.
        report: where swaps and advice are noted.
        repair: whether bounds that libraries put on probabilities are dropped.
    """

    def __init__(self, drop: bool, report: Report, repair: bool = False) -> None:
        super().__init__()
        self.report = report
        self._drop = drop
        self._repair = repair
        self._advisor = Advisor(report, keep=not drop)
        self._knowledge = Knowledge()
        self._branches = Branches()
        self._stable: Tensor | None = None
        self._stay = Stay(self._knowledge, partial(_renewed, drop, repair))

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
        if torch.compiler.is_compiling():
            watch.tell(watch.tracing(self._drop, self._repair))
            return func(*args, **(kwargs or {}))
        meaning = MEANINGS.get(func)
        if meaning is None:
            meaning = meaning_of(func)
        if meaning is PASS:
            if not kwargs:
                return func(*args)
            if "out" in kwargs or "inplace" in kwargs:
                self._edited(kwargs.get("out", args[:1]))
            return func(*args, **_warned(kwargs, 3))
        kwargs = _warned(kwargs, 4) if kwargs else {}
        if type(meaning) is tuple:
            law, spelling = meaning
            if law.branch and torch.is_grad_enabled():
                return self._branching(law, spelling, func, args, kwargs)
            return self._lawful(law, spelling, func, args, kwargs)
        subject = args[0] if args else None
        if meaning is EDIT:
            self._edited(subject)
        elif meaning is ESCAPE:
            self._knowledge.escaped(subject)
        else:
            self._knowledge.pin(subject)
        return func(*args, **kwargs)

    def is_renewed(self) -> bool:
        """Whether a backward pass that recomputes the code that runs now will do so in a mode like this one."""
        self._stay.look()
        return self._stay.admits()

    def _edited(self, subject: Any) -> None:
        if len(self._knowledge):
            for entry in entries(subject):
                self._knowledge.edited(entry)

    def _branching(
        self, law: Law, spelling: Spelling, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A call that may be, or select, a branch."""
        branches = self._branches
        if spelling.in_place or not (law.branch == "singular" or len(branches)):
            return self._lawful(law, spelling, func, args, kwargs)
        if environment.is_tracing() or environment.in_transform() or not self._stay.look():
            return self._lawful(law, spelling, func, args, kwargs)
        branches.region = self._knowledge.region
        if law.branch != "selects":
            result = self._lawful(law, spelling, func, args, kwargs)
            branches.note(law, spelling, func, args, kwargs, result)
            return result
        chosen = branches.selected(law, spelling, args, kwargs) if self._stay.admits() else None
        result = self._lawful(law, spelling, func, args, kwargs)
        if chosen is None:
            return result
        known = self._knowledge.find(result)
        if known is not None:
            self._knowledge.record(chosen, known.term, known.parents)
        self.report.add(lookup("NG401"), Leaf(chosen, tuple(chosen.shape)))
        return chosen

    def _lawful(
        self, law: Law, spelling: Spelling, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        knowledge = self._knowledge
        concerned = law.role == "source" and law.begins(args)
        concerned = concerned or knowledge.might_know(args) or knowledge.might_know(tuple(kwargs.values()))
        if not concerned or environment.is_tracing() or not self._stay.look():
            self._before_edit(spelling, args, kwargs)
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            bound = spelling.bind(args, kwargs)
            reading = None if bound is None else Reading(knowledge, bound, spelling.in_place and law.role == "source")
        if law.role in ("query", "misuse") and reading is not None:
            with torch._C.DisableTorchFunction():
                if law.role == "query":
                    answer = self._answer(law, spelling, reading, _as_function(func, args, kwargs, reading.subject))
                else:
                    answer = self._misused(law, bound or {}, reading, partial(func, *args, **kwargs))
            if answer is not None:
                return answer
        self._before_edit(spelling, args, kwargs)
        result = func(*args, **kwargs)
        if law.role in ("query", "misuse") or reading is None or not reading.sound:
            return result
        with torch._C.DisableTorchFunction():
            if result is None:  # an assignment: its result is what was edited
                self._learn(law, spelling, reading, reading.subject)
                return None
            result = self._learn(law, spelling, reading, result)
            self._advisor.learnt(law, bound or {}, reading.parents, result)
            return result

    def _before_edit(self, spelling: Spelling, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if spelling.in_place or spelling.asks_to_edit(args, kwargs):
            self._edited(args[0] if args else kwargs.get("input"))
        if "out" in kwargs:
            self._edited(kwargs["out"])

    def _learn(self, law: Law, spelling: Spelling, reading: Reading, result: Any) -> Any:
        """Record what is known about the result of a call; a quotient may be replaced on the way."""
        several = isinstance(result, (tuple, list))
        results: list[Any] = list(result) if several else [result]
        if not all(isinstance(part, Tensor) for part in results):
            return result
        for position, part in enumerate(results):
            term = reading.term(law, position, results)
            if term is None or any(part is known for known in reading.tensors if not spelling.in_place):
                continue
            softmax = part
            if law.quotient and not several:
                result = part = self._quotient(reading, term, part, spelling.in_place)
                softmax = self._stable if self._stable is not None else part
                self._stable = None
            self._knowledge.record(part, term, reading.parents, basis_for(term, softmax))
        return result

    def _quotient(self, reading: Reading, term: Term, naive: Tensor, in_place: bool) -> Tensor:
        stable_term = exponential(term)
        if stable_term is None or any(known.term == term for known in reading.parents):
            return naive
        # In place, only the softmax itself: iterations such as Sinkhorn's normalise what is normalised.
        if in_place and not (is_softmax_of_logits(term) and _may_be_overwritten(naive)):
            return naive
        rule = match(term, "quotient")
        if rule is None or not self._may_swap(reading):
            return naive
        if not naive.requires_grad and fails_in_gradient_only(term) and not environment.in_transform():
            return naive
        stable = self._computed(stable_term, naive, naive.dtype)
        if stable is None:
            return naive
        self.report.add(rule, stable_term)
        self._stable = stable
        if in_place:
            return graft_in_place(naive, stable, None)
        return _grafted(naive, stable, stable_term, naive.dtype, None, _unchanged)

    def _answer(self, law: Law, spelling: Spelling, reading: Reading, plain: Slope) -> Tensor | None:
        """The stable value of a query, or `None` where it has to be computed as written."""
        naive = reading.subject
        if naive is None or not reading.parents or not reading.sound or not self._may_swap(reading):
            return None
        term = reading.term(law, 0, [naive])
        if term is None:
            return None
        floored = self._advisor.floored(term)
        if floored is not None and self._repair:
            term = Apply(FLOOR_ZERO, (floored,), term.shape, constant=torch.finfo(naive.dtype).eps)
            rule: Rule | None = lookup("NG303")
        else:
            term = drop_epsilons(term) if self._drop and floored is None else term
            rule = match(term, "logarithm")
        if rule is None or (spelling.in_place and not _may_be_overwritten(naive)):
            return None
        dtype = naive.dtype if spelling.in_place else environment.result_dtype(naive.device, naive.dtype)
        picked = None if spelling.in_place or environment.in_transform() else pick(term, reading.parents, dtype)
        stable = self._computed(term, naive, dtype) if picked is None else picked
        if stable is None:
            return None
        self.report.add(rule, term)
        if rule.kind != "advice":
            self._advisor.answered(law, reading.parents, term, floored, stable, naive.dtype)
        if spelling.in_place:
            self._edited(naive)
            return graft_in_place(naive, stable, _SLOPES[law.name])
        return _grafted(naive, stable, term, dtype, _SLOPES.get(law.name, _derivative(plain)), plain)

    def _misused(self, law: Law, bound: Mapping[str, Any], reading: Reading, call: partial[Tensor]) -> Tensor | None:
        """Tell about a call that is given something else than it expects; what takes its place, if anything does."""
        naive, rule = reading.subject, lookup(law.advice)
        if naive is None or not reading.parents or not reading.sound:
            return None
        term = reading.term(law, 0, [naive])
        if term is None or not rule.matches(term):
            return None
        if self._repair and law.name == "binary_cross_entropy":
            loss = BinaryCrossEntropy(call, bound)
            if loss.is_replaceable and self._may_swap(reading):
                dtype = loss.dtype()
                term = drop_epsilons(term) if self._drop else term
                stable = self._computed(term, naive, dtype)
                if stable is not None:
                    self.report.add(rule, term)
                    slope = _derivative(loss.elements)
                    return loss.whole(_grafted(naive, stable, term, stable.dtype, slope, loss.elements), dtype)
        self._advisor.misused(law, term, naive, bound["target"], getattr(call.func, "__name__", ""))
        return None

    def _may_swap(self, reading: Reading) -> bool:
        return not any(known.is_pinned() for known in reading.parents) and self._stay.admits()

    def _computed(self, term: Term, naive: Tensor, dtype: torch.dtype) -> Tensor | None:
        if not environment.plain_device([leaf.value for leaf in term.leaves], naive.device):
            return None
        if any(name is not None for name in getattr(naive, "names", ())):
            return None
        if not torch.is_autocast_enabled(naive.device.type):
            stable = evaluate(term, compute_dtype(term, dtype), private=True)
        else:
            with torch.autocast(naive.device.type, enabled=False):
                stable = evaluate(term, compute_dtype(term, dtype), private=True)
        differentiable = torch.is_grad_enabled() and naive.requires_grad
        if stable.shape != naive.shape or (stable.requires_grad != differentiable and not environment.in_transform()):
            return None
        return stable


def _renewed(drop: bool, repair: bool) -> StabilizerMode:
    return StabilizerMode(drop, Report([], silent=True), repair)


def _as_function(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any], subject: Tensor | None) -> Slope:
    """A query as a function of what it asks about; one that works in place gets memory of its own."""

    def plain(q: Tensor) -> Tensor:
        fresh = q.clone()
        named = {name: fresh if value is subject else value for name, value in kwargs.items()}
        result: Tensor = func(*(fresh if value is subject else value for value in args), **named)
        return result

    return plain


def _derivative(plain: Slope) -> Slope:
    def slope(q: Tensor) -> Tensor:
        with torch.enable_grad():
            point = q.detach().requires_grad_()
            return torch.autograd.grad(plain(point).sum(), point)[0]

    return slope


def _unchanged(naive: Tensor) -> Tensor:
    return naive


def _grafted(
    naive: Tensor, stable: Tensor, term: Term, dtype: torch.dtype, slope: Slope | None, plain: Slope
) -> Tensor:
    if environment.in_transform():
        # Transforms differentiate what was computed, and know no intermediates that could be asked for.
        return stable.to(dtype, copy=True)
    return graft(naive, stable, dtype, is_fresh(term), slope, plain)


def _may_be_overwritten(tensor: Tensor) -> bool:
    if environment.in_transform() or tensor._base is not None:
        return False
    return not (tensor.requires_grad and tensor.is_leaf)
