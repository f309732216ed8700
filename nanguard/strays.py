"""Gradients of parameters that no optimizer holds: nobody sets them to zero, so that what a step adds to them stays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor, nn

from nanguard.values import Undo, clone_of, write

__all__ = ["StrayGradients"]


@final
class StrayGradients:
    """Saves the gradients of the parameters of a module that are in no optimizer, such as those of a part left out of it.

    Args:
        module: the module that is trained.
        optimizers: called for the optimizers, whose parameters count as held.
    """

    def __init__(self, module: nn.Module, optimizers: Callable[[], Sequence[torch.optim.Optimizer]]) -> None:
        self._module = module
        self._optimizers = optimizers
        self._known: tuple[int, ...] = ()
        self._strays: list[Tensor] = []

    def save(self) -> Undo:
        """Remembers the gradients; the result puts them back, into the tensors that hold them where those are still there."""
        kept = [(parameter, parameter.grad, _copy(parameter.grad)) for parameter in self._found()]

        def undo() -> None:
            for parameter, gradient, copy in kept:
                if gradient is not None and copy is not None:
                    write(gradient.detach(), copy)
                parameter.grad = gradient

        return undo

    def _found(self) -> list[Tensor]:
        """The strays. They are looked for once, and again when an optimizer is given parameters: a walk in each step costs."""
        groups = [group["params"] for optimizer in self._optimizers() for group in optimizer.param_groups]
        sizes = tuple(map(len, groups))
        if sizes != self._known:
            held = {id(parameter) for parameters in groups for parameter in parameters}
            self._strays = [parameter for parameter in self._module.parameters() if id(parameter) not in held]
            self._known = sizes
        return self._strays


def _copy(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else clone_of(gradient)
