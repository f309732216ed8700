"""A softmax that the user's code has computed, and what it leaves behind for derivatives: by that, none is computed anew."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from nanguard.stabilizer import environment
from nanguard.stabilizer.pages import product

__all__ = ["Basis", "basis_for"]

_DTYPES = (torch.float32, torch.float64)
_SOFTMAX, _QUOTIENT = "SoftmaxBackward0", "DivBackward0"


@final
class Basis:
    """The node of a softmax's derivative: that of `softmax` has saved its result, that of a quotient what it divides.

    A reference to the tensor itself, or to a view of it, would keep it alive, and all that is known about it. What the node has
    saved is asked for when it is needed: where it was edited, or a backward pass has let go of it, torch raises as it would for
    the user's code.
    """

    __slots__ = ("_divides", "_node")

    def __init__(self, node: Any, divides: bool) -> None:
        self._node = node
        self._divides = divides

    def softmax(self) -> Tensor:
        """The softmax, as part of its graph."""
        node = self._node
        return node._saved_self / node._saved_other if self._divides else node._saved_result  # type: ignore[no-any-return]

    def amax(self, dim: int) -> Tensor:
        """The largest probability of each row."""
        node = self._node
        if not self._divides:
            return node._saved_result.detach().amax(dim, keepdim=True)  # type: ignore[no-any-return]
        return node._saved_self.detach().amax(dim, keepdim=True) / node._saved_other.detach()  # type: ignore[no-any-return]

    def times(self, factor: Tensor) -> Tensor:
        """The softmax times a number for each row, as memory of its own."""
        node = self._node
        if self._divides:
            return product(node._saved_self, factor / node._saved_other)
        return product(node._saved_result, factor)

    def is_there(self, like: Tensor) -> bool:
        """Whether it can be computed, and has the shape and dtype of that tensor."""
        node = self._node
        try:
            if not self._divides:
                saved = node._saved_result
            else:
                saved, divisor = node._saved_self, node._saved_other
                if saved is None or divisor is None or divisor.dtype != like.dtype:
                    return False
        except RuntimeError:  # it was edited, or a backward pass has let go of it
            return False
        return bool(saved.shape == like.shape and saved.dtype == like.dtype)

    def saved(self) -> tuple[Tensor | None, ...]:
        """What the node has saved: edits through `.data` or NumPy count no version."""
        node = self._node
        try:
            return (node._saved_self, node._saved_other) if self._divides else (node._saved_result,)
        except RuntimeError:  # it cannot be had any more
            return ()


def basis_for(softmax: Tensor, dtype: torch.dtype, exact: bool) -> Basis | None:
    """What to keep of a softmax, if that can be had.

    Arguments:
        softmax: it.
        dtype: what it was computed from.
        exact: whether a quotient, too, has all its digits.
    """
    if softmax.dtype != dtype or dtype not in _DTYPES or torch._C._len_torch_dispatch_stack():
        return None
    if environment.has_hooks_of_saved_tensors():
        return None
    kind = type(softmax.grad_fn).__name__
    if kind == _SOFTMAX:
        return Basis(softmax.grad_fn, divides=False)
    return Basis(softmax.grad_fn, divides=True) if exact and kind == _QUOTIENT else None
