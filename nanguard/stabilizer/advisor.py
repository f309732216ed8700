"""What is told and left as it is, in so far as it depends on the numbers.

Numbers are looked at on the CPU only, where that waits for nothing, and never where something counts what is computed.
"""

from __future__ import annotations

import functools
import math
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor
from torch.distributions import utils as distributions

from nanguard.algebra import Apply, Law, Leaf, Term, lookup, sums
from nanguard.algebra import operators as ops
from nanguard.algebra.families.saturation import without_epsilon, without_floor
from nanguard.algebra.pattern import core, is_probability_or_total
from nanguard.algebra.render import write
from nanguard.stabilizer import environment
from nanguard.stabilizer.evaluate import evaluate
from nanguard.stabilizer.knowledge import Known
from nanguard.stabilizer.locate import FrameNames
from nanguard.stabilizer.report import Note, Report

__all__ = ["Advisor"]

# Closer than that to 0 or 1, F.binary_cross_entropy bounds the derivative.
_CLOSEST = 1e-12
# Of a probability below 1 % of the epsilon on it, as much of the derivative is left.
_FAR = math.log(100.0)
_NEAR = 0.01
# Derivatives smaller than that part of the largest are not missed.
_NEGLIGIBLE = 1e-3

# Numbers that may guard against log 0, and what they must not round to: the arguments of steps.
_LOWER = {"add": ("input", "other"), "clamp": ("min",), "clamp_min": ("min",)}
_UPPER = {"clamp": ("max",), "clamp_max": ("max",)}
_CONSTANTS = {*_LOWER, *_UPPER, "sub"}


@final
class Advisor:
    """Looks at calls and terms for what should be written otherwise. It changes nothing.

    Arguments:
        report: takes the advice.
        keep: whether epsilons are kept.
    """

    def __init__(self, report: Report, keep: bool) -> None:
        self._report = report
        self._keep = keep
        self._bounds: dict[tuple[float, torch.dtype], Note] = {}

    def misused(self, law: Law, term: Term, naive: Tensor, target: Any, name: str) -> None:
        """A call was given something else than it expects.

        Arguments:
            law: the call.
            term: what the law makes of it; its rule matches.
            naive: its first argument.
            target: its second.
            name: of the function.
        """
        if law.advice == "NG304" and not _is_saturated(naive, target):
            return
        self._give(law.advice, lambda names: {**_written(term, names), "function": f"F.{name}"})

    def concerns(self, law: Law, bound: Mapping[str, Any], parents: tuple[Known, ...]) -> bool:
        """Whether a constant is added to, or bounds, what is known."""
        if law.name not in _CONSTANTS or len(parents) != 1:
            return False
        names = (*_LOWER.get(law.name, ()), *_UPPER.get(law.name, ()), *(("input",) if law.name == "sub" else ()))
        return any(isinstance(bound[name], (int, float)) for name in names)

    def learnt(self, law: Law, bound: Mapping[str, Any], parents: tuple[Known, ...], result: Any) -> None:
        """A constant was added to, or bounds, what is known: a call that concerns it was made."""
        if not isinstance(result, Tensor):
            return
        term, dtype = parents[0].term, result.dtype
        if law.name == "sub":
            self._subtracted(term, dtype)
        if not is_probability_or_total(term):
            return
        for name in _LOWER.get(law.name, ()):
            if _vanishes(bound[name], 0.0, dtype):
                self._give("NG305", functools.partial(_constant, core(term), bound[name], 0, dtype))
        for name in _UPPER.get(law.name, ()):
            if _vanishes(bound[name], 1.0, dtype):
                self._remember(term, bound[name], dtype)
        if law.name == "sub" and _vanishes(bound["input"], 1.0, dtype):
            self._give("NG305", functools.partial(_constant, _rest(term), bound["input"], 1, dtype))

    def _subtracted(self, term: Term, dtype: torch.dtype) -> None:
        """What is known was subtracted from a number: now its upper bound matters."""
        while isinstance(term, Apply) and (term.operator.move or term.operator in (ops.MINUS, ops.CLAMP_MIN)):
            term = term.args[0]
        if self._bounds and isinstance(term, Apply) and term.operator is ops.CLAMP_MAX:
            note = self._bounds.get((term.params["constant"], dtype))
            if note is not None:
                note.give()

    def watches(self, law: Law, term: Term) -> bool:
        """Whether the numbers of such an answer have to be looked at."""
        if law.name == "log1p":
            return True
        return self._keep and law.name in ("log", "log2", "log10") and without_epsilon(term) is not None

    def floored(self, term: Term) -> Term | None:
        """What stands under the bounds of `torch.distributions`, where it is what asks for the logarithm."""
        inner = without_floor(term)
        return inner if inner is not None and _is_asked_by_distributions() else None

    def answered(
        self, law: Law, parents: tuple[Known, ...], term: Term, floored: Term | None, stable: Tensor, dtype: torch.dtype
    ) -> None:
        """A logarithm was replaced.

        Arguments:
            law: the query.
            parents: what it asked about.
            term: what it is replaced by.
            floored: what stands under the bounds of `torch.distributions`.
            stable: its value, before it becomes part of the user's graph.
            dtype: that of the probabilities.
        """
        if law.name == "log1p":
            self._subtracted(parents[0].term, dtype)
        if floored is not None:
            epsilon = torch.finfo(dtype).eps
            note = self._saturating("NG303", floored, stable, math.log(epsilon), {"epsilon": f"{epsilon:.2g}"})
            if note is not None and bool(_is_below(floored, stable, math.log(epsilon) - _NEAR).any()):
                note.give()
        elif self._keep and stable.requires_grad and law.name in ("log", "log2", "log10"):
            found = without_epsilon(term)
            if found is not None:
                self._hidden(*found, stable)

    def _hidden(self, bare: Term, epsilon: float, scale: float, stable: Tensor) -> None:
        """Once it is certain that a derivative is lost: when it is on its way to what the epsilon hides."""
        floor = scale * math.log(epsilon)
        note = self._saturating("NG306", bare, stable, floor, {"constant": repr(epsilon)})
        if note is None:
            return
        lost = _is_below(bare, stable, floor - scale * _FAR)
        if not bool(lost.any()):
            return

        def watch(gradients: tuple[Tensor | None, ...]) -> None:
            gradient = gradients[0]
            if gradient is None or not _is_readable(gradient):
                return
            with torch.no_grad(), torch._C.DisableTorchFunction():
                size = gradient.abs()
                if bool(size.masked_fill(~lost, 0.0).amax() > _NEGLIGIBLE * size.amax()):
                    note.give()

        assert stable.grad_fn is not None
        stable.grad_fn.register_prehook(watch)

    def _saturating(self, code: str, bare: Term, stable: Tensor, floor: float, facts: dict[str, str]) -> Note | None:
        """Where the value is at a bound: the note that waits for certainty. One that was given already is given again."""
        if not _is_readable(stable) or stable.detach().amin().item() > floor + _NEAR:
            return None
        note = self._report.note(lookup(code), lambda names: {**_written(bare, names), **facts})
        if note is not None and note.is_given:
            note.give()
            return None
        return note if note is not None and note.is_worth_a_look() else None

    def _remember(self, term: Term, bound: float, dtype: torch.dtype) -> None:
        note = self._report.note(lookup("NG305"), functools.partial(_constant, _rest(term), bound, 1, dtype))
        if note is not None:
            self._bounds[bound, dtype] = note

    def _give(self, code: str, facts: Callable[[FrameNames], dict[str, str]]) -> None:
        note = self._report.note(lookup(code), facts)
        if note is not None:
            note.give()


