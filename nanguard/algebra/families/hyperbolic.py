"""Hyperbolic functions: they are sums of exponentials, and tanh(x) = 2 sigmoid(2 x) - 1."""

# A law is documented by the equation above it.
# ruff: noqa: D103

from __future__ import annotations

import math

from nanguard.algebra import build, sums
from nanguard.algebra import operators as ops
from nanguard.algebra.call import Call
from nanguard.algebra.registry import law
from nanguard.algebra.term import Apply, Term


# known for 1 - tanh(x) = 2 sigmoid(-2 x), 1 + tanh(x) = 2 sigmoid(2 x) and their product
@law(
    """
    torch.tanh(input)
    torch.Tensor.tanh(input)
    torch.Tensor.tanh_(input)
    torch.tanh_(input)
    torch.nn.functional.tanh(input)
    """,
    source=True,
)
def tanh(call: Call) -> Term:
    x = call.leaf()
    return Apply(ops.TANH, (x,), x.shape)


# cosh(x) = (e^x + e^-x) / 2
@law("torch.cosh(input)\n torch.Tensor.cosh(input)\n torch.Tensor.cosh_(input)\n torch.cosh_(input)", source=True)
def cosh(call: Call) -> Term:
    x = call.leaf()
    return build.shift(sums.logaddexp(x, build.negate(x)), -math.log(2))


# sinh(x) = (e^x - e^-x) / 2
@law("torch.sinh(input)\n torch.Tensor.sinh(input)\n torch.Tensor.sinh_(input)\n torch.sinh_(input)", source=True)
def sinh(call: Call) -> Term:
    x = call.leaf()
    return build.shift(sums.difference(x, build.negate(x)), -math.log(2))
