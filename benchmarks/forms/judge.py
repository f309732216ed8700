"""Runs a form in one of four ways, and judges value and gradient against the exact reference.

A float32 result is right if it is within `1e-3` of the reference, plus an absolute share of `1e-5` and of four roundings of the
largest input (a stable log-softmax of logits around 1000 cannot do better). Gradients are those of the result weighted with
0.5, 1 and 1.5 in turn; their absolute share is relative to the largest entry, where that is above 1. In half precision the
inputs are exact, and the relative share is eight roundings of the dtype, the absolute one four.
"""

from __future__ import annotations

import functools
import math
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

import nanguard
from forms.registry import Form, Innocent

__all__ = [
    "MODES",
    "Outcome",
    "Verdict",
    "broken",
    "differs",
    "judge",
    "prepared",
    "reference",
    "run",
    "unguarded",
    "way",
]

MODES = ("torch eager", "torch.compile", "nanguard eager", "nanguard compiled")


@dataclass(frozen=True)
class Outcome:
    """What came out: the value, and one gradient for each floating-point input (`None` where there is none)."""

    value: Tensor
    gradients: tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Verdict:
    """Whether value and gradient are right; `note` says what is wrong first."""

    value: bool
    gradient: bool
    note: str = ""

    def __bool__(self) -> bool:
        return self.value and self.gradient


