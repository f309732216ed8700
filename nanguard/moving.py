"""Parameters that the forward pass itself changes: teachers and centres that follow as moving averages, renormed embeddings.

The optimizer has not stepped when the alarm rings, so most parameters need no copy. Those that the forward pass changes are
found in the first step, by their version counters and their norms (an edit through `.data` counts no version), and copied from
then on.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nanguard.sentinel import norms
from nanguard.values import clone_of

__all__ = ["MovingParameters", "ParameterSnapshot"]

# In the first step all parameters are copied if they are no more than this; otherwise only their norms are taken.
_AFFORDABLE = 64 * 2**20


@final
class ParameterSnapshot:
    """Copies of parameters, to be put back bit for bit into the tensors that held them."""

    def __init__(self, parameters: list[Tensor]) -> None:
        with torch.no_grad():
            self._copies = [(p, clone_of(p)) for p in parameters]

    def restore(self) -> None:
        """Puts the values back."""
        with torch.no_grad():
            for parameter, copy in self._copies:
                parameter.detach().copy_(copy)


@final
class MovingParameters:
    """Knows which parameters of a module the forward pass changes."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._moving: list[Tensor] | None = None
        self._first: list[tuple[Tensor, int, list[float]]] = []

    def keep(self) -> ParameterSnapshot | None:
        """Copies of those that may change before the next `learn`."""
        if self._moving is not None:
            return ParameterSnapshot(self._moving) if self._moving else None
        parameters: list[Tensor] = [p for p in self._module.parameters() if not is_lazy(p)]
        self._first = [(p, p._version, _norm(p)) for p in parameters]
        affordable = sum(p.numel() * p.element_size() for p in parameters) <= _AFFORDABLE
        return ParameterSnapshot(parameters) if affordable else None

    def learn(self) -> None:
        """Compares with the state at the first `keep`; to be called before the optimizer steps."""
        if self._moving is None:
            self._moving = [p for p, version, norm in self._first if p._version != version or _norm(p) != norm]
            self._first = []


def _norm(parameter: Tensor) -> list[float]:
    found = norms([parameter.detach()])
    return [] if found is None else found.tolist()
