"""Products, quotients and powers: the logarithm turns them into sums, differences and multiples."""

# A law is documented by the equation above it, a rule by markdown.
# ruff: noqa: D103, D415

from __future__ import annotations

import math

from nanguard.algebra import build
from nanguard.algebra.call import Call
from nanguard.algebra.pattern import core_is
from nanguard.algebra.registry import law, rule
from nanguard.algebra.term import Term, Unrecognised


# log(p q) = log p + log q,  log(c p) = log p + log c
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
)
def mul(call: Call) -> Term:
    if call.known("input") and call.known("other"):
        return build.add(call.log("input"), call.log("other"))
    constant, tensor = ("other", "input") if call.known("input") else ("input", "other")
    return build.shift(call.log(tensor), math.log(call.positive(constant)))


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
)
def div(call: Call) -> Term:
    if call.arguments.get("rounding_mode") is not None:
        raise Unrecognised
    if not call.known("input"):
        return build.shift(build.negate(call.log("other")), math.log(call.positive("input")))
    if call.known("other"):
        return build.subtract(call.log("input"), call.log("other"))
    return build.shift(call.log("input"), -math.log(call.positive("other")))


# log(1 / p) = -log p
@law(
    """
    torch.reciprocal(input)
    torch.Tensor.reciprocal(input)
    torch.Tensor.reciprocal_(input)
    """,
    quotient=True,
)
def reciprocal(call: Call) -> Term:
    return build.negate(call.log())


# log p^k = k log p  (a power of -1 is a reciprocal)
@law(
    """
    torch.pow(input, exponent)
    torch.Tensor.pow(input, exponent)
    torch.Tensor.__pow__(input, exponent)
    torch.Tensor.pow_(input, exponent)
    torch.Tensor.__ipow__(input, exponent)
    """,
    quotient=True,
)
def _pow(call: Call) -> Term:
    exponent = call.number("exponent")
    return build.scale(call.log(), exponent if exponent == -1.0 else call.positive("exponent"))


# log sqrt(p) = log(p) / 2
@law("torch.sqrt(input)\n torch.Tensor.sqrt(input)\n torch.Tensor.sqrt_(input)")
def sqrt(call: Call) -> Term:
    return build.scale(call.log(), 0.5)


# log p^2 = 2 log p
@law("torch.square(input)\n torch.Tensor.square(input)\n torch.Tensor.square_(input)")
def square(call: Call) -> Term:
    return build.scale(call.log(), 2.0)


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
    return core_is(term, build.SUBTRACT)


@rule("NG109", "log-product")
def log_of_product(term: Term) -> bool:
    """## What it does

    Finds the logarithm of a product of probabilities or exponentials.

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
    return core_is(term, build.ADD)
