"""Elements replaced by a number, or taken from two tensors: both sides of a mask are known, or it is a number above or at 0."""

# A law is documented by the equation above it, a rule by markdown.
# ruff: noqa: D103, D415

from __future__ import annotations

import math

from nanguard.algebra import build, totals
from nanguard.algebra import operators as ops
from nanguard.algebra.buffers import written
from nanguard.algebra.build import positive
from nanguard.algebra.call import Call, Operand, normal_dim
from nanguard.algebra.pattern import is_finite
from nanguard.algebra.registry import Names, law, rule
from nanguard.algebra.term import Apply, Term, Unrecognised


# log where(c, p, q) = where(c, log p, log q), and log 0 = -inf
@law("torch.where(condition, input, other)\n torch.Tensor.where(input, condition, other)", branch="selects")
def where(call: Call) -> Term:
    condition = call.index("condition")
    input, other = _side(call, "input"), _side(call, "other")
    return Apply(ops.WHERE, (input, other), call.shape, condition=condition)


def _side(call: Call, name: str) -> Term:
    if call.known(name):
        return positive(call.log(name))
    return totals.full(_not_negative(call.number(name)), ())


def _not_negative(number: float) -> float:
    if number < 0:
        raise Unrecognised
    return number


# log masked_fill(p, m, c) = masked_fill(log p, m, log c), and log 0 = -inf
@law(
    """
    torch.masked_fill(input, mask, value)
    torch.Tensor.masked_fill(input, mask, value)
    torch.Tensor.masked_fill_(input, mask, value)
    """,
    branch="selects",
)
def masked_fill(call: Call) -> Term:
    log, value = call.log(), _not_negative(call.number("value"))
    if build.broadcast_shapes(log.shape, call.index("mask").shape) != log.shape:
        raise Unrecognised
    return Apply(ops.MASKED, (log,), log.shape, mask=call.index("mask"), value=_log(value))


def _log(number: float) -> float:
    return math.log(number) if _not_negative(number) > 0 else -math.inf


def _zero(number: float) -> None:
    """Anything else is an edit, after which it means something else."""
    if number != 0:
        raise Unrecognised


# elements left out of a total, or zeros that are filled one after the other
@law("torch.Tensor.__setitem__(input, key, value)")
def set_item(call: Call) -> Term:
    key, mask = call["key"], False
    if isinstance(key, Operand):
        mask = key.mask and key.trusted
        key = key.leaf
    elif isinstance(key, tuple):
        key = tuple(entry.leaf if isinstance(entry, Operand) else entry for entry in key)
    if call.known("value"):
        return written(call.begun() or _base(call), positive(call.log("value")), key, mask=mask)
    number = _not_negative(call.number("value"))
    if number == 0 and call.known("input"):
        return Apply(ops.SET_ITEM, (positive(call.log()),), call.shape, key=key, value=-math.inf)
    return written(call.begun() or _base(call), totals.full(number, ()), key, mask=mask)


@law("torch.Tensor.fill_diagonal_(input, fill_value, wrap=False)")
def fill_diagonal(call: Call) -> Term:
    log = positive(call.log())
    _zero(call.number("fill_value"))
    return Apply(ops.FILLED_DIAGONAL, (log,), log.shape, value=-math.inf, wrap=bool(call["wrap"]))


# 0 above, or below, a diagonal
@law("torch.tril(input, diagonal=0)\n torch.Tensor.tril(input, diagonal=0)")
def tril(call: Call) -> Term:
    return _triangle(call, upper=False)


@law("torch.triu(input, diagonal=0)\n torch.Tensor.triu(input, diagonal=0)")
def triu(call: Call) -> Term:
    return _triangle(call, upper=True)


def _triangle(call: Call, *, upper: bool) -> Term:
    log, diagonal = positive(call.log()), call["diagonal"]
    if type(diagonal) is not int:
        raise Unrecognised
    return Apply(ops.TRIANGLE, (log,), log.shape, diagonal=diagonal, upper=upper)


# 0 all around a diagonal
@law(
    """
    torch.diag_embed(input, offset=0, dim1=-2, dim2=-1)
    torch.Tensor.diag_embed(input, offset=0, dim1=-2, dim2=-1)
    """
)
def diag_embed(call: Call) -> Term:
    log, offset = positive(call.log()), call["offset"]
    if type(offset) is not int:
        raise Unrecognised
    first, second = (normal_dim(call[name], len(call.shape)) for name in ("dim1", "dim2"))
    return Apply(ops.ON_DIAGONAL, (log,), call.shape, offset=offset, dim1=first, dim2=second)


