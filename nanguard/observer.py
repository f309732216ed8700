"""What is followed beside the verdict: the last steps, for the lead-up of an incident."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, final

from torch import Tensor

from nanguard.history import LossScale, StepHistory
from nanguard.lead_up import LeadUp
from nanguard.reading import Sight, read

__all__ = ["Observer"]


@final
class Observer:
    """Looks at each step once, and remembers what it saw."""

    def __init__(self) -> None:
        self._history = StepHistory()

    def begin(self, step: int) -> None:
        """A window of micro-batches begins, after so many optimizer steps."""
        self._history.begin(step)

    def suspicious(
        self,
        window: Sequence[Sight],
        gradients: list[Tensor],
        statistics: list[Tensor],
        parameters: list[Tensor],
        optimizer: Any,
        scaler: Any,
    ) -> bool:
        """Whether anything in the step may be non-finite; the only synchronisation of a healthy step.

        Args:
            window: the micro-batches in order.
            gradients: what the optimizer is about to use.
            statistics: running statistics, which a forward pass may spoil although its loss is finite.
            parameters: those that the optimizer is about to step.
            optimizer: the optimizer, where it is known.
            scaler: the GradScaler, if there is one.
        """
        scale, norms = LossScale(scaler), self._history.wants(parameters)
        along = [entry for entry in (scale.tensor, norms) if entry is not None]
        reading = read(window, gradients, statistics, along)
        first = reading.along[0] if scale.tensor is not None else None
        weights = None if norms is None else math.hypot(*reading.along[first is not None :])
        self._history.note(reading, optimizer, scale.value(first), weights)
        return reading.suspicious

    def false_alarm(self, gradients: list[Tensor], optimizer: Any) -> None:
        """All was finite after all, but for a norm that overflowed."""
        self._history.measure(gradients, optimizer)

    def left_out(self) -> None:
        """The GradScaler will leave the present step out."""
        self._history.left_out()

    def lead_up(self, parameters: list[Tensor], optimizer: Any) -> LeadUp:
        """The steps up to the present one, which has failed."""
        self._history.weigh(parameters, optimizer)
        return self._history.lead_up()

    def end(self, *, skipped: bool) -> None:
        """The window is over."""
        self._history.end(skipped=skipped)
