"""Products over a dim: the logarithm turns them into sums."""

# A law is documented by the equation above it.
# ruff: noqa: D103

from __future__ import annotations

from nanguard.algebra import operators as ops
from nanguard.algebra.build import reduced
from nanguard.algebra.call import Call
from nanguard.algebra.registry import law
from nanguard.algebra.term import Apply, Term


# log prod p = sum log p, and signs are multiplied apart; of a tensor that nothing is known about, too
@law(
    """
    torch.prod(input, dim=None, keepdim=False, *, dtype=None)
    torch.Tensor.prod(input, dim=None, keepdim=False, *, dtype=None)
    """,
    source=True,
)
def prod(call: Call) -> Term:
    known = call.known("input")
    a: Term = call.log() if known else call.leaf()
    dims, keepdim = call.dims(a.shape), bool(call["keepdim"])
    return Apply(ops.SUM if known else ops.PRODUCT, (a,), reduced(a.shape, dims, keepdim), dim=dims, keepdim=keepdim)


# log cumprod p = cumsum log p
@law(
    """
    torch.cumprod(input, dim, *, dtype=None)
    torch.Tensor.cumprod(input, dim, *, dtype=None)
    torch.Tensor.cumprod_(input, dim, *, dtype=None)
    """
)
def cumprod(call: Call) -> Term:
    log = call.log()
    return Apply(ops.CUMSUM, (log,), log.shape, dim=call.dim(log.shape))
