"""The queries: whoever asks for a logarithm."""

# A law is documented by the equation above it.
# ruff: noqa: D103

from __future__ import annotations

import math

from nanguard.algebra import build
from nanguard.algebra.call import Call
from nanguard.algebra.registry import law
from nanguard.algebra.term import Term


# log p
@law("torch.log(input)\n torch.Tensor.log(input)\n torch.Tensor.log_(input)\n torch.log_(input)", query=True)
def log(call: Call) -> Term:
    return call.log()


# log2 p = log p / log 2
@law("torch.log2(input)\n torch.Tensor.log2(input)\n torch.Tensor.log2_(input)\n torch.log2_(input)", query=True)
def log2(call: Call) -> Term:
    return build.scale(call.log(), 1 / math.log(2))


# log10 p = log p / log 10
@law("torch.log10(input)\n torch.Tensor.log10(input)\n torch.Tensor.log10_(input)\n torch.log10_(input)", query=True)
def log10(call: Call) -> Term:
    return build.scale(call.log(), 1 / math.log(10))


# log1p p = log(1 + p)
@law(
    """
    torch.log1p(input)
    torch.special.log1p(input)
    torch.Tensor.log1p(input)
    torch.Tensor.log1p_(input)
    torch.log1p_(input)
    """,
    query=True,
)
def log1p(call: Call) -> Term:
    return build.plus_constant(call.log(), 1.0)
