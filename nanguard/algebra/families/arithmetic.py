"""Products, quotients and powers: the logarithm turns them into sums, differences and multiples."""

# A law is documented by the equation above it, a rule by markdown.
# ruff: noqa: D103, D415

from __future__ import annotations

import math
from typing import Any

from nanguard.algebra import build, totals
from nanguard.algebra import operators as ops
from nanguard.algebra.axes import is_misaligned
from nanguard.algebra.build import positive
from nanguard.algebra.call import Call
from nanguard.algebra.pattern import core_is, is_disguised, is_over_probabilities, is_renormalised, renormalises
from nanguard.algebra.registry import law, rule
from nanguard.algebra.term import Apply, Term, Unrecognised


# log(p q) = log p + log q,  log(c p) = log p + log c; a tensor of unknown sign is kept as a weight
@law(
    """
    torch.mul(input, other)
    torch.multiply(input, other)
    torch.Tensor.mul(input, other)
    torch.Tensor.multiply(input, other)
    torch.Tensor.__mul__(input, other)
    torch.Tensor.__rmul__(input, other)
    torch.Tensor.mul_(input, other)
    torch.Tensor.multiply_(input, other)
    torch.Tensor.__imul__(input, other)
    """,
    quotient=True,
    branch="follows",
)
def mul(call: Call) -> Term:
    if call.known("input") and call.known("other"):
        return build.add(*_aligned(call.log("input"), call.log("other")))
    if call.is_number("input") and call.is_number("other"):
        return totals.full(call.number("input") * call.number("other"), call.shape)
    constant, tensor = ("other", "input") if call.known("input") else ("input", "other")
    log = call.log(tensor)
    if call.is_number(constant):
        number = call.number(constant)
        # log(0 p) = log p - inf, as where a mixture begins or ends
        scaled = _times(log, number) if number else build.shift(positive(log), -math.inf)
        return build.expand(scaled, call.shape)
    weight = call.weight(constant)
    if is_over_probabilities(log) and weight.tracked and math.prod(weight.shape) >= math.prod(log.shape):
        raise Unrecognised  # the gate of a network, or its values: nobody asks for that logarithm, and it keeps memory alive
    return totals.weigh(log, weight)


def _aligned(a: Term, b: Term) -> tuple[Term, Term]:
    if is_misaligned(a, b):
        raise Unrecognised
    return a, b


def _times(log: Term, constant: float) -> Term:
    if constant == 0:
        raise Unrecognised
    scaled = build.shift(log, math.log(abs(constant)))
    return scaled if constant > 0 else build.minus(scaled)


# log(p / q) = log p - log q,  log(p / c) = log p - log c,  log(c / q) = log c - log q
@law(
    """
    torch.div(input, other, *, rounding_mode=None)
    torch.divide(input, other, *, rounding_mode=None)
    torch.true_divide(input, other)
    torch.Tensor.div(input, other, *, rounding_mode=None)
    torch.Tensor.divide(input, other, *, rounding_mode=None)
    torch.Tensor.true_divide(input, other)
    torch.Tensor.__truediv__(input, other)
    torch.Tensor.__div__(input, other)
    torch.Tensor.__rdiv__(other, input)
    torch.Tensor.__rtruediv__(other, input)
    torch.Tensor.div_(input, other, *, rounding_mode=None)
    torch.Tensor.divide_(input, other, *, rounding_mode=None)
    torch.Tensor.true_divide_(input, other)
    torch.Tensor.__itruediv__(input, other)
    torch.Tensor.__idiv__(input, other)
    """,
    quotient=True,
    branch="singular",
)
def div(call: Call) -> Term:
    if call.arguments.get("rounding_mode") is not None:
        raise Unrecognised
    if not call.is_number("other") and call.known("input") and _is_no_softmax(call):
        raise Unrecognised
    if call.known("input") and call.known("other"):
        return build.subtract(*_aligned(call.log("input"), call.log("other")))
    if call.is_number("input"):
        return build.expand(_times(build.negate(call.log("other")), call.number("input")), call.shape)
    if call.is_number("other"):
        number = call.number("other")
        return build.expand(_times(call.log("input"), 1 / number if number else 0.0), call.shape)
    if call.known("other"):
        return build.subtract(totals.unknown(call.weight("input")), call.log("other"))
    log, other = call.log("input"), call.weight("other")
    if renormalises(log, other.shape):
        raise Unrecognised
    return build.subtract(log, totals.unknown(other))


def _is_no_softmax(call: Call) -> bool:
    """Whether it was masked after the softmax, and is divided by something else than its total."""
    log = call.log("input")
    return is_disguised(log) and not (call.known("other") and is_renormalised(log, call.log("other")))


# log(1 / p) = -log p
@law(
    """
    torch.reciprocal(input)
    torch.Tensor.reciprocal(input)
    torch.Tensor.reciprocal_(input)
    """,
    quotient=True,
    branch="singular",
)
def reciprocal(call: Call) -> Term:
    return build.negate(call.log())


def _has_constant_base(args: tuple[Any, ...]) -> bool:
    return bool(args) and (isinstance(args[0], (int, float)) or getattr(args[0], "ndim", None) == 0)


