"""Few elements of a large log-softmax, from the softmax that the user's code has computed already.

With p = softmax(x) at hand, the logarithm of the total is max(x) - log max(p): the largest probability of n is at least 1/n,
and so has all its digits. What is picked from x minus that total costs no second softmax, forward or backward:

    d log p_k / dx = e_k - p
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from nanguard.algebra import Apply, Leaf, Term
from nanguard.algebra import operators as ops
from nanguard.stabilizer.evaluate import values
from nanguard.stabilizer.knowledge import Known
from nanguard.stabilizer.resolve import function

__all__ = ["LARGE", "basis_for", "pick"]

# Of fewer elements, a second softmax costs less than looking for a way around it.
LARGE = 1 << 16
# At most one of so many elements is picked.
_SPARSE = 4
_DTYPES = (torch.float32, torch.float64)


def basis_for(term: Term, softmax: Tensor) -> Tensor | None:
    """What to keep of a softmax, so that logarithms can be picked later; it holds no memory that its derivative does not."""
    if not isinstance(term, Apply) or term.operator is not ops.LOG_SOFTMAX or softmax.numel() < LARGE:
        return None
    leaf = term.args[0]
    if not isinstance(leaf, Leaf) or not (leaf.tracked and softmax.requires_grad and torch.is_grad_enabled()):
        return None
    same = softmax.dtype == leaf.value.dtype and softmax.dtype in _DTYPES
    return softmax.view_as(softmax) if same and torch._C._len_torch_dispatch_stack() == 0 else None


def pick(term: Term, parents: tuple[Known, ...], dtype: torch.dtype) -> Tensor | None:
    """The value of a term that picks few elements of a log-softmax, where its softmax was kept; else `None`."""
    moves: list[Apply] = []
    inner = term
    while isinstance(inner, Apply) and inner.operator.move and len(inner.args) == 1:
        moves.append(inner)
        inner = inner.args[0]
    if not moves or not isinstance(inner, Apply) or inner.operator is not ops.LOG_SOFTMAX:
        return None
    leaf = inner.args[0]
    softmax = _kept(inner, parents)
    if softmax is None or not isinstance(leaf, Leaf) or not leaf.tracked or softmax.dtype != dtype:
        return None
    if not torch.is_grad_enabled() or _numel(term) * _SPARSE > softmax.numel():
        return None

    def chosen(tensor: Tensor) -> Tensor:
        for move in reversed(moves):
            tensor = function(move.operator.function)(tensor, **values(move.params))
        return tensor

    result: Tensor = _Picked.apply(leaf.value, softmax, inner.params["dim"], chosen)  # type: ignore[no-untyped-call]
    return result


def _numel(term: Term) -> int:
    size = 1
    for length in term.shape:
        size *= length
    return size


def _kept(term: Apply, parents: tuple[Known, ...]) -> Tensor | None:
    stack, seen = list(parents), set()
    while stack:
        known = stack.pop()
        if known.term is term and known.basis is not None:
            return known.basis if known.basis._version == known.basis_version else None
        for parent in known.parents:
            if id(parent) not in seen:
                seen.add(id(parent))
                stack.append(parent)
    return None


@final
class _Picked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, softmax: Tensor, dim: int, chosen: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.dim, ctx.chosen = dim, chosen
        ctx.save_for_backward(softmax)
        total = x.amax(dim, keepdim=True) - softmax.amax(dim, keepdim=True).log()
        return chosen(x) - chosen(total.expand_as(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (softmax,) = ctx.saved_tensors
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            probe = softmax.new_zeros(()).requires_grad_().expand(softmax.shape)
            (spread,) = torch.autograd.grad(ctx.chosen(probe), probe, grad, create_graph=again)
        total = spread.sum(ctx.dim, keepdim=True)
        if again:
            return spread - softmax * total, None, None, None
        return spread.addcmul_(softmax, total, value=-1), None, None, None