def _written(term: Term, names: FrameNames) -> dict[str, str]:
    """The fields of a text that are about a term: its stable form, and its logits."""
    if isinstance(term, Apply) and term.operator is ops.BINARY_CROSS_ENTROPY:
        term = term.args[0]
    found = core(term)
    inner = found.args[0] if isinstance(found, Apply) and found.args else found
    return {"stable": write(found, names), "logits": names.of(inner, "logits") if isinstance(inner, Leaf) else "logits"}


def _constant(term: Term, number: float, rounded: int, dtype: torch.dtype, names: FrameNames) -> dict[str, str]:
    name = str(dtype).removeprefix("torch.")
    return {**_written(term, names), "constant": repr(number), "rounded": str(rounded), "dtype": name}


def _rest(term: Term) -> Term:
    return sums.complement(core(term), 1.0)


def _vanishes(number: Any, limit: float, dtype: torch.dtype) -> bool:
    """Whether a number other than the limit is the limit in this dtype."""
    return type(number) is float and number != limit and math.isfinite(number) and _rounded(number, dtype) == limit


@functools.lru_cache(256)
def _rounded(number: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(number, dtype=torch.float64).to(dtype).item())


def _is_readable(tensor: Tensor) -> bool:
    """Whether its numbers can be looked at without waiting for them, and without anybody noticing."""
    if tensor.device.type != "cpu" or tensor.numel() == 0:
        return False
    return not torch._C._len_torch_dispatch_stack() and not environment.in_transform()


def _is_below(term: Term, stable: Tensor, bound: float) -> Tensor:
    """Where a term is below a bound, but not at the logarithm of 0."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        value = evaluate(term, stable.dtype)
        return (value < bound) & value.isfinite()


def _is_saturated(p: Tensor, target: Any) -> bool:
    """Whether a probability is so close to 0 or 1, and not at its target, that its loss or derivative is bounded."""
    if not _is_readable(p) or not isinstance(target, Tensor):
        return False
    p, target = p.detach(), target.detach()
    low, high = torch.aminmax(p)
    if low.item() >= _CLOSEST and 1 - high.item() >= _CLOSEST:
        return False
    return bool((((p < _CLOSEST) & (target > 0)) | ((1 - p < _CLOSEST) & (target < 1))).any())


_OWN = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "")


def _is_asked_by_distributions() -> bool:
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OWN):
        frame = frame.f_back
    return frame.f_code.co_filename == distributions.__file__
