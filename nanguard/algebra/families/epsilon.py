"""Bounds, and what of the usual guards against log 0 can be dropped."""

# A law is documented by the equation above it.
# ruff: noqa: D103

from __future__ import annotations

from typing import Any

from nanguard.algebra import operators as ops
from nanguard.algebra import totals
from nanguard.algebra.build import positive
from nanguard.algebra.call import Call
from nanguard.algebra.pattern import LARGEST_EPSILON, is_probability_or_total
from nanguard.algebra.registry import law
from nanguard.algebra.term import Apply, Leaf, Term


# log clamp(p, a, b) = clamp(log p, log a, log b)
@law(
    """
    torch.clamp(input, min=None, max=None)
    torch.clip(input, min=None, max=None)
    torch.Tensor.clamp(input, min=None, max=None)
    torch.Tensor.clip(input, min=None, max=None)
    torch.Tensor.clamp_(input, min=None, max=None)
    torch.Tensor.clip_(input, min=None, max=None)
    torch.clamp_(input, min=None, max=None)
    torch.clip_(input, min=None, max=None)
    """,
    branch="selects",
)
def clamp(call: Call) -> Term:
    minimum = None if call["min"] is None else call.number("min")
    maximum = None if call["max"] is None else call.positive("max")
    return _bounded(call.log(), minimum, maximum)


def _bounded(log: Term, minimum: float | None, maximum: float | None) -> Term:
    """A lower bound of 0 or less bounds nothing that is positive."""
    if minimum is not None and minimum <= 0:
        return totals.clamp(positive(log), None, maximum)
    return totals.clamp(log, minimum, maximum)


# the same, one-sided
@law(
    """
    torch.clamp_min(input, min)
    torch.Tensor.clamp_min(input, min)
    torch.Tensor.clamp_min_(input, min)
    torch.clamp_min_(input, min)
    """,
    branch="selects",
)
def clamp_min(call: Call) -> Term:
    return _bounded(call.log(), call.number("min"), None)


@law(
    """
    torch.clamp_max(input, max)
    torch.Tensor.clamp_max(input, max)
    torch.Tensor.clamp_max_(input, max)
    torch.clamp_max_(input, max)
    """,
    branch="selects",
)
def clamp_max(call: Call) -> Term:
    return totals.clamp(call.log(), None, call.positive("max"))


def drop_epsilons(term: Term) -> Term:
    """The term without small epsilons on probabilities and sums of exponentials.

    An epsilon is at most 1e-3, and is added to, or bounds from below (or by as little from above), what
    `is_probability_or_total` says. Where the
    probability is truly 0 (a masked logit) the epsilon stays: log 0 would bring an infinity, and p log p a NaN, that the
    original never had.
    """
    if isinstance(term, Leaf):
        return term
    args = tuple(drop_epsilons(arg) for arg in term.args)
    constant: Any = term.params.get("constant")
    if (
        term.operator is ops.CLAMP_MAX
        and 1 - LARGEST_EPSILON <= constant <= 1
        and is_probability_or_total(term.args[0])
    ):
        return args[0]
    small = term.operator in (ops.PLUS_CONSTANT, ops.CLAMP_MIN) and constant <= LARGEST_EPSILON
    if small and is_probability_or_total(term.args[0]):
        return Apply(ops.FLOOR_ZERO, args, term.shape, constant=constant)
    return Apply(term.operator, args, term.shape, **term.params)
