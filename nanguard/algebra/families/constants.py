"""Tensors of one number, or of none yet: where totals start, and what probabilities are subtracted from."""

# A law is documented by the equation above it.
# ruff: noqa: D103

from __future__ import annotations

from nanguard.algebra import operators as ops
from nanguard.algebra import totals
from nanguard.algebra.call import Call
from nanguard.algebra.registry import law
from nanguard.algebra.term import Apply, Term

_MORE = "dtype=None, layout=None, device=None, pin_memory=False, requires_grad=False"


# every element is 0
@law(
    f"""
    torch.zeros(*size, out=None, {_MORE})
    torch.zeros_like(input, *, memory_format=None, {_MORE})
    torch.Tensor.new_zeros(input, *size, {_MORE})
    """,
    source=True,
)
def zeros(call: Call) -> Term:
    return totals.full(0.0, call.shape)


# every element is 1
@law(
    f"""
    torch.ones(*size, out=None, {_MORE})
    torch.ones_like(input, *, memory_format=None, {_MORE})
    torch.Tensor.new_ones(input, *size, {_MORE})
    """,
    source=True,
)
def ones(call: Call) -> Term:
    return totals.full(1.0, call.shape)


# nothing is known before all of it has been assigned
@law(
    f"""
    torch.empty(*size, out=None, memory_format=None, {_MORE})
    torch.empty_like(input, *, memory_format=None, {_MORE})
    torch.Tensor.new_empty(input, *size, {_MORE})
    """,
    source=True,
)
def empty(call: Call) -> Term:
    return Apply(ops.EMPTY, (), call.shape)
