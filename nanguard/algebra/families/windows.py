"""Windows that slide along a dim, and what is summed in them."""

# A law is documented by the equation above it.
# ruff: noqa: D103

from __future__ import annotations

import math

from nanguard.algebra import build, sums, totals
from nanguard.algebra import operators as ops
from nanguard.algebra.call import Call
from nanguard.algebra.registry import law
from nanguard.algebra.term import Term, Unrecognised


# elements, several times where windows overlap
@law("torch.Tensor.unfold(input, dimension, size, step)")
def unfold(call: Call) -> Term:
    log, size, step = call.log(), call["size"], call["step"]
    dim = call.dim(log.shape, "dimension")
    if type(size) is not int or type(step) is not int or not 0 < size <= log.shape[dim] or step < 1:
        raise Unrecognised
    shape = list(log.shape)
    shape[dim] = (shape[dim] - size) // step + 1
    return build.rearrange(ops.UNFOLD, (log,), (*shape, size), dimension=dim, size=size, step=step)


# the sum of (p_k + p_(k+1)) d / 2
@law("torch.trapezoid(input, x=None, *, dx=1, dim=-1)\n torch.trapz(input, x=None, *, dx=1, dim=-1)")
def trapezoid(call: Call) -> Term:
    log = build.positive(call.log())
    dim = call.dim(log.shape)
    call.absent("x")
    length = log.shape[dim] - 1
    shape = (*log.shape[:dim], length, *log.shape[dim + 1 :])
    ends = [build.rearrange(ops.NARROW, (log,), shape, dim=dim, start=start, length=length) for start in (0, 1)]
    total = totals.logsumexp(sums.logaddexp(*ends), (dim,), False)
    return build.shift(total, math.log(call.positive("dx") / 2))
