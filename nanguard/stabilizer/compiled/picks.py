"""One element picked from every row, with a derivative that compares instead of scattering: compilers fuse that."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from nanguard.algebra import Apply, Leaf, Operator, Shape, Term, Unrecognised
from nanguard.algebra.build import reshape
from nanguard.algebra.operators import GATHER, INDEX, LOG_SOFTMAX, TAKE_ALONG_DIM
from nanguard.stabilizer.compiled.memory import example

__all__ = ["one_of_each_row", "pick_one"]

PICK_ONE = Operator("pick_one", f"{__name__}.pick_one", "{0}.gather({dim}, {index})", move=True)
PICK_ONE_LOG_SOFTMAX = Operator(
    "pick_one_log_softmax", f"{__name__}.pick_one_log_softmax", "F.log_softmax({0}, dim={dim}).gather({dim}, {index})"
)


def one_of_each_row(term: Term) -> Term:
    """The same value, in which `pick_one` stands for an index or a gather wherever that is the same."""
    if isinstance(term, Leaf):
        return term
    args = tuple(map(one_of_each_row, term.args))
    try:
        found = _picked(term, args)
    except Unrecognised:
        found = None
    if found is not None:
        return found
    if all(new is old for new, old in zip(args, term.args, strict=True)):
        return term
    return Apply(term.operator, args, term.shape, **term.params)


def _picked(term: Apply, args: tuple[Term, ...]) -> Term | None:
    params = term.params
    if term.operator in (GATHER, TAKE_ALONG_DIM):
        index, dim, shape = params["index" if term.operator is GATHER else "indices"], params["dim"], args[0].shape
        if len(index.shape) == len(shape) and index.shape == (*shape[:dim], 1, *shape[dim + 1 :]):
            return _one(args[0], term.shape, dim=dim, index=index, wraps=False)
    elif term.operator is INDEX and isinstance(params["key"], tuple) and len(params["key"]) == 2 == len(args[0].shape):
        for dim in (1, 0):
            rows, index = params["key"][1 - dim], params["key"][dim]
            one_each = (
                isinstance(rows, Leaf) and rows.counts() and rows.shape == (args[0].shape[1 - dim],) == term.shape
            )
            if one_each and isinstance(index, Leaf) and index.shape == rows.shape and _is_index(index):
                shape = (*term.shape, 1) if dim else (1, *term.shape)
                return reshape(_one(args[0], shape, dim=dim, index=index, wraps=True), term.shape)
    return None


def _one(a: Term, shape: Shape, **params: Any) -> Term:
    if isinstance(a, Apply) and a.operator is LOG_SOFTMAX and a.params["dim"] == params["dim"]:
        return Apply(PICK_ONE_LOG_SOFTMAX, a.args, shape, **params)
    return Apply(PICK_ONE, (a,), shape, **params)


def _is_index(leaf: Leaf) -> bool:
    value = example(leaf.value)
    return isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32)


def pick_one(l: Tensor, dim: int, index: Tensor, wraps: bool) -> Tensor:  # noqa: E741
    """The element of every row along `dim` that an index of integers says; negative ones count from the end if it `wraps`."""
    picked: Tensor = _PickOne.apply(l, dim, _places(l, dim, index, wraps))  # type: ignore[no-untyped-call]
    return picked


def pick_one_log_softmax(x: Tensor, dim: int, index: Tensor, wraps: bool) -> Tensor:
    """`pick_one` of log_softmax(x): of its derivative, the total over each row need not be summed up."""
    picked: Tensor = _PickOneLogSoftmax.apply(x, dim, _places(x, dim, index, wraps))  # type: ignore[no-untyped-call]
    return picked


def _places(l: Tensor, dim: int, index: Tensor, wraps: bool) -> Tensor:  # noqa: E741
    index = (index.unsqueeze(dim) if index.dim() < l.dim() else index).long()
    return torch.where(index < 0, index + l.shape[dim], index) if wraps else index


def _is_picked(index: Tensor, dim: int, size: int) -> Tensor:
    shape = [1] * index.dim()
    shape[dim] = size
    return torch.arange(size, device=index.device).reshape(shape) == index


@final
class _PickOne(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, l: Tensor, dim: int, index: Tensor) -> Tensor:  # noqa: E741
        ctx.save_for_backward(index)
        ctx.dim, ctx.size = dim, l.shape[dim]
        return l.gather(dim, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return torch.where(_is_picked(index, ctx.dim, ctx.size), grad, 0.0), None, None


@final
class _PickOneLogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, index: Tensor) -> Tensor:
        ctx.save_for_backward(x, index)
        ctx.dim = dim
        return torch.log_softmax(x, dim).gather(dim, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, index = ctx.saved_tensors
        picked = _is_picked(index, ctx.dim, x.shape[ctx.dim])
        return torch.where(picked, grad, 0.0) - torch.softmax(x, ctx.dim) * grad, None, None
