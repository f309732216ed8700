"""The eager front end of the algebra: it sees every call of torch, and answers the ones whose stable value is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nanguard.algebra import Law, Spelling, Term, match
from nanguard.algebra.families.epsilon import drop_epsilons
from nanguard.algebra.linear import exponential
from nanguard.stabilizer import environment
from nanguard.stabilizer.evaluate import compute_dtype, evaluate, is_fresh
from nanguard.stabilizer.graft import graft, graft_in_place
from nanguard.stabilizer.knowledge import Knowledge, entries
from nanguard.stabilizer.reading import Reading
from nanguard.stabilizer.report import Report
from nanguard.stabilizer.resolve import law_table

__all__ = ["StabilizerMode"]

Function = Callable[..., Any]
Slope = Callable[[Tensor], Tensor]

# What a function means for what is known: nothing, an edit of its first argument, memory handed out, derivatives watched.
_PASS, _EDIT, _ESCAPE, _PIN = "pass", "edit", "escape", "pin"

_ESCAPES = frozenset(
    {
        "numpy",
        "__array__",
        "__cuda_array_interface__",
        "__dlpack__",
        "_typed_storage",
        "data_ptr",
        "set_",
        "share_memory_",
        "storage",
        "untyped_storage",
    }
)
_PINS = frozenset({"grad_fn", "register_hook", "register_post_accumulate_grad_hook", "retain_grad"})
_EDIT_SLOTS = frozenset({"__delitem__", "__set__", "__setitem__"})

_MEANING: dict[Function, Any] = {}

# f'(q) of the queries, where somebody asks for the derivative at q itself.
_SLOPES: dict[str, Slope] = {
    "log": torch.reciprocal,
    "log2": lambda q: 1.4426950408889634 / q,
    "log10": lambda q: 0.4342944819032518 / q,
    "log1p": lambda q: 1 / (1 + q),
}


def _meaning(function: Function) -> Any:
    """What a function means, as one of the words above or as the law that knows it."""
    found: Any = law_table().get(function)
    if found is None:
        name = getattr(function, "__name__", "").partition(".")[0]
        owner = getattr(getattr(function, "__self__", None), "__name__", "") if name in ("__get__", "__set__") else name
        if name in _ESCAPES or (name == "__get__" and owner in _ESCAPES):
            found = _ESCAPE
        elif name in _PINS or (name == "__get__" and owner in _PINS):
            found = _PIN
        else:
            in_place = name.endswith("_") and not name.endswith("__")
            found = _EDIT if in_place or name in _EDIT_SLOTS or Spelling(name, ()).in_place else _PASS
    # Only what torch itself defines is remembered: functions of users may come and go.
    if type(function).__name__ != "function" or getattr(function, "__module__", "").startswith("torch"):
        _MEANING[function] = found
    return found


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
        report: where swaps are noted.
    """

    def __init__(self, drop: bool, report: Report) -> None:
        super().__init__()
        self.report = report
        self._drop = drop
        self._knowledge = Knowledge()

    def close(self) -> None:
        """Forget everything."""
        self._knowledge.clear()

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.compiler.is_compiling():
            return func(*args, **(kwargs or {}))
        meaning = _MEANING.get(func)
        if meaning is None:
            meaning = _meaning(func)
        if meaning is _PASS:
            if not kwargs:
                return func(*args)
            if "out" in kwargs or "inplace" in kwargs:
                self._edited(kwargs.get("out", args[:1]))
            return func(*args, **_warned(kwargs, 3))
        kwargs = _warned(kwargs, 4) if kwargs else {}
        if type(meaning) is tuple:
            return self._lawful(meaning[0], meaning[1], func, args, kwargs)
        subject = args[0] if args else None
        if meaning is _EDIT:
            self._edited(subject)
        elif meaning is _ESCAPE:
            self._knowledge.escaped(subject)
        else:
            self._knowledge.pin(subject)
        return func(*args, **kwargs)

    def _edited(self, subject: Any) -> None:
        if len(self._knowledge):
            for entry in entries(subject):
                self._knowledge.edited(entry)

    def _lawful(
        self, law: Law, spelling: Spelling, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        knowledge = self._knowledge
        concerned = law.role == "source" or knowledge.might_know(args) or knowledge.might_know(tuple(kwargs.values()))
        if not concerned or environment.is_tracing():
            self._before_edit(spelling, args, kwargs)
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            bound = spelling.bind(args, kwargs)
            reading = None if bound is None else Reading(knowledge, bound, spelling.in_place and law.role == "source")
        if law.role == "query" and reading is not None:
            with torch._C.DisableTorchFunction():
                answer = self._answer(law, spelling, reading)
            if answer is not None:
                return answer
        self._before_edit(spelling, args, kwargs)
        result = func(*args, **kwargs)
        if law.role == "query" or reading is None or not reading.sound:
            return result
        with torch._C.DisableTorchFunction():
            return self._learn(law, spelling, reading, result)

    def _before_edit(self, spelling: Spelling, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if spelling.in_place:
            self._edited(args[0] if args else None)
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
            if law.quotient and not spelling.in_place and not several:
                result = part = self._quotient(reading, term, part)
            self._knowledge.record(part, term, reading.parents)
        return result

    def _quotient(self, reading: Reading, term: Term, naive: Tensor) -> Tensor:
        stable_term = exponential(term)
        if stable_term is None or any(known.term == term for known in reading.parents):
            return naive
        rule = match(term, "quotient")
        if rule is None or not self._may_swap(reading):
            return naive
        stable = self._computed(stable_term, naive, naive.dtype)
        if stable is None:
            return naive
        self.report.add(rule, stable_term)
        return _grafted(naive, stable, stable_term, naive.dtype, torch.ones_like, _unchanged)

    def _answer(self, law: Law, spelling: Spelling, reading: Reading) -> Tensor | None:
        """The stable value of a query, or `None` where it has to be computed as written."""
        naive = reading.first
        if naive is None or not reading.parents or not reading.sound or not self._may_swap(reading):
            return None
        term = reading.term(law, 0, [naive])
        if term is None:
            return None
        if self._drop:
            term = drop_epsilons(term)
        rule = match(term, "logarithm")
        if rule is None or (spelling.in_place and not _may_be_overwritten(naive)):
            return None
        dtype = naive.dtype if spelling.in_place else environment.result_dtype(naive.device, naive.dtype)
        stable = self._computed(term, naive, dtype)
        if stable is None:
            return None
        self.report.add(rule, term)
        if spelling.in_place:
            self._edited(naive)
            return graft_in_place(naive, stable, _SLOPES[law.name])
        return _grafted(naive, stable, term, dtype, _SLOPES[law.name], getattr(torch, law.name))

    def _may_swap(self, reading: Reading) -> bool:
        return not any(known.is_pinned() for known in reading.parents) and not environment.in_checkpoint()

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


def _unchanged(naive: Tensor) -> Tensor:
    return naive


def _grafted(naive: Tensor, stable: Tensor, term: Term, dtype: torch.dtype, slope: Slope, plain: Slope) -> Tensor:
    if environment.in_transform():
        # Transforms differentiate what was computed, and know no intermediates that could be asked for.
        return stable.to(dtype, copy=True)
    return graft(naive, stable, dtype, is_fresh(term), slope, plain)


def _may_be_overwritten(tensor: Tensor) -> bool:
    if environment.in_transform() or tensor._base is not None:
        return False
    return not (tensor.requires_grad and tensor.is_leaf)
