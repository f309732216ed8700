"""Elements of a large log-softmax, or all of them, from the softmax that the user's code has computed already.

With p = softmax(x) at hand, log p = (x - max x) + log max p: the largest probability of n is at least 1/n, and so has all its
digits. That costs no second softmax, forward or backward:

    d log p_k / dx = e_k - p

Where the picked probabilities themselves have all their digits, their logarithms are as good, and cost next to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor

from nanguard.algebra import Apply, Leaf, Term
from nanguard.algebra import operators as ops
from nanguard.stabilizer.accuracy import keeps_digits
from nanguard.stabilizer.knowledge import Known
from nanguard.stabilizer.outline import filled_value
from nanguard.stabilizer.resolve import function

__all__ = ["LARGE", "Picking", "basis_for", "has_basis", "picking"]

# Of fewer elements, a second softmax costs less than looking for a way around it.
LARGE = 1 << 16
_DTYPES = (torch.float32, torch.float64)


def has_basis(term: Term) -> bool:
    """Whether it is the softmax of a tensor that derivatives flow into, of which logarithms could be picked later."""
    if not isinstance(term, Apply) or term.operator is not ops.LOG_SOFTMAX or math.prod(term.shape) < LARGE:
        return False
    return isinstance(term.args[0], Leaf) and term.args[0].tracked


def basis_for(softmax: Tensor, dtype: torch.dtype) -> Any:
    """What to keep of a softmax for that: the node of its derivative, which has saved it.

    A reference to the tensor itself, or to a view of it, would keep it alive, and all that is known about it.

    Arguments:
        softmax: it.
        dtype: what it was computed from.
    """
    if softmax.dtype != dtype or dtype not in _DTYPES or torch._C._len_torch_dispatch_stack():
        return None
    node = softmax.grad_fn
    return node if hasattr(node, "_saved_result") else None


@final
class Picking:
    """How few elements are picked from a log-softmax.

    Arguments:
        logits: which of the outline's tensors it is the log-softmax of.
        dim: along which.
        moves: what is done to it, from the last to the first.
    """

    __slots__ = ("_dim", "_logits", "_moves")

    def __init__(self, logits: int, dim: int, moves: list[Apply]) -> None:
        self._logits = logits
        self._dim = dim
        self._moves = moves

    def picked(
        self, values: Sequence[Tensor], parents: tuple[Known, ...], dtype: torch.dtype, p: Tensor
    ) -> Tensor | None:
        """The value from these tensors, where the softmax was kept; else `None`.

        Arguments:
            values: what the outline's numbers stand for.
            parents: what is known of what was asked about.
            dtype: of the value.
            p: the picked probabilities, as the user's code computed them.
        """
        x = values[self._logits]
        node = self._kept(x, parents)
        if node is None or not torch.is_grad_enabled():
            return None
        try:
            softmax: Tensor = node._saved_result.detach()
        except RuntimeError:  # it was edited, or a backward pass has let go of it
            return None
        if softmax.dtype != dtype:
            return None

        def chosen(tensor: Tensor) -> Tensor:
            for move in reversed(self._moves):
                params = {name: filled_value(value, values) for name, value in move.params.items()}
                tensor = function(move.operator.function)(tensor, **params)
            return tensor

        exact = len(parents) == 1 and parents[0].exact and keeps_digits(p)
        gradient = _Gradient(node, self._dim, self._moves, values, chosen)
        result: Tensor = _Picked.apply(x, softmax, gradient, p.detach() if exact else None)  # type: ignore[no-untyped-call]
        return result

    def _kept(self, x: Tensor, parents: tuple[Known, ...]) -> Any:
        stack, seen = list(parents), set()
        while stack:
            known = stack.pop()
            if known.basis is not None and self._is_softmax_of(known, x):
                return known.basis
            for parent in known.parents:
                if id(parent) not in seen:
                    seen.add(id(parent))
                    stack.append(parent)
        return None

    def _is_softmax_of(self, known: Known, x: Tensor) -> bool:
        outline = known.outline
        if not isinstance(outline, Apply) or outline.operator is not ops.LOG_SOFTMAX:
            return False
        leaf = outline.args[0]
        return isinstance(leaf, Leaf) and known.values[leaf.value] is x and outline.params["dim"] == self._dim


def picking(outline: Term) -> Picking | None:
    """How a term picks elements of a log-softmax, if that is what it does."""
    moves: list[Apply] = []
    inner = outline
    while isinstance(inner, Apply) and inner.operator.move and len(inner.args) == 1:
        moves.append(inner)
        inner = inner.args[0]
    if not has_basis(inner):
        return None
    assert isinstance(inner, Apply)
    assert isinstance(inner.args[0], Leaf)
    return Picking(inner.args[0].value, inner.params["dim"], moves)


@final
class _Gradient:
    """What the gradient of picked log-probabilities makes of that of the logits.

    The softmax is no input of the node that it stands in: a derivative asked for at the softmax has to take the other way.
    """

    __slots__ = ("_moves", "_node", "_values", "chosen", "dim")

    def __init__(
        self,
        node: Any,
        dim: int,
        moves: list[Apply],
        values: Sequence[Tensor],
        chosen: Callable[[Tensor], Tensor],
    ) -> None:
        self._node = node
        self.dim = dim
        self.chosen = chosen
        self._moves = moves
        self._values = values

    def at(self, softmax: Tensor, grad: Tensor) -> Tensor:
        """The gradient of the logits, in one pass where it is known which elements were picked."""
        dim = self.dim
        found = None if torch.is_grad_enabled() else self._picks(softmax, grad)
        if found is not None:
            total, add = found
            return add(softmax * total.neg())
        spread = self._spread(softmax, grad) if self._moves else grad
        total = spread.sum(dim, keepdim=True)
        if torch.is_grad_enabled():
            softmax = self._node._saved_result  # as part of its graph
            return spread - softmax * total
        return torch.addcmul(spread, softmax, total, value=-1)

    def _spread(self, softmax: Tensor, grad: Tensor) -> Tensor:
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            probe = softmax.new_zeros(()).requires_grad_().expand(softmax.shape)
            (spread,) = torch.autograd.grad(self.chosen(probe), probe, grad, create_graph=again)
        return spread

    def _picks(self, softmax: Tensor, grad: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]] | None:
        """The sum of the gradient in each row, and what adds it to the elements that were picked."""
        moves = self._moves
        if len(moves) == 2 and moves[0].operator is ops.RESHAPE:
            moves, grad = moves[1:], grad.reshape(moves[1].shape)
        if len(moves) != 1:
            return None
        params = {name: filled_value(value, self._values) for name, value in moves[0].params.items()}
        if moves[0].operator is ops.GATHER and params["dim"] == self.dim:
            index, dim = params["index"], self.dim
            whole = (*softmax.shape[:dim], index.shape[dim], *softmax.shape[dim + 1 :])
            if index.shape != whole:
                return None
            return grad.sum(dim, keepdim=True), lambda tensor: tensor.scatter_add_(dim, index, grad)
        key: Any = params.get("key")
        if moves[0].operator is not ops.INDEX or not _is_pair_of_indices(key, softmax):
            return None
        rows = key[1 - self.dim]
        total = grad.new_zeros(softmax.shape[1 - self.dim]).index_put_((rows,), grad, accumulate=True)
        return total.unsqueeze(self.dim), lambda tensor: tensor.index_put_(key, grad, accumulate=True)


def _is_pair_of_indices(key: Any, softmax: Tensor) -> bool:
    if type(key) is not tuple or len(key) != 2 or softmax.ndim != 2:
        return False
    return all(isinstance(entry, Tensor) and entry.dtype == torch.int64 and entry.ndim == 1 for entry in key)


@final
class _Picked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, softmax: Tensor, gradient: _Gradient, p: Tensor | None) -> Tensor:
        ctx.gradient = gradient
        ctx.save_for_backward(softmax)
        if p is not None:
            return p.log()
        chosen, dim = gradient.chosen, gradient.dim
        # In this order: the maximum may be far larger than what the others differ by.
        above = chosen(x) - chosen(x.amax(dim, keepdim=True).expand_as(x))
        return above.add_(chosen(softmax.amax(dim, keepdim=True).log_().expand_as(x)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (softmax,) = ctx.saved_tensors
        return ctx.gradient.at(softmax, grad), None, None, None
