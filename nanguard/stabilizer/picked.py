"""Elements of a large log-softmax, or all of them, from the softmax that the user's code has computed already.

With p = softmax(x) at hand, log p = (x - max x) + log max p: the largest probability of n is at least 1/n, and so has all its
digits. That costs no second softmax, forward or backward:

    d log p_k / dx = e_k - p

Where the picked probabilities themselves have all their digits, their logarithms are as good, and cost next to nothing
(`Picking.exactly`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor

from nanguard.algebra import Apply, Leaf, Term
from nanguard.algebra import operators as ops
from nanguard.stabilizer.basis import Basis
from nanguard.stabilizer.knowledge import Known
from nanguard.stabilizer.outline import filled_value
from nanguard.stabilizer.resolve import function

__all__ = ["LARGE", "Picking", "has_basis", "picking"]

# Of fewer elements, a second softmax costs less than looking for a way around it.
LARGE = 1 << 16

_will_execute = torch._C._will_engine_execute_node


def has_basis(term: Term) -> bool:
    """Whether it is the softmax of a tensor that derivatives flow into, of which logarithms could be picked later."""
    if not isinstance(term, Apply) or term.operator is not ops.LOG_SOFTMAX or math.prod(term.shape) < LARGE:
        return False
    return isinstance(term.args[0], Leaf) and term.args[0].tracked


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

    def picked(self, values: Sequence[Tensor], parents: tuple[Known, ...], dtype: torch.dtype) -> Tensor | None:
        """The value from these tensors, where the softmax is there; else `None`.

        Arguments:
            values: what the outline's numbers stand for.
            parents: what is known of what was asked about.
            dtype: of the value.
        """
        x = values[self._logits]
        basis = self._found(x, parents)
        if basis is None or x.dtype != dtype or not torch.is_grad_enabled() or not basis.is_there(x):
            return None
        largest = basis.amax(self._dim)
        result: Tensor = _Picked.apply(x, largest, self._gradient(basis, x, values))  # type: ignore[no-untyped-call]
        return result

    def exactly(self, values: Sequence[Tensor], known: Known, naive: Tensor) -> Tensor | None:
        """The same where the picked probabilities have all their digits, as a function of them; else `None`.

        Derivatives flow through the logits, and through the probabilities only where somebody asks for the derivative there.

        Arguments:
            values: what the outline's numbers stand for.
            known: what is known of the picked probabilities.
            naive: these.
        """
        x = values[self._logits]
        basis = self._found(x, (known,))
        if basis is None or x.dtype != naive.dtype or not torch.is_grad_enabled() or not basis.is_there(x):
            return None
        # The engine cannot be asked about a leaf.
        logits = x.view_as(x) if x.grad_fn is None else x
        result: Tensor = _Exact.apply(naive, logits, self._gradient(basis, x, values))  # type: ignore[no-untyped-call]
        return result

    def _gradient(self, basis: Basis, x: Tensor, values: Sequence[Tensor]) -> _Gradient:
        return _Gradient(basis, x.shape, self._dim, self._moves, values)

    def _found(self, x: Tensor, parents: tuple[Known, ...]) -> Basis | None:
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

    __slots__ = ("_basis", "_moves", "_shape", "_values", "dim")

    def __init__(self, basis: Basis, shape: torch.Size, dim: int, moves: list[Apply], values: Sequence[Tensor]) -> None:
        self._basis = basis
        self._shape = shape
        self.dim = dim
        self._moves = moves
        self._values = values

    def chosen(self, tensor: Tensor) -> Tensor:
        """The elements that were picked, of any tensor of the same shape."""
        for move in reversed(self._moves):
            params = {name: filled_value(value, self._values) for name, value in move.params.items()}
            tensor = function(move.operator.function)(tensor, **params)
        return tensor

    def at(self, grad: Tensor) -> Tensor:
        """The gradient of the logits, in one pass where it is known which elements were picked."""
        again = torch.is_grad_enabled()
        found = None if again else self._picks(grad)
        if found is not None:
            total, add = found
            return add(self._basis.times(total.neg_()))
        spread = self._spread(grad) if self._moves else grad
        total = spread.sum(self.dim, keepdim=True)
        softmax = self._basis.softmax()
        return spread - softmax * total if again else torch.addcmul(spread, softmax, total, value=-1)

    def _spread(self, grad: Tensor) -> Tensor:
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            probe = grad.new_zeros(()).requires_grad_().expand(self._shape)
            (spread,) = torch.autograd.grad(self.chosen(probe), probe, grad, create_graph=again)
        return spread

    def _picks(self, grad: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]] | None:
        """The sum of the gradient in each row, and what adds it to the elements that were picked."""
        moves, shape = self._moves, self._shape
        if len(moves) == 2 and moves[0].operator is ops.RESHAPE:
            moves, grad = moves[1:], grad.reshape(moves[1].shape)
        if len(moves) != 1:
            return None
        params = {name: filled_value(value, self._values) for name, value in moves[0].params.items()}
        if moves[0].operator is ops.GATHER and params["dim"] == self.dim:
            index, dim = params["index"], self.dim
            if index.shape != (*shape[:dim], index.shape[dim], *shape[dim + 1 :]):
                return None
            return grad.sum(dim, keepdim=True), lambda tensor: tensor.scatter_add_(dim, index, grad)
        key: Any = params.get("key")
        if moves[0].operator is not ops.INDEX or len(shape) != 2 or not _is_pair_of_indices(key):
            return None
        rows = key[1 - self.dim]
        total = grad.new_zeros(shape[1 - self.dim]).index_put_((rows,), grad, accumulate=True)
        return total.unsqueeze(self.dim), lambda tensor: tensor.index_put_(key, grad, accumulate=True)


def _is_pair_of_indices(key: Any) -> bool:
    if type(key) is not tuple or len(key) != 2:
        return False
    return all(isinstance(entry, Tensor) and entry.dtype == torch.int64 and entry.ndim == 1 for entry in key)


@final
class _Picked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, largest: Tensor, gradient: _Gradient) -> Tensor:
        ctx.gradient = gradient
        chosen, dim = gradient.chosen, gradient.dim
        # In this order: the maximum may be far larger than what the others differ by.
        above = chosen(x) - chosen(x.amax(dim, keepdim=True).expand_as(x))
        return above.add_(chosen(largest.log_().expand_as(x)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return ctx.gradient.at(grad), None, None


@final
class _Exact(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, naive: Tensor, x: Tensor, gradient: _Gradient) -> Tensor:
        ctx.gradient = gradient
        ctx.save_for_backward(naive)
        # What nobody asks about stays undefined: as zeros it would be multiplied by infinities further down.
        ctx.set_materialize_grads(False)
        return naive.log()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            return None, None, None
        # As in a graft: is this backward pass after a derivative at the logits, or beyond?
        if _will_execute(ctx.next_functions[1][0]):
            return None, ctx.gradient.at(grad), None
        (naive,) = ctx.saved_tensors
        with torch._C.DisableTorchFunction():
            return grad / naive, None, None
