"""Sums with a constant or with each other, and bounds: the usual guards against log 0."""

# A law is documented by the equation above it.
# ruff: noqa: D103

from __future__ import annotations

from nanguard.algebra import build
from nanguard.algebra.call import Call
from nanguard.algebra.pattern import is_probability_or_total
from nanguard.algebra.registry import law
from nanguard.algebra.term import Apply, Leaf, Term, Unrecognised

LARGEST_EPSILON = 1e-3


# log(p + q) = logaddexp(log p, log q),  log(p + c) = logaddexp(log p, log c)
@law(
    """
    torch.add(input, other, *, alpha=1)
    torch.Tensor.add(input, other, *, alpha=1)
    torch.Tensor.__add__(input, other)
    torch.Tensor.__radd__(input, other)
    torch.Tensor.add_(input, other, *, alpha=1)
    torch.Tensor.__iadd__(input, other)
    """
)
def add(call: Call) -> Term:
    if call.arguments.get("alpha", 1) != 1:
        raise Unrecognised
    if call.known("input") and call.known("other"):
        return build.logaddexp(call.log("input"), call.log("other"))
    constant, tensor = ("other", "input") if call.known("input") else ("input", "other")
    value, log = call.number(constant), call.log(tensor)
    if value < 0:
        raise Unrecognised
    return log if value == 0 else build.plus_constant(log, value)


# log clamp(p, a, b) = clamp(log p, log a, log b); a lower bound of 0 or less bounds nothing
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
    """
)
def clamp(call: Call) -> Term:
    minimum = None if call["min"] is None else call.number("min")
    maximum = None if call["max"] is None else call.positive("max")
    return build.clamp(call.log(), minimum if minimum is not None and minimum > 0 else None, maximum)


# the same, one-sided
@law(
    """
    torch.clamp_min(input, min)
    torch.Tensor.clamp_min(input, min)
    torch.Tensor.clamp_min_(input, min)
    torch.clamp_min_(input, min)
    """
)
def clamp_min(call: Call) -> Term:
    minimum = call.number("min")
    return build.clamp(call.log(), minimum if minimum > 0 else None, None)


@law(
    """
    torch.clamp_max(input, max)
    torch.Tensor.clamp_max(input, max)
    torch.Tensor.clamp_max_(input, max)
    torch.clamp_max_(input, max)
    """
)
def clamp_max(call: Call) -> Term:
    return build.clamp(call.log(), None, call.positive("max"))


def drop_epsilons(term: Term) -> Term:
    """The term without small epsilons on probabilities and sums of exponentials.

    An epsilon is at most 1e-3, and is added to, or bounds from below, what `is_probability_or_total` says. Where the
    probability is truly 0 (a masked logit) the epsilon stays: log 0 would bring an infinity, and p log p a NaN, that the
    original never had.
    """
    if isinstance(term, Leaf):
        return term
    args = tuple(drop_epsilons(arg) for arg in term.args)
    if term.operator in (build.PLUS_CONSTANT, build.CLAMP_MIN):
        constant = term.params["constant"]
        if constant <= LARGEST_EPSILON and is_probability_or_total(args[0]):
            return Apply(build.FLOOR_ZERO, args, term.shape, constant=constant)
    return Apply(term.operator, args, term.shape, **term.params)
