"""Operations that only move, repeat or convert elements: the logarithm, being elementwise, commutes with them."""

# A law is documented by the equation above it.
# ruff: noqa: D103

from __future__ import annotations

from nanguard.algebra import build
from nanguard.algebra import operators as ops
from nanguard.algebra.call import Call, Operand, normal_dim
from nanguard.algebra.registry import law
from nanguard.algebra.term import Term, Unrecognised


# same elements, same order
@law(
    """
    torch.reshape(input, shape)
    torch.flatten(input, start_dim=0, end_dim=-1)
    torch.ravel(input)
    torch.squeeze(input, dim=None)
    torch.unsqueeze(input, dim)
    torch.unflatten(input, dim, sizes)
    torch.Tensor.reshape(input, *shape)
    torch.Tensor.reshape_as(input, other)
    torch.Tensor.view(input, *size)
    torch.Tensor.view_as(input, other)
    torch.Tensor.flatten(input, start_dim=0, end_dim=-1)
    torch.Tensor.ravel(input)
    torch.Tensor.squeeze(input, dim=None)
    torch.Tensor.unsqueeze(input, dim)
    torch.Tensor.unflatten(input, dim, sizes)
    """
)
def reshape(call: Call) -> Term:
    if not call.same_dtype:  # view(dtype) reads the bits anew
        raise Unrecognised
    return build.reshape(call.log(), call.shape)


# a dim taken from here to there
@law(
    """
    torch.movedim(input, source, destination)
    torch.moveaxis(input, source, destination)
    torch.Tensor.movedim(input, source, destination)
    torch.Tensor.moveaxis(input, source, destination)
    """
)
def movedim(call: Call) -> Term:
    log = call.log()
    source, destination = call.dim(log.shape, "source"), call.dim(log.shape, "destination")
    order = [dim for dim in range(len(log.shape)) if dim != source]
    order.insert(destination, source)
    return _permuted(log, tuple(order))


# same elements, dims in another order
@law("torch.permute(input, dims)\n torch.Tensor.permute(input, *dims)")
def permute(call: Call) -> Term:
    log, dims = call.log(), call["dims"]
    if len(dims) == 1 and isinstance(dims[0], (tuple, list)):
        dims = dims[0]
    return _permuted(log, tuple(normal_dim(dim, len(log.shape)) for dim in dims))


@law(
    """
    torch.transpose(input, dim0, dim1)
    torch.swapaxes(input, dim0, dim1)
    torch.swapdims(input, dim0, dim1)
    torch.Tensor.transpose(input, dim0, dim1)
    torch.Tensor.swapaxes(input, dim0, dim1)
    torch.Tensor.swapdims(input, dim0, dim1)
    """
)
def transpose(call: Call) -> Term:
    log = call.log()
    return _swapped(log, call.dim(log.shape, "dim0"), call.dim(log.shape, "dim1"))


@law("torch.t(input)\n torch.Tensor.t(input)\n torch.Tensor.T.__get__(input)")
def t(call: Call) -> Term:
    log = call.log()
    return _permuted(log, tuple(reversed(range(len(log.shape)))))


@law("torch.Tensor.mT.__get__(input)\n ?torch.Tensor.adjoint(input)\n torch.Tensor.mH.__get__(input)")
def matrix_transpose(call: Call) -> Term:
    rank = len(call.log().shape)
    if rank < 2:
        raise Unrecognised
    return _swapped(call.log(), rank - 2, rank - 1)


def _swapped(log: Term, first: int, second: int) -> Term:
    order = list(range(len(log.shape)))
    order[first], order[second] = order[second], order[first]
    return _permuted(log, tuple(order))


def _permuted(log: Term, dims: tuple[int, ...]) -> Term:
    if dims == tuple(range(len(log.shape))):
        return log
    return build.rearrange(ops.PERMUTE, (log,), tuple(log.shape[dim] for dim in dims), dims=dims)


# the other way round
@law("torch.flip(input, dims)\n torch.Tensor.flip(input, *dims)")
def flip(call: Call) -> Term:
    log, dims = call.log(), call["dims"]
    if isinstance(dims, tuple) and len(dims) == 1 and isinstance(dims[0], (tuple, list)):
        dims = dims[0]
    dims = dims if isinstance(dims, (tuple, list)) else (dims,)
    return build.rearrange(ops.FLIP, (log,), call.shape, dims=tuple(normal_dim(dim, len(log.shape)) for dim in dims))


@law("torch.fliplr(input)\n torch.Tensor.fliplr(input)")
def fliplr(call: Call) -> Term:
    return build.rearrange(ops.FLIP, (call.log(),), call.shape, dims=(1,))


@law("torch.flipud(input)\n torch.Tensor.flipud(input)")
def flipud(call: Call) -> Term:
    return build.rearrange(ops.FLIP, (call.log(),), call.shape, dims=(0,))


