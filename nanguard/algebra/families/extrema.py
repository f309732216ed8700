"""The largest and the smallest, and an order: log is increasing, so it commutes with them."""

# A law is documented by the equation above it.
# ruff: noqa: D103

from __future__ import annotations

from nanguard.algebra import build, totals
from nanguard.algebra import operators as ops
from nanguard.algebra.build import positive, reduced
from nanguard.algebra.call import Call, Operand
from nanguard.algebra.registry import law
from nanguard.algebra.term import Apply, Operator, Term, Unrecognised


def _extremum(call: Call, operator: Operator) -> Term:
    log = positive(call.log())
    dims, keepdim = call.dims(log.shape), bool(call["keepdim"])
    return Apply(operator, (log,), reduced(log.shape, dims, keepdim), dim=dims, keepdim=keepdim)


# log max p = max log p
@law("torch.amax(input, dim=(), keepdim=False)\n torch.Tensor.amax(input, dim=(), keepdim=False)")
def amax(call: Call) -> Term:
    return _extremum(call, ops.AMAX)


# log min p = min log p
@law("torch.amin(input, dim=(), keepdim=False)\n torch.Tensor.amin(input, dim=(), keepdim=False)")
def amin(call: Call) -> Term:
    return _extremum(call, ops.AMIN)


# log max(p, q) = max(log p, log q); of one tensor, the largest along a dim
@law(
    """
    torch.max(input, dim=None, keepdim=False)
    torch.Tensor.max(input, dim=None, keepdim=False)
    """,
    branch="selects",
)
def _max(call: Call) -> Term:
    if isinstance(call["dim"], Operand):
        return _of_two(call, "dim", ops.MAXIMUM)
    return _extremum(call, ops.AMAX) if call["dim"] is None else _along(call, largest=True)


@law(
    """
    torch.min(input, dim=None, keepdim=False)
    torch.Tensor.min(input, dim=None, keepdim=False)
    """,
    branch="selects",
)
def _min(call: Call) -> Term:
    if isinstance(call["dim"], Operand):
        return _of_two(call, "dim", ops.MINIMUM)
    return _extremum(call, ops.AMIN) if call["dim"] is None else _along(call, largest=False)


def _along(call: Call, *, largest: bool) -> Term:
    """Among those that underflow to 0 the original takes the first; here they are still told apart."""
    log = _values(call)
    dim, keepdim = call.dim(log.shape), bool(call["keepdim"])
    return Apply(ops.EXTREME, (log,), reduced(log.shape, (dim,), keepdim), dim=dim, keepdim=keepdim, largest=largest)


def _values(call: Call) -> Term:
    if call.position != 0:
        raise Unrecognised
    return positive(call.log())


@law("torch.maximum(input, other)\n torch.Tensor.maximum(input, other)", branch="selects")
def maximum(call: Call) -> Term:
    return _of_two(call, "other", ops.MAXIMUM)


@law("torch.minimum(input, other)\n torch.Tensor.minimum(input, other)", branch="selects")
def minimum(call: Call) -> Term:
    return _of_two(call, "other", ops.MINIMUM)


def _of_two(call: Call, other: str, operator: Operator) -> Term:
    if call.known("input") and call.known(other):
        a, b = positive(call.log("input")), positive(call.log(other))
        return Apply(operator, (a, b), build.broadcast_shapes(a.shape, b.shape))
    constant, tensor = (other, "input") if call.known("input") else ("input", other)
    log, bound = call.log(tensor), call.positive(constant)
    bounded = totals.clamp(log, bound, None) if operator is ops.MAXIMUM else totals.clamp(log, None, bound)
    return build.expand(bounded, call.shape)


# what is positive stays as it is
@law(
    """
    torch.relu(input)
    torch.relu_(input)
    torch.Tensor.relu(input)
    torch.Tensor.relu_(input)
    torch.nn.functional.relu(input, inplace=False)
    """
)
def relu(call: Call) -> Term:
    if call.arguments.get("inplace"):
        raise Unrecognised
    return positive(call.log())


# p where it is above a bound, else the bound
@law("torch.nn.functional.threshold(input, threshold, value, inplace=False)\n torch.threshold(input, threshold, value)")
def threshold(call: Call) -> Term:
    bound = call.positive("threshold")
    if call.number("value") != bound or call.arguments.get("inplace"):
        raise Unrecognised
    return totals.clamp(call.log(), bound, None)


@law(
    """
    torch.sort(input, dim=-1, descending=False, stable=False)
    torch.Tensor.sort(input, dim=-1, descending=False, stable=False)
    """
)
def sort(call: Call) -> Term:
    log = _values(call)
    descending, stable = bool(call["descending"]), bool(call["stable"])
    return Apply(ops.SORTED, (log,), call.shape, dim=call.dim(log.shape), descending=descending, stable=stable)


@law(
    """
    torch.topk(input, k, dim=-1, largest=True, sorted=True)
    torch.Tensor.topk(input, k, dim=-1, largest=True, sorted=True)
    """
)
def topk(call: Call) -> Term:
    log, dim = _values(call), call.dim(call.log().shape)
    if not call["sorted"]:
        raise Unrecognised
    return Apply(ops.TOPK, (log,), call.shape, k=call.shape[dim], dim=dim, largest=bool(call["largest"]))