# log p^k = k log p  (a power of -1 is a reciprocal),  log c^x = x log c
@law(
    """
    torch.pow(input, exponent)
    torch.float_power(input, exponent)
    torch.Tensor.pow(input, exponent)
    torch.Tensor.float_power(input, exponent)
    torch.Tensor.__pow__(input, exponent)
    torch.Tensor.pow_(input, exponent)
    torch.Tensor.__ipow__(input, exponent)
    """,
    source=_has_constant_base,
    quotient=True,
    branch="singular",
)
def _pow(call: Call) -> Term:
    if call.is_number("input") and not call.known("input"):
        return build.scale(call.leaf("exponent"), math.log(call.positive("input")))
    if not call.is_number("exponent"):
        log, power = positive(call.log()), call.weight("exponent")
        return Apply(ops.XLOGY, (log, power), build.broadcast_shapes(log.shape, power.shape))
    exponent = call.number("exponent")
    return build.scale(call.log(), exponent if exponent == -1.0 else call.positive("exponent"))


# log c^x = x log c
@law("torch.Tensor.__rpow__(exponent, input)", source=True, branch="singular")
def rpow(call: Call) -> Term:
    return build.scale(call.leaf("exponent"), math.log(call.positive("input")))


# log sqrt(p) = log(p) / 2
@law("torch.sqrt(input)\n torch.Tensor.sqrt(input)\n torch.Tensor.sqrt_(input)", quotient=True, branch="singular")
def sqrt(call: Call) -> Term:
    return build.scale(call.log(), 0.5)


# log(1 / sqrt(p)) = -log(p) / 2
@law("torch.rsqrt(input)\n torch.Tensor.rsqrt(input)\n torch.Tensor.rsqrt_(input)", quotient=True, branch="singular")
def rsqrt(call: Call) -> Term:
    return build.negate(build.scale(call.log(), 0.5))


# log p^2 = 2 log p
@law("torch.square(input)\n torch.Tensor.square(input)\n torch.Tensor.square_(input)", branch="follows")
def square(call: Call) -> Term:
    return build.scale(call.log(), 2.0)


# |p| = p, and |t - p| for a tensor t, such as labels
@law(
    "torch.abs(input)\n torch.absolute(input)\n torch.Tensor.abs(input)\n torch.Tensor.__abs__(input)", branch="follows"
)
def _abs(call: Call) -> Term:
    begun = call.begun()
    if isinstance(begun, Apply) and begun.operator is ops.OFFSET:
        return Apply(ops.DISTANCE, begun.args, begun.shape, difference=call.index("input"), **begun.params)
    return build.positive(call.log())


@rule("NG108", "log-ratio")
def log_of_ratio(term: Term) -> bool:
    """## What it does

    Finds the logarithm of a quotient of probabilities or exponentials, such as an importance ratio or a KL divergence.

    ## Why is this bad

    Numerator and denominator overflow or vanish one by one, although the difference of their logarithms is moderate.

    ## Example

    ```python
    result = torch.log(torch.softmax(logits, dim=1) / torch.softmax(other, dim=1))
    ```

    ## Use instead

    ```python
    result = F.log_softmax(logits, dim=1) - F.log_softmax(other, dim=1)
    ```

    ## Fix safety

    Equal to rounding wherever the original is accurate.
    """
    return core_is(term, ops.SUBTRACT)


@rule("NG109", "log-product")
def log_of_product(term: Term) -> bool:
    """## What it does

    Finds the logarithm of a product of probabilities or exponentials, also of `prod` and `cumprod`.

    ## Why is this bad

    The product of a few small probabilities is 0, its logarithm -inf; the sum of their logarithms is an ordinary number.

    ## Example

    ```python
    result = torch.log(torch.softmax(logits, dim=1) * torch.sigmoid(other))
    ```

    ## Use instead

    ```python
    result = F.log_softmax(logits, dim=1) + F.logsigmoid(other)
    ```

    ## Fix safety

    Equal to rounding wherever the original is accurate.
    """
    return core_is(term, ops.ADD, ops.SUM, ops.CUMSUM, ops.PRODUCT)


@rule("NG203", "exponential-ratio", kind="quotient")
def quotient_of_exponentials(term: Term) -> bool:
    """## What it does

    Finds quotients of exponentials or probabilities other than softmax and sigmoid, such as an importance ratio or odds.

    ## Why is this bad

    Numerator and denominator overflow or vanish one by one: inf / inf and 0 / 0 are NaN. Where the quotient is finite, as in
    1 / exp(x), its gradient need not be.

    ## Example

    ```python
    result = torch.softmax(logits, dim=1) / torch.softmax(logits + 1, dim=1)
    ```

    ## Use instead

    ```python
    result = torch.exp(F.log_softmax(logits, dim=1) - F.log_softmax(logits + 1, dim=1))
    ```

    ## Fix safety

    Equal to rounding wherever the original is accurate.
    """
    return core_is(term, ops.SUBTRACT, ops.NEGATE, through_negation=False)


@rule("NG204", "root-of-exponential", kind="quotient")
def root_of_exponential(term: Term) -> bool:
    """## What it does

    Finds roots, and powers below 1, of probabilities and exponentials.

    ## Why is this bad

    Once the number underflows to 0, the derivative of its root is inf, and inf times 0 is NaN; once it overflows, so does its
    root, which need not.

    ## Example

    ```python
    result = torch.sqrt(torch.exp(logits - 900))
    ```

    ## Use instead

    ```python
    result = torch.exp((logits - 900) / 2)
    ```

    ## Fix safety

    Equal to rounding wherever the original is accurate.
    """
    return core_is(term, ops.SCALE, through_scale=False)