# elements shifted, and what falls out comes in on the other side
@law("torch.roll(input, shifts, dims=None)\n torch.Tensor.roll(input, shifts, dims=None)")
def roll(call: Call) -> Term:
    shifts, dims = call["shifts"], call["dims"]
    if not all(isinstance(value, (int, tuple, list, type(None))) for value in (shifts, dims)):
        raise Unrecognised
    return build.rearrange(ops.ROLL, (call.log(),), call.shape, shifts=shifts, dims=dims)


# the elements of several, one after the other
@law(
    """
    torch.cat(tensors, dim=0)
    torch.concat(tensors, dim=0)
    torch.concatenate(tensors, dim=0)
    """
)
def cat(call: Call) -> Term:
    return build.rearrange(ops.CAT, call.logs("tensors"), call.shape, dim=call.dim(call.shape))


@law("torch.hstack(tensors)")
def hstack(call: Call) -> Term:
    return build.rearrange(ops.CAT, call.logs("tensors"), call.shape, dim=min(len(call.shape), 2) - 1)


@law("torch.vstack(tensors)\n torch.row_stack(tensors)")
def vstack(call: Call) -> Term:
    parts = tuple(_at_least(log, 2, front=True) for log in call.logs("tensors"))
    return build.rearrange(ops.CAT, parts, call.shape, dim=0)


@law("torch.column_stack(tensors)")
def column_stack(call: Call) -> Term:
    parts = tuple(_at_least(log, 2, front=False) for log in call.logs("tensors"))
    return build.rearrange(ops.CAT, parts, call.shape, dim=1)


@law("torch.dstack(tensors)")
def dstack(call: Call) -> Term:
    parts = (_at_least(log, 2, front=True) for log in call.logs("tensors"))
    return build.rearrange(ops.CAT, tuple(_at_least(part, 3, front=False) for part in parts), call.shape, dim=2)


def _at_least(log: Term, rank: int, *, front: bool) -> Term:
    """With dims of size 1 in front, or behind, so that there are `rank`."""
    missing = (1,) * (rank - len(log.shape))
    return build.reshape(log, (*missing, *log.shape) if front else (*log.shape, *missing))


@law("torch.stack(tensors, dim=0)")
def stack(call: Call) -> Term:
    return build.rearrange(ops.STACK, call.logs("tensors"), call.shape, dim=call.dim(call.shape))


# every element several times
@law(
    """
    torch.broadcast_to(input, size)
    torch.Tensor.broadcast_to(input, size)
    torch.Tensor.expand(input, *size)
    torch.Tensor.expand_as(input, other)
    """
)
def expand(call: Call) -> Term:
    return build.expand(call.log(), call.shape)


# every tensor in the shape of all
@law("torch.broadcast_tensors(*operands)")
def broadcast_tensors(call: Call) -> Term:
    operands = call["operands"]
    operand = operands[call.position] if len(operands) > call.position else None
    if not isinstance(operand, Operand) or operand.log is None:
        raise Unrecognised
    return build.expand(operand.log, call.shape)


# the whole several times
@law("torch.Tensor.repeat(input, *dims)\n torch.tile(input, dims)\n torch.Tensor.tile(input, *dims)")
def repeat(call: Call) -> Term:
    counts = call["dims"]
    if isinstance(counts, tuple) and len(counts) == 1 and isinstance(counts[0], (tuple, list)):
        counts = counts[0]
    log = call.log()
    if not isinstance(counts, (tuple, list)) or not all(type(count) is int for count in counts):
        raise Unrecognised
    return build.rearrange(ops.REPEAT, (log,), call.shape, dims=tuple(counts))


@law(
    """
    torch.repeat_interleave(input, repeats, dim=None, *, output_size=None)
    torch.Tensor.repeat_interleave(input, repeats, dim=None, *, output_size=None)
    """
)
def repeat_interleave(call: Call) -> Term:
    repeats = call["repeats"]
    if isinstance(repeats, bool) or not isinstance(repeats, int):
        raise Unrecognised
    log = call.log()
    dim = None if call["dim"] is None else call.dim(log.shape)
    return build.rearrange(ops.REPEAT_INTERLEAVE, (log,), call.shape, repeats=repeats, dim=dim)


# the same elements, in memory of their own, on the same device, in another floating dtype
@law(
    """
    torch.clone(input, *, memory_format=None)
    torch.Tensor.clone(input, *, memory_format=None)
    torch.Tensor.contiguous(input, memory_format=None)
    torch.Tensor.to(input, *target, dtype=None, device=None, non_blocking=False, copy=False, memory_format=None)
    torch.Tensor.type_as(input, other)
    torch.Tensor.float(input, memory_format=None)
    torch.Tensor.double(input, memory_format=None)
    torch.Tensor.half(input, memory_format=None)
    torch.Tensor.bfloat16(input, memory_format=None)
    """
)
def cast(call: Call) -> Term:
    return call.log()


# the same elements without derivatives (front ends know which results have none)
@law("torch.detach(input)\n torch.Tensor.detach(input)")
def detach(call: Call) -> Term:
    return call.log()
