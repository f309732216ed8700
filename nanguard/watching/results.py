"""What a step gives besides gradients, where that has to be good: what it returns and what it logs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from nanguard.diagnosis import Ends
from nanguard.patches import Patches
from nanguard.trees import named_tensors
from nanguard.watching.rows import Infinities

__all__ = ["StepResults", "infinities_of", "loss_in"]


@final
class StepResults:
    """Shows what a step returns and logs while it is run again, as `Rerun.ends` has it.

    Args:
        module: whose ``log`` and ``log_dict`` are listened to; nothing is logged.
        infinities: which infinities count in what is larger than a scalar, because outputs may be masked.
        names: of what is looked at; `None` for all.
    """

    def __init__(self, module: nn.Module, infinities: Infinities, names: Collection[str] | None = None) -> None:
        self._module = module
        self._infinities = infinities
        self._names = names

    @contextmanager
    def __call__(self, ends: Ends) -> Iterator[Callable[[Any], None]]:
        """The step runs inside; what is given is called with what it returned."""
        patches = Patches()
        patches.set(self._module, "log", partial(self._log, ends))
        patches.set(self._module, "log_dict", partial(self._log_all, ends))
        try:
            yield partial(self._returned, ends)
        finally:
            patches.undo()

    def _returned(self, ends: Ends, output: Any) -> None:
        for name, tensor in named_tensors(output, "output"):
            self._see(ends, name, tensor)

    def _log_all(self, ends: Ends, values: Mapping[str, Any], *_: Any, **__: Any) -> None:
        for name, value in values.items():
            self._log(ends, name, value)

    def _log(self, ends: Ends, name: str, value: Any, *_: Any, **__: Any) -> None:
        if isinstance(value, (int, float)):
            value = torch.tensor(float(value))
        if isinstance(value, Tensor):
            self._see(ends, name, value)

    def _see(self, ends: Ends, name: str, tensor: Tensor) -> None:
        if self._names is None or name in self._names:
            ends.see(name, tensor, infinities_of(tensor.shape, self._infinities))


def infinities_of(shape: tuple[int, ...], chosen: Infinities) -> Infinities:
    """Which infinities count in a result of that shape: a scalar has to be finite."""
    return chosen if shape else "all"


def loss_in(output: Any) -> Tensor | None:
    """The loss in what a validation step returned, if it shows."""
    loss = output.get("loss") if isinstance(output, Mapping) else output
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None