# a number all around
@law('torch.nn.functional.pad(input, pad, mode="constant", value=None)')
def pad(call: Call) -> Term:
    value = 0.0 if call["value"] is None else call.number("value")
    if call["mode"] != "constant" or not all(type(entry) is int for entry in call["pad"]):
        raise Unrecognised
    return Apply(ops.PADDED, (positive(call.log()),), call.shape, pad=tuple(call["pad"]), value=_log(value))


# outside of training, dropout is the identity
@law(
    """
    torch.nn.functional.dropout(input, p=0.5, training=True, inplace=False)
    torch.dropout(input, p, training)
    """
)
def dropout(call: Call) -> Term:
    if call["training"]:
        raise Unrecognised
    return call.log()


# log nan_to_num(p) = log p, and log 0 = -inf where p is 0 / 0; what may be inf would become something else
@law(
    """
    torch.nan_to_num(input, nan=0.0, posinf=None, neginf=None)
    torch.nan_to_num_(input, nan=0.0, posinf=None, neginf=None)
    torch.Tensor.nan_to_num(input, nan=0.0, posinf=None, neginf=None)
    torch.Tensor.nan_to_num_(input, nan=0.0, posinf=None, neginf=None)
    """,
    branch="selects",
)
def nan_to_num(call: Call) -> Term:
    log = positive(call.log())
    if call["nan"] is not None:
        _zero(call.number("nan"))
    if not is_finite(log):
        raise Unrecognised
    return Apply(ops.NAN_TO_ZERO, (log,), log.shape)


def _with_harmless_numbers(term: Term, names: Names) -> str | None:
    return "torch.where(mask, torch.log(torch.where(mask, x, 1.0)), 0.0)"


@rule("NG401", "where-trap", kind="branch", suggest=_with_harmless_numbers)
def untaken_branch_with_infinite_derivative(term: Term) -> bool:
    """## What it does

    Finds `torch.where`, `masked_fill`, `nan_to_num`, bounds, and the larger or smaller of two, over logarithms, quotients,
    roots and exponentials of numbers that have no finite derivative where the branch is not taken.

    ## Why is this bad

    The value is right, but the gradient is not: the derivative of the branch that is not taken is multiplied by 0, and
    0 * inf is NaN.

    ## Example

    ```python
    result = torch.where(logits > 0, torch.log(logits), 0.0)
    ```

    ## Use instead

    ```python
    positive = logits > 0
    result = torch.where(positive, torch.log(torch.where(positive, logits, 1.0)), 0.0)
    ```

    ## Fix safety

    Values are the same to the last bit, and so is every gradient that was finite.

    ## References

    - https://docs.pytorch.org/docs/stable/generated/torch.where.html
    """
    return False


# the sum of what falls on each place
@law(
    """
    torch.index_add(input, dim, index, source, *, alpha=1)
    torch.Tensor.index_add(input, dim, index, source, *, alpha=1)
    torch.Tensor.index_add_(input, dim, index, source, *, alpha=1)
    """
)
def index_add(call: Call) -> Term:
    log, source = _base(call), positive(call.log("source"))
    if call["alpha"] != 1:
        raise Unrecognised
    params = {"dim": call.dim(log.shape), "index": call.index("index")}
    return Apply(ops.LOGADDEXP_AT, (log, source), log.shape, **params)


def _base(call: Call) -> Term:
    return positive(call.log()) if call.known("input") else totals.full(_not_negative(call.number("input")), call.shape)


@law(
    """
    torch.scatter_add(input, dim, index, src)
    torch.Tensor.scatter_add(input, dim, index, src)
    torch.Tensor.scatter_add_(input, dim, index, src)
    """
)
def scatter_add(call: Call) -> Term:
    log = _base(call)
    return totals.scatter_add(log, call.log("src"), call.dim(log.shape), call.index("index"))


# the sum, the largest or the smallest of what falls on each place
@law(
    """
    torch.scatter_reduce(input, dim, index, src, reduce, *, include_self=True)
    torch.Tensor.scatter_reduce(input, dim, index, src, reduce, *, include_self=True)
    torch.Tensor.scatter_reduce_(input, dim, index, src, reduce, *, include_self=True)
    """
)
def scatter_reduce(call: Call) -> Term:
    log, reduce, index = _base(call), call["reduce"], call.index("index")
    source, dim = positive(call.log("src")), call.dim(log.shape)
    if not call["include_self"] or source.shape != index.shape:
        raise Unrecognised
    if reduce == "sum":
        return totals.scatter_add(log, source, dim, index)
    if reduce not in ("amax", "amin"):
        raise Unrecognised
    return Apply(ops.SCATTER_EXTREME, (log, source), log.shape, dim=dim, index=index, reduce=reduce)
