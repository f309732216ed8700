"""Exponentials, their sums, and what the logarithm of those is."""

# A law is documented by the equation above it, a rule by markdown.
# ruff: noqa: D103, D415

from __future__ import annotations

import math

from nanguard.algebra import build, sums, totals
from nanguard.algebra import operators as ops
from nanguard.algebra.call import Call
from nanguard.algebra.pattern import core, is_bare, is_over_probabilities, is_sum
from nanguard.algebra.registry import law, rule
from nanguard.algebra.term import Apply, Term, Unrecognised


# log exp(x) = x,  exp log p = p
@law(
    "torch.exp(input)\n torch.Tensor.exp(input)\n torch.Tensor.exp_(input)\n torch.exp_(input)",
    source=True,
    branch="singular",
)
def exp(call: Call) -> Term:
    return call.exponential() or call.leaf()


# log 2^x = x log 2
@law(
    """
    torch.exp2(input)
    torch.special.exp2(input)
    torch.Tensor.exp2(input)
    torch.Tensor.exp2_(input)
    torch.exp2_(input)
    """,
    source=True,
    branch="singular",
)
def exp2(call: Call) -> Term:
    return build.scale(call.leaf(), math.log(2))


# expm1(x) = e^x - 1
@law(
    """
    torch.expm1(input)
    torch.special.expm1(input)
    torch.Tensor.expm1(input)
    torch.Tensor.expm1_(input)
    torch.expm1_(input)
    """,
    source=True,
    branch="singular",
)
def expm1(call: Call) -> Term:
    known, x = call.exponential(), call.leaf()
    return Apply(ops.EXPM1, (x,), x.shape) if known is None else sums.plus_constant(known, -1.0)


# log sum p = logsumexp(log p)
@law(
    """
    torch.sum(input, dim=None, keepdim=False, *, dtype=None)
    torch.Tensor.sum(input, dim=None, keepdim=False, *, dtype=None)
    """
)
def _sum(call: Call) -> Term:
    log = call.log()
    return totals.logsumexp(log, call.dims(log.shape), _flag(call, "keepdim"))


# the same without what is NaN
@law(
    """
    torch.nansum(input, dim=None, keepdim=False, *, dtype=None)
    torch.Tensor.nansum(input, dim=None, keepdim=False, *, dtype=None)
    """
)
def nansum(call: Call) -> Term:
    log = build.positive(call.log())
    numbers = Apply(ops.NAN_TO_ZERO, (log,), log.shape)
    return totals.logsumexp(numbers, call.dims(log.shape), _flag(call, "keepdim"))


# log mean p = logsumexp(log p) - log n
@law(
    """
    torch.mean(input, dim=None, keepdim=False, *, dtype=None)
    torch.Tensor.mean(input, dim=None, keepdim=False, *, dtype=None)
    """
)
def mean(call: Call) -> Term:
    log = call.log()
    return totals.logmeanexp(log, call.dims(log.shape), _flag(call, "keepdim"))


# log cumsum p = logcumsumexp(log p)
@law(
    """
    torch.cumsum(input, dim, *, dtype=None)
    torch.Tensor.cumsum(input, dim, *, dtype=None)
    torch.Tensor.cumsum_(input, dim, *, dtype=None)
    """
)
def cumsum(call: Call) -> Term:
    log = call.log()
    return totals.logcumsumexp(log, call.dim(log.shape))


# log(p + q) = logaddexp(log p, log q),  log(p + c) = logaddexp(log p, log c)
@law(
    """
    torch.add(input, other, *, alpha=1)
    torch.Tensor.add(input, other, *, alpha=1)
    torch.Tensor.__add__(input, other)
    torch.Tensor.__radd__(input, other)
    torch.Tensor.add_(input, other, *, alpha=1)
    torch.Tensor.__iadd__(input, other)
    """,
    branch="follows",
)
def add(call: Call) -> Term:
    if call.known("input") and call.known("other"):
        return sums.logaddexp(call.log("input"), multiplied(call, "other"))
    if call.arguments.get("alpha", 1) != 1:
        raise Unrecognised
    constant, tensor = ("other", "input") if call.known("input") else ("input", "other")
    log = call.log(tensor)
    if not call.is_number(constant) and log.shape and call.weight(constant).shape == ():
        return sums.logaddexp(log, totals.unknown(call.weight(constant)))  # a number that only a device knows
    return build.expand(sums.plus_constant(log, call.number(constant)), call.shape)


def multiplied(call: Call, name: str) -> Term:
    """The logarithm of an operand times `alpha`."""
    if call.arguments.get("alpha", 1) == 1:
        return call.log(name)
    return build.shift(call.log(name), math.log(call.positive("alpha")))


# p + w (q - p) = (1 - w) p + w q
@law("torch.lerp(input, end, weight)\n torch.Tensor.lerp(input, end, weight)")
def lerp(call: Call) -> Term:
    weight = call.number("weight")
    if not 0 <= weight <= 1:
        raise Unrecognised
    start, end = (math.log(part) if part else -math.inf for part in (1 - weight, weight))
    return sums.logaddexp(build.shift(call.log("input"), start), build.shift(call.log("end"), end))


def _flag(call: Call, name: str) -> bool:
    return bool(call[name])


def _over_probabilities(term: Term) -> bool:
    found = core(term)
    return isinstance(found, Apply) and is_over_probabilities(found.args[0])


@rule("NG103", "logsumexp")
def log_of_sum_of_exponentials(term: Term) -> bool:
    """## What it does

    Finds the logarithm of a sum or a mean of exponentials.

    ## Why is this bad

    exp(x) overflows from 89 on in float32, and a sum of exponentials of very negative numbers is 0: the logarithm is inf or
    -inf although the result is an ordinary number.

    ## Example

    ```python
    result = torch.log(torch.exp(logits).sum(dim=1))
    ```

    ## Use instead

    ```python
    result = torch.logsumexp(logits, dim=1)
    ```

    ## Fix safety

    Equal to rounding wherever the original is accurate. Where all terms are -inf, the stabilised gradient is 0, not NaN.

    ## References

    - https://docs.pytorch.org/docs/stable/generated/torch.logsumexp.html
    """
    return is_sum(core(term)) and not _over_probabilities(term)


@rule("NG106", "log-exp")
def log_of_exponential(term: Term) -> bool:
    """## What it does

    Finds the logarithm of an exponential, also of a scaled, shifted or selected one.

    ## Why is this bad

    It is the identity, but by way of numbers that overflow or vanish.

    ## Example

    ```python
    result = torch.log(torch.exp(logits))
    ```

    ## Use instead

    ```python
    result = logits.clone()
    ```

    ## Fix safety

    Equal to rounding wherever the original is accurate.
    """
    return is_bare(term)


@rule("NG107", "log-marginal")
def log_of_summed_probabilities(term: Term) -> bool:
    """## What it does

    Finds the logarithm of a sum or a mean of probabilities, such as a batch marginal or an ensemble.

    ## Why is this bad

    Probabilities that vanish take their gradient with them; if all do, the logarithm is -inf.

    ## Example

    ```python
    p = torch.softmax(logits, dim=1)
    result = torch.log(p.mean(dim=0))
    ```

    ## Use instead

    ```python
    log_p = F.log_softmax(logits, dim=1)
    result = torch.logsumexp(log_p, dim=0) - math.log(len(log_p))
    ```

    ## Fix safety

    Equal to rounding wherever the original is accurate. The mean of the logarithms would be another quantity.

    ## References

    - https://docs.pytorch.org/docs/stable/generated/torch.logsumexp.html
    """
    return is_sum(core(term)) and _over_probabilities(term)
