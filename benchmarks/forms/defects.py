"""What is wrong with the zoo itself."""

from __future__ import annotations

import math

import torch

from forms.judge import broken, compare, is_finite, prepared, reference, run, unguarded, weights
from forms.registry import Form, Innocent

__all__ = ["defects", "fails"]


def defects(form: Form) -> list[str]:
    """What is wrong with a form itself: its reference, or inputs that do not break what they should."""
    try:
        return _defects(form)
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]


def fails(entry: Innocent) -> list[str]:
    """Inputs on which an innocent does not run at all."""
    return [f"{kind}: {note}" for kind in entry.inputs if (note := _failure(entry, kind))]


def _failure(entry: Innocent, kind: str) -> str:
    try:
        run(entry.function, *prepared(entry, kind))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _defects(form: Form) -> list[str]:
    found = []
    if form.double and form.stable is not None:
        exact = reference(form, "mild")
        naive = run(form.undisturbed, *prepared(form, "mild", torch.float64))
        names = ("value", *(f"gradient {i}" for i in range(len(exact.gradients))))
        for name, a, b in zip(names, (naive.value, *naive.gradients), (exact.value, *exact.gradients), strict=True):
            if (a is None) != (b is None):
                found.append(f"mild: {name} is {'missing' if a is None else 'new'}")
            elif a is not None and b is not None and (note := compare(name, a, b, 1e-9, 1e-11)):
                found.append(f"mild: {note} in float64")
    plain = unguarded(form, "mild")
    if form.epsilon == "keep" and not (right := broken(form, "mild", plain)):
        found.append(f"mild: the naive code is wrong: {right.note}")
    if form.stable is not None and not form.infinite:
        found += [
            f"{kind}: the reference is not finite" for kind in form.inputs if not is_finite(reference(form, kind))
        ]
    if form.stable is not None and not form.infinite and agree(form, "mild") and not agree(form, "extreme"):
        found.append("extreme: the gradient of the reference is not the slope of its values")
    if form.breaks and broken(form, "extreme", unguarded(form, "extreme")):
        found.append("extreme: the naive code is right")
    if form.stable is not None and not form.breaks:
        wrong = {kind: broken(form, kind, unguarded(form, kind)) for kind in form.inputs}
        found += [f"{kind}: the naive code of a twin is wrong: {v.note}" for kind, v in wrong.items() if not v]
    return found


STEP = 1e-6  # of each input, relative to it


def agree(form: Form, kind: str) -> bool:
    """Whether the gradient of a reference is the slope of its values, in a direction that has all inputs in it."""
    inputs, leaves = prepared(form, kind, torch.float64)
    generator = torch.Generator().manual_seed(0)
    directions = []
    for leaf in leaves:
        scale = torch.where(leaf.isfinite(), leaf.detach().abs(), 0.0)
        directions.append(scale * torch.rand(leaf.shape, generator=generator, dtype=torch.float64))
    totals = []
    for sign in (1, -1):
        with torch.no_grad():
            for leaf, direction, start in zip(leaves, directions, prepared(form, kind, torch.float64)[1], strict=True):
                leaf.copy_(start + sign * STEP * direction)
        value = form.exact(*inputs).detach()
        totals.append(float((value * weights(value)).sum()))
    slope = (totals[0] - totals[1]) / (2 * STEP)
    gradients = reference(form, kind).gradients
    parts = [float((g * d).sum()) for g, d in zip(gradients, directions, strict=True) if g is not None]
    allowed = 1e-5 * max(1.0, *map(abs, parts), *map(abs, totals))
    return math.isclose(slope, sum(parts), rel_tol=1e-4, abs_tol=allowed)
