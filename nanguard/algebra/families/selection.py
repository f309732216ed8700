"""Operations that pick elements: the logarithm, being elementwise, commutes with them."""

# A law is documented by the equation above it.
# ruff: noqa: D103

from __future__ import annotations

from typing import Any

from nanguard.algebra import build
from nanguard.algebra import operators as ops
from nanguard.algebra.build import positive
from nanguard.algebra.call import Call, Operand
from nanguard.algebra.registry import law
from nanguard.algebra.term import Apply, Shape, Term, Unrecognised


# some of the elements
@law("torch.Tensor.__getitem__(input, key)")
def index(call: Call) -> Term:
    log, key = call.log(), call["key"]
    if isinstance(key, Operand):
        key = key.leaf
    elif isinstance(key, tuple):
        key = tuple(entry.leaf if isinstance(entry, Operand) else entry for entry in key)
    return build.reshape(log, call.shape) if _only_new_dims(key) else _indexed(log, call.shape, key)


def _only_new_dims(key: Any) -> bool:
    entries = key if isinstance(key, tuple) else (key,)
    return all(
        entry is None or entry is Ellipsis or (isinstance(entry, slice) and entry == slice(None)) for entry in entries
    )


def _indexed(log: Term, shape: Shape, key: Any) -> Term:
    return build.rearrange(ops.INDEX, (log,), shape, key=key)


@law(
    """
    torch.gather(input, dim, index, *, sparse_grad=False)
    torch.Tensor.gather(input, dim, index, *, sparse_grad=False)
    """
)
def gather(call: Call) -> Term:
    log = call.log()
    return build.rearrange(ops.GATHER, (log,), call.shape, dim=call.dim(log.shape), index=call.index("index"))


@law(
    """
    torch.take_along_dim(input, indices, dim)
    torch.Tensor.take_along_dim(input, indices, dim)
    """
)
def take_along_dim(call: Call) -> Term:
    log = call.log()
    params = {"indices": call.index("indices"), "dim": call.dim(log.shape)}
    return build.rearrange(ops.TAKE_ALONG_DIM, (log,), call.shape, **params)


@law("torch.index_select(input, dim, index)\n torch.Tensor.index_select(input, dim, index)")
def index_select(call: Call) -> Term:
    log = call.log()
    return build.rearrange(ops.INDEX_SELECT, (log,), call.shape, dim=call.dim(log.shape), index=call.index("index"))


@law("torch.masked_select(input, mask)\n torch.Tensor.masked_select(input, mask)")
def masked_select(call: Call) -> Term:
    return build.rearrange(ops.MASKED_SELECT, (call.log(),), call.shape, mask=call.index("mask"))


@law("torch.select(input, dim, index)\n torch.Tensor.select(input, dim, index)")
def select(call: Call) -> Term:
    log = call.log()
    dim, place = call.dim(log.shape), call["index"]
    if isinstance(place, bool) or not isinstance(place, int):
        raise Unrecognised
    return build.rearrange(ops.SELECT, (log,), call.shape, dim=dim, index=place)


@law("torch.narrow(input, dim, start, length)\n torch.Tensor.narrow(input, dim, start, length)")
def narrow(call: Call) -> Term:
    log = call.log()
    dim, start = call.dim(log.shape), call["start"]
    if isinstance(start, bool) or not isinstance(start, int):
        raise Unrecognised
    return build.rearrange(ops.NARROW, (log,), call.shape, dim=dim, start=start, length=call.shape[dim])


# the parts of a split lie one after the other
@law(
    """
    torch.chunk(input, chunks, dim=0)
    torch.split(input, split_size_or_sections, dim=0)
    torch.tensor_split(input, indices_or_sections, dim=0)
    torch.Tensor.chunk(input, chunks, dim=0)
    torch.Tensor.split(input, split_size, dim=0)
    torch.Tensor.tensor_split(input, indices_or_sections, dim=0)
    """
)
def split(call: Call) -> Term:
    return _part(call, call.dim(call.log().shape))


@law("torch.vsplit(input, indices)\n torch.Tensor.vsplit(input, *indices)")
def vsplit(call: Call) -> Term:
    return _part(call, 0)


@law("torch.hsplit(input, indices)\n torch.Tensor.hsplit(input, *indices)")
def hsplit(call: Call) -> Term:
    return _part(call, min(len(call.log().shape), 2) - 1)


def _part(call: Call, dim: int) -> Term:
    log = call.log()
    if sum(shape[dim] for shape in call.shapes) != log.shape[dim]:
        raise Unrecognised  # parts by indices out of order overlap
    start = sum(shape[dim] for shape in call.shapes[: call.position])
    return build.rearrange(ops.NARROW, (log,), call.shape, dim=dim, start=start, length=call.shape[dim])


@law("torch.unbind(input, dim=0)\n torch.Tensor.unbind(input, dim=0)")
def unbind(call: Call) -> Term:
    log = call.log()
    return build.rearrange(ops.SELECT, (log,), call.shape, dim=call.dim(log.shape), index=call.position)


@law(
    """
    torch.diagonal(input, offset=0, dim1=0, dim2=1)
    torch.Tensor.diagonal(input, offset=0, dim1=0, dim2=1)
    """
)
def diagonal(call: Call) -> Term:
    log = call.log()
    first, second = call.dim(log.shape, "dim1"), call.dim(log.shape, "dim2")
    return build.rearrange(ops.DIAGONAL, (log,), call.shape, offset=int(call.number("offset")), dim1=first, dim2=second)


# the diagonal of a matrix, or a matrix with that diagonal
@law("torch.diag(input, diagonal=0)\n torch.Tensor.diag(input, diagonal=0)")
def diag(call: Call) -> Term:
    log, offset = call.log(), int(call.number("diagonal"))
    if len(log.shape) != 2:
        return Apply(ops.ON_DIAGONAL, (positive(log),), call.shape, offset=offset, dim1=0, dim2=1)
    return build.rearrange(ops.DIAGONAL, (log,), call.shape, offset=offset, dim1=0, dim2=1)


# elements by their place in the whole
@law("torch.take(input, index)\n torch.Tensor.take(input, index)")
def take(call: Call) -> Term:
    return build.rearrange(ops.TAKE, (call.log(),), call.shape, index=call.index("index"))


# rows of a table
@law(
    """
    torch.nn.functional.embedding(input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, \
sparse=False)
    """
)
def embedding(call: Call) -> Term:
    call.absent("padding_idx", "max_norm")
    if call["scale_grad_by_freq"] or call["sparse"]:
        raise Unrecognised
    return _indexed(call.log("weight"), call.shape, call.index("input"))