def prepared(entry: Form | Innocent, kind: str, dtype: torch.dtype | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs, and those of them that get gradients."""
    inputs = [
        tensor.detach().to(dtype, copy=True)
        if dtype is not None and tensor.is_floating_point()
        else tensor.detach().clone()
        for tensor in entry.inputs[kind]()
    ]
    leaves = [
        tensor.requires_grad_()
        for position, tensor in enumerate(inputs)
        if tensor.is_floating_point() and position not in entry.constant
    ]
    return inputs, leaves


def weights(value: Tensor) -> Tensor:
    """What a result is contracted with: 0.5, 1 and 1.5 in turn, which every dtype has."""
    return ((torch.arange(value.numel()) % 3 + 1) * 0.5).reshape(value.shape).to(value.dtype)


def run(
    function: Callable[..., Tensor],
    inputs: list[Tensor],
    leaves: list[Tensor],
    context: AbstractContextManager[object] | None = None,
) -> Outcome:
    """Value and gradients; only the forward pass runs inside the context."""
    with context or nullcontext():
        value = function(*inputs)
    if not value.requires_grad or not leaves:
        return Outcome(value.detach(), (None,) * len(leaves))
    value.backward(weights(value))
    return Outcome(value.detach(), tuple(leaf.grad for leaf in leaves))


@functools.cache
def reference(form: Form, kind: str) -> Outcome:
    """The exact outcome."""
    return run(form.exact, *prepared(form, kind, torch.float64))


@functools.cache
def unguarded(form: Form, kind: str) -> Outcome:
    """What torch computes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run(form.naive, *prepared(form, kind))


def way(
    mode: str, entry: Form | Innocent, backend: str
) -> tuple[Callable[..., Tensor], Callable[[], AbstractContextManager[object]]]:
    """The function to call and the context to call it in."""
    function = entry.naive if isinstance(entry, Form) else entry.function
    if mode.endswith(("compile", "compiled")):
        function = torch.compile(function, backend=backend, dynamic=False)
    if not mode.startswith("nanguard"):
        return function, nullcontext
    if not isinstance(entry, Form):
        return function, lambda: nanguard.stabilize(advice=[])
    return function, lambda: nanguard.stabilize(epsilon=entry.epsilon, saturated=entry.saturated, advice=[])


def judge(form: Form, mode: str, kind: str, backend: str = "aot_eager", ready: tuple | None = None) -> Verdict:
    """The verdict on one form in one mode with inputs of one kind."""
    function, context = ready or way(mode, form, backend)
    try:
        with warnings.catch_warnings(), _limited(60 if "compile" in mode else 10):
            warnings.simplefilter("ignore")
            outcome = run(function, *prepared(form, kind), context())
    except Exception as error:
        return Verdict(False, False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    if form.stable is None and kind != "mild":
        fresh = _no_new_nan(outcome, unguarded(form, kind))
        return _no_worse(form, kind, outcome) if fresh else fresh
    verdict = broken(form, kind, outcome)
    if verdict or not mode.startswith("nanguard"):
        return verdict
    fresh = _no_new_nan(outcome, unguarded(form, kind))
    return verdict if fresh else Verdict(verdict.value, verdict.gradient, f"{verdict.note}; {fresh.note}")


@contextmanager
def _limited(seconds: int) -> Iterator[None]:
    """Give up on what takes longer; in a main thread, and where there are signals."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def interrupt(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def broken(form: Form, kind: str, outcome: Outcome) -> Verdict:
    """Compare an outcome with the reference."""
    exact = reference(form, kind)
    inputs = [tensor for tensor in form.inputs[kind]() if tensor.is_floating_point()]
    rounding = max(torch.finfo(tensor.dtype).eps for tensor in (*inputs, outcome.value))
    rounding = max(rounding, torch.finfo(form.precision).eps)
    if rounding > 1e-5:
        relative = 8 * rounding * form.tolerance
        absolute = 4 * rounding * form.tolerance
    else:
        largest = max((_largest(tensor) for tensor in inputs), default=1.0)
        relative = 1e-3 * form.tolerance
        absolute = (1e-5 + 4 * torch.finfo(torch.float32).eps * largest) * form.tolerance
    note = compare("value", outcome.value, exact.value, relative, absolute)
    slope_note = ""
    for position, (found, expected) in enumerate(zip(outcome.gradients, exact.gradients, strict=True)):
        if found is None or expected is None:
            one_sided = expected if found is None else found
            if one_sided is not None and not (one_sided == 0).all():
                slope_note = slope_note or f"gradient {position} is {'missing' if found is None else 'new'}"
            continue
        scale = max(1.0, _largest(expected))
        slope_note = slope_note or compare(f"gradient {position}", found, expected, relative, absolute * scale)
    return Verdict(not note, not slope_note, "; ".join(filter(None, (note, slope_note))))


def differs(before: Outcome, after: Outcome) -> str:
    """Where two outcomes are not the same bits; empty where they are."""
    pairs = [("value", before.value, after.value)]
    pairs += [(f"gradient {i}", a, b) for i, (a, b) in enumerate(zip(before.gradients, after.gradients, strict=True))]
    for name, expected, found in pairs:
        if (expected is None) != (found is None):
            return f"{name} is {'new' if expected is None else 'missing'}"
        if expected is None:
            continue
        if expected.dtype != found.dtype or expected.shape != found.shape:
            return f"{name} is {found.dtype} {tuple(found.shape)}, was {expected.dtype} {tuple(expected.shape)}"
        same = (expected == found) | (expected.isnan() & found.isnan())
        if not same.all():
            return f"{name} has changed by {(expected.double() - found.double()).abs().max():.3g}"
    return ""


def _largest(tensor: Tensor) -> float:
    finite = tensor.detach().double().abs()
    finite = finite[finite.isfinite()]
    return float(finite.max()) if finite.numel() else 0.0


def compare(name: str, found: Tensor, expected: Tensor, relative: float, absolute: float) -> str:
    if found.shape != expected.shape:
        return f"{name} has shape {tuple(found.shape)}, not {tuple(expected.shape)}"
    found = found.double()
    wrong = ~torch.isclose(found, expected, rtol=relative, atol=absolute)
    if not wrong.any():
        return ""
    first = int(wrong.flatten().nonzero()[0])
    pair = f"{found.flatten()[first]:.6g}, exactly {expected.flatten()[first]:.6g}"
    return f"{name} {pair} ({int(wrong.sum())} of {wrong.numel()})"


def _no_new_nan(after: Outcome, before: Outcome) -> Verdict:
    notes = []
    pairs = [("value", after.value, before.value)]
    pairs += [(f"gradient {i}", a, b) for i, (a, b) in enumerate(zip(after.gradients, before.gradients, strict=True))]
    for name, found, plain in pairs:
        if found is not None and plain is not None and (~found.isfinite() & plain.isfinite()).any():
            notes.append(f"{name}: new {'NaN' if found.isnan().any() else 'infinity'}")
    return Verdict(
        "value" not in "".join(notes), not any(note.startswith("gradient") for note in notes), "; ".join(notes)
    )


def _no_worse(form: Form, kind: str, outcome: Outcome) -> Verdict:
    """Where float32 agrees with float64, an outcome has to do so too, whatever float64 is worth there."""
    own, plain = reference(form, kind), unguarded(form, kind)
    notes = []
    names = ("value", *(f"gradient {i}" for i in range(len(own.gradients))))
    triples = zip(
        (outcome.value, *outcome.gradients), (plain.value, *plain.gradients), (own.value, *own.gradients), strict=True
    )
    for name, (found, before, expected) in zip(names, triples, strict=True):
        if found is None or before is None or expected is None:
            continue
        absolute = 1e-4 * max(1.0, _largest(expected))
        agreed = torch.isclose(before.double(), expected, rtol=1e-4, atol=absolute / 10) & expected.isfinite()
        wrong = agreed & ~torch.isclose(found.double(), expected, rtol=1e-3, atol=absolute)
        if wrong.any():
            first = int(wrong.flatten().nonzero()[0])
            notes.append(f"{name} {found.flatten()[first]:.6g}, was rightly {expected.flatten()[first]:.6g}")
    return Verdict(
        "value" not in "".join(notes), not any(note.startswith("gradient") for note in notes), "; ".join(notes)
    )


def is_finite(outcome: Outcome) -> bool:
    """Whether value and gradients are."""
    found = [outcome.value, *(gradient for gradient in outcome.gradients if gradient is not None)]
    return all(math.isfinite(float(tensor.double().abs().sum())) for tensor in found)
