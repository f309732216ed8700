"""Stable functions of logarithms that torch lacks, or whose derivative in torch is NaN at -inf.

`l` is the logarithm of a tensor throughout; every function takes and gives real floating tensors of any shape, and its
derivative is never NaN at l = -inf, which stands for a probability of exactly 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nanguard.stabilizer.exponentials import exponential, sigmoid, weighted

__all__ = [
    "binary_cross_entropy",
    "cat",
    "clamp_max",
    "clamp_min",
    "entr",
    "exponential",
    "extreme",
    "fill_diagonal",
    "floor_zero",
    "index",
    "index_logaddexp",
    "log_others",
    "log_rest",
    "log_tail",
    "logaddexp",
    "logcumsumexp",
    "logmeanexp",
    "logsumexp",
    "on_diagonal",
    "pad",
    "plus_constant",
    "reshape",
    "scatter_logaddexp",
    "set_item",
    "sigmoid",
    "sort",
    "stack",
    "topk",
    "triangle",
    "where",
    "without_top",
    "written",
    "xlogy",
]


def logsumexp(l: Tensor, dim: tuple[int, ...], keepdim: bool = False) -> Tensor:  # noqa: E741
    """The logarithm of sum exp(l) over `dim`. Where all of l is -inf, the result is -inf and the derivative 0 (torch: NaN).

    The result shares no memory with `l`, and no derivative has saved `l` itself.
    """
    dead = l.detach().amax(dim, keepdim=True) == -math.inf
    total = torch.logsumexp(l.masked_fill(dead, 0.0), dim, keepdim)
    return total.masked_fill(dead if keepdim else _squeezed(dead, dim), -math.inf)


def logmeanexp(l: Tensor, dim: tuple[int, ...], keepdim: bool = False, *, count: int) -> Tensor:  # noqa: E741
    """The logarithm of mean exp(l) over `dim`, which have `count` elements in all; otherwise as `logsumexp`."""
    # In compiled code the size may be a symbol, whose value must not be asked for.
    size = math.log(count) if isinstance(count, int) else l.new_full((), count).log()
    return logsumexp(l, dim, keepdim) - size


def logaddexp(l: Tensor, m: Tensor) -> Tensor:  # noqa: E741
    """The logarithm of exp(l) + exp(m), with broadcasting. Where both are -inf, so is it, with derivative 0 (torch: NaN)."""
    swap = m.detach() > l.detach()
    high, low = torch.where(swap, m, l), torch.where(swap, l, m)
    gap = low - high
    # Infinities of the same sign have no gap.
    gap = torch.where(gap.detach().isnan() & (high.detach() == low.detach()), 0.0, gap)
    # log(1 + e^gap). The second derivative of torch.logaddexp is NaN where the gap is wide, that of logsigmoid(-gap) is 0.
    return high + torch.nn.functional.softplus(gap)


def plus_constant(l: Tensor, constant: float) -> Tensor:  # noqa: E741
    """The logarithm of exp(l) + constant for a constant above 0."""
    return logaddexp(l, l.new_full((), math.log(constant)))


def logcumsumexp(l: Tensor, dim: int) -> Tensor:  # noqa: E741
    """The logarithm of the cumulated sum of exp(l) along `dim`; derivative 0 where that is -inf."""
    largest = l.detach().cummax(dim).values
    dead = largest == -math.inf
    return torch.logcumsumexp(l.masked_fill(dead, -1e30), dim).masked_fill(dead, -math.inf)


def log_others(l: Tensor, dim: int) -> Tensor:  # noqa: E741
    """For each element, the logarithm of the sum of exp(l) over all others along `dim`."""
    if not l.numel():
        return l.clone()
    shift = _largest(l, dim)
    total, rest = _with_and_without(l - shift, dim)
    return rest + total + shift


def log_rest(l: Tensor, dim: int) -> Tensor:  # noqa: E741
    """log(1 - softmax(l)) with all its digits, also where the softmax rounds to 1."""
    return _with_and_without(l - _largest(l, dim), dim)[1] if l.numel() else l.clone()


def _largest(l: Tensor, dim: int) -> Tensor:  # noqa: E741
    shift = l.detach().amax(dim, keepdim=True)
    return shift.masked_fill(shift.isinf(), 0.0)


def _with_and_without(l: Tensor, dim: int) -> tuple[Tensor, Tensor]:  # noqa: E741
    """The logarithms of the total of exp(l), and of the share of it that is not one's own.

    For the largest the others are summed; every other has a share of at most 1/2, so that 1 minus it has all its digits.
    """
    first = torch.zeros_like(l, dtype=torch.bool).scatter(dim, l.detach().argmax(dim, keepdim=True), True)
    total = logsumexp(l, (dim,), keepdim=True)
    others = logsumexp(l.masked_fill(first, -math.inf), (dim,), keepdim=True)
    finite = total.masked_fill(total.detach() == -math.inf, 0.0)
    share = torch.exp((l - finite).masked_fill(first, -math.inf))
    return total, torch.where(first, others - finite, torch.log1p(-share))


def scatter_logaddexp(l: Tensor, m: Tensor, dim: int, index: Tensor) -> Tensor:  # noqa: E741
    """The logarithm of exp(l) after exp(m) was added to it at the places of `index` along `dim`."""
    top = l.detach().scatter_reduce(dim, index, m.detach(), "amax")
    top = top.masked_fill(top.isinf(), 0.0)
    total = torch.exp(l - top).scatter_add(dim, index, torch.exp(m - top.gather(dim, index)))
    dead = total.detach() == 0
    return top + total.masked_fill(dead, 1.0).log().masked_fill(dead, -math.inf)


def xlogy(l: Tensor, x: Tensor) -> Tensor:  # noqa: E741
    """X l, but 0 where x is 0."""
    zero = x.detach() == 0
    finite = l.masked_fill(zero & l.detach().isinf(), 0.0)
    return torch.where(zero & l.detach().isnan(), 0.0, weighted(finite, x))


def entr(l: Tensor) -> Tensor:  # noqa: E741
    """-exp(l) l, and 0 with derivative 0 where l is -inf."""
    finite = l.masked_fill(l.detach() == -math.inf, 0.0)
    return (-torch.exp(finite) * finite).masked_fill(l.detach() == -math.inf, 0.0)


def binary_cross_entropy(l: Tensor, m: Tensor, y: Tensor) -> Tensor:  # noqa: E741
    """-(y l + (1 - y) m), given the logarithms of p and of 1 - p. That of 0 is -100 as in torch, so that 0 times it is 0."""
    l, m = (floor_zero(value, math.exp(-100.0)) for value in (l, m))  # noqa: E741
    return -(y * l + (1 - y) * m)


def where(l: Tensor, m: Tensor, condition: Tensor) -> Tensor:  # noqa: E741
    """`l` where the condition holds, else `m`."""
    return torch.where(condition, l, m)


def extreme(l: Tensor, dim: int, keepdim: bool, largest: bool) -> Tensor:  # noqa: E741
    """The largest, or the smallest, along `dim`."""
    return (l.max(dim, keepdim) if largest else l.min(dim, keepdim)).values


def sort(l: Tensor, dim: int, descending: bool, stable: bool) -> Tensor:  # noqa: E741
    """In order along `dim`."""
    return torch.sort(l, dim=dim, descending=descending, stable=stable).values


def topk(l: Tensor, k: int, dim: int, largest: bool) -> Tensor:  # noqa: E741
    """The k largest, or smallest, along `dim`, in order."""
    return torch.topk(l, k, dim, largest).values


def without_top(l: Tensor, k: int, dim: int, largest: bool) -> Tensor:  # noqa: E741
    """`l`, but -inf for the k largest, or smallest, along `dim`."""
    chosen = torch.topk(l.detach(), k, dim, largest).indices
    return l.masked_fill(torch.zeros_like(l, dtype=torch.bool).scatter(dim, chosen, True), -math.inf)


def pad(l: Tensor, pad: tuple[int, ...], value: float) -> Tensor:  # noqa: E741
    """With `value` around it."""
    return torch.nn.functional.pad(l, pad, value=value)


def set_item(l: Tensor, key: Any, value: float) -> Tensor:  # noqa: E741
    """With `value` at the places of `key`."""
    result = l.clone()
    result[key] = value
    return result


def written(l: Tensor, m: Tensor, key: Any) -> Tensor:  # noqa: E741
    """`m`, but `l` at the places of `key`."""
    result = m.clone()
    result[key] = l
    return result


def fill_diagonal(l: Tensor, value: float, wrap: bool) -> Tensor:  # noqa: E741
    """With `value` on the diagonal."""
    return l.clone().fill_diagonal_(value, wrap)


def triangle(l: Tensor, diagonal: int, upper: bool) -> Tensor:  # noqa: E741
    """`l`, but -inf outside the upper, or lower, triangle of the last two dims."""
    inside = torch.ones(l.shape[-2:], dtype=torch.bool, device=l.device)
    inside = inside.triu(diagonal) if upper else inside.tril(diagonal)
    return l.masked_fill(~inside, -math.inf)


def on_diagonal(l: Tensor, offset: int, dim1: int, dim2: int) -> Tensor:  # noqa: E741
    """`l` on a diagonal of two dims, and -inf around it."""
    inside = torch.diag_embed(torch.ones_like(l, dtype=torch.bool), offset, dim1, dim2)
    return torch.diag_embed(l, offset, dim1, dim2).masked_fill(~inside, -math.inf)


def index_logaddexp(l: Tensor, m: Tensor, dim: int, index: Tensor) -> Tensor:  # noqa: E741
    """The logarithm of exp(l) after the slices of exp(m) were added to those at `index` along `dim`."""
    shape = [-1 if place == dim else 1 for place in range(m.ndim)]
    return scatter_logaddexp(l, m, dim, index.view(shape).expand_as(m))


def log_tail(l: Tensor, dim: int) -> Tensor:  # noqa: E741
    """log(1 - cumsum(softmax(l))): the share of all that follow."""
    length = l.shape[dim]
    tails = logcumsumexp(torch.log_softmax(l, dim).flip(dim), dim).flip(dim)
    last = torch.full_like(tails.narrow(dim, 0, 1), -math.inf)
    return torch.cat([tails.narrow(dim, 1, length - 1), last], dim)


def clamp_min(l: Tensor, constant: float) -> Tensor:  # noqa: E741
    """The logarithm of exp(l) bounded from below by a constant above 0."""
    return torch.clamp(l, min=math.log(constant))


def clamp_max(l: Tensor, constant: float) -> Tensor:  # noqa: E741
    """The logarithm of exp(l) bounded from above by a constant above 0."""
    return torch.clamp(l, max=math.log(constant))


def floor_zero(l: Tensor, constant: float) -> Tensor:  # noqa: E741
    """`l`, but log(constant) with derivative 0 where l is -inf."""
    return l.masked_fill(l.detach() == -math.inf, math.log(constant))


def reshape(l: Tensor, sizes: tuple[int, ...]) -> Tensor:  # noqa: E741
    """The same elements in the same order, in another shape."""
    return l.reshape(sizes)


def cat(*parts: Tensor, dim: int) -> Tensor:
    """The parts one after the other."""
    return torch.cat(parts, dim)


def stack(*parts: Tensor, dim: int) -> Tensor:
    """The parts side by side, along a new dim."""
    return torch.stack(parts, dim)


def index(l: Tensor, key: Any) -> Tensor:  # noqa: E741
    """`l[key]`."""
    return l[key]


def _squeezed(mask: Tensor, dim: tuple[int, ...]) -> Tensor:
    return mask.reshape([size for place, size in enumerate(mask.shape) if place not in dim])
