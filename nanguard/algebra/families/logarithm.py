"""The queries: whoever asks for a logarithm."""

# A law is documented by the equation above it.
# ruff: noqa: D103

from __future__ import annotations

import math

from nanguard.algebra import build, sums, totals
from nanguard.algebra import operators as ops
from nanguard.algebra.build import positive
from nanguard.algebra.call import Call
from nanguard.algebra.registry import law
from nanguard.algebra.term import Apply, Term, Unrecognised


# log p
@law(
    """
    torch.log(input)
    torch.Tensor.log(input)
    torch.Tensor.log_(input)
    torch.log_(input)
    """,
    query=True,
    branch="singular",
)
def log(call: Call) -> Term:
    return call.log()


# log2 p = log p / log 2
@law(
    "torch.log2(input)\n torch.Tensor.log2(input)\n torch.Tensor.log2_(input)\n torch.log2_(input)",
    query=True,
    branch="singular",
)
def log2(call: Call) -> Term:
    return _multiple(call.log(), 1 / math.log(2))


# log10 p = log p / log 10
@law(
    "torch.log10(input)\n torch.Tensor.log10(input)\n torch.Tensor.log10_(input)\n torch.log10_(input)",
    query=True,
    branch="singular",
)
def log10(call: Call) -> Term:
    return _multiple(call.log(), 1 / math.log(10))


def _multiple(value: Term, factor: float) -> Term:
    """A multiple of the logarithm itself: no power, so the number may have been of either sign."""
    return Apply(ops.SCALE, (value,), value.shape, other=factor)


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
    branch="singular",
)
def log1p(call: Call) -> Term:
    return sums.plus_constant(call.log(), 1.0)


# logit p = log(p / (1 - p)), after p was clamped to eps ... 1 - eps; of bounds in the wrong order others would win
@law(
    """
    torch.logit(input, eps=None)
    torch.special.logit(input, eps=None)
    torch.Tensor.logit(input, eps=None)
    """,
    query=True,
    branch="singular",
)
def logit(call: Call) -> Term:
    p = positive(call.log())
    if call["eps"] is not None:
        eps = call.positive("eps")
        if eps > 0.5:
            raise Unrecognised
        p = totals.clamp(p, eps, 1.0 - eps)
    return build.subtract(p, sums.complement(p, 1.0))


# x log p, and 0 where x is 0
@law(
    """
    torch.xlogy(other, input)
    torch.special.xlogy(other, input)
    torch.Tensor.xlogy(other, input)
    """,
    query=True,
    branch="singular",
)
def xlogy(call: Call) -> Term:
    return _times_log(call, call.log())


# x log(1 + p), and 0 where x is 0
@law("torch.special.xlog1py(other, input)", query=True)
def xlog1py(call: Call) -> Term:
    return _times_log(call, sums.plus_constant(call.log(), 1.0))


def _times_log(call: Call, value: Term) -> Term:
    if call.is_number("other"):
        factor = call.number("other")
        return _multiple(value, factor)
    leaf = call.leaf("other")
    return Apply(ops.XLOGY, (value, leaf), build.broadcast_shapes(value.shape, leaf.shape))


# atanh(tanh(x)) = log((1 + tanh(x)) / (1 - tanh(x))) / 2 = x
@law(
    "torch.atanh(input)\n torch.arctanh(input)\n torch.Tensor.atanh(input)\n torch.Tensor.arctanh(input)",
    query=True,
    branch="singular",
)
def atanh(call: Call) -> Term:
    t = call.log()
    return _multiple(build.subtract(sums.plus_constant(t, 1.0), sums.complement(t, 1.0)), 0.5)


# -p log p
@law("torch.special.entr(input)", query=True)
def entr(call: Call) -> Term:
    value = positive(call.log())
    return Apply(ops.ENTR, (value,), value.shape)
