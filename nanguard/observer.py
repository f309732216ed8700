"""What is followed beside the verdict: the last steps, and what watched modules take and give."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, final

from torch import Tensor, nn

from nanguard.diagnosis import Diagnosis, Ends
from nanguard.history import LossScale, StepHistory
from nanguard.incident import Origin
from nanguard.lead_up import LeadUp
from nanguard.policy import Watch
from nanguard.reading import Sight, read
from nanguard.watching import ModuleWatch, Sighting

__all__ = ["Observer", "located"]


@final
class Observer:
    """Looks at each step once, and remembers what it saw.

    Args:
        module: what is trained.
        options: which of its modules are watched, and how often.
    """

    def __init__(self, module: nn.Module, options: Watch) -> None:
        self._history = StepHistory()
        self._watch = ModuleWatch(module, options)

    def start(self) -> None:
        """The fit begins. Raises `PolicyError` where a pattern of the policy matches no module."""
        self._watch.start()

    def begin(self, step: int, *, first: bool, optimizers: Sequence[Any] = ()) -> None:
        """A micro-batch begins, after so many optimizer steps; the `first` of a window begins the window.

        Args:
            step: the optimizer steps.
            first: whether it is the first.
            optimizers: those that step in the window, where there may be several.
        """
        if first:
            self._history.begin(step, optimizers)
        self._watch.begin(first=first)

    def around(self, inner: AbstractContextManager[Any]) -> AbstractContextManager[Any]:
        """What the forward pass of a micro-batch runs in: `inner`, and inside it the hooks where the step is watched."""
        return self._watched(inner) if self._watch.on else inner

    @contextmanager
    def _watched(self, inner: AbstractContextManager[Any]) -> Iterator[None]:
        with inner, self._watch.recording():
            yield

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
        norms = self._history.wants(parameters)
        if scaler is None and norms is None and not self._watch.on:  # nearly always
            reading = read(window, gradients, statistics)
            self._history.note(reading, optimizer)
            return reading.suspicious
        scale = LossScale(scaler)
        measured = self._watch.pending() if self._watch.on else []
        along = [entry for entry in (scale.tensor, norms) if entry is not None]
        reading = read(window, gradients, statistics, [*along, *measured])
        numbers = list(reading.along)
        first = numbers.pop(0) if scale.tensor is not None else None
        weights = None
        if norms is not None:
            weights, numbers = math.hypot(*numbers[: norms.numel()]), numbers[norms.numel() :]
        self._watch.receive(numbers)
        self._history.note(reading, optimizer, scale.value(first), weights)
        return reading.suspicious

    def bad_micro_batch(self) -> int | None:
        """The position of the first micro-batch in which an activation of a watched module is bad; said once in a window."""
        return self._watch.bad_micro_batch() if self._watch.on else None

    def ends(self, ends: Ends) -> AbstractContextManager[Callable[[Any], None]]:
        """The step is run again inside, and the outputs of watched modules have to be good."""
        return self._watch.ends(ends)

    def paused(self) -> AbstractContextManager[None]:
        """The step is run again inside: nothing of that is recorded."""
        return self._watch.paused()

    def sighting(self, micro: int, *, loss_finite: bool) -> Sighting | None:
        """What the watched modules say about a micro-batch; `None` where the step was not watched."""
        return self._watch.sighting(micro, loss_finite=loss_finite)

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

    def lead_up_to_validation(self, step: int) -> LeadUp:
        """The steps of the training up to a validation after so many of them."""
        return self._history.lead_up(step)

    def end(self, *, skipped: bool) -> None:
        """The window is over."""
        self._history.end(skipped=skipped)
        if self._watch.on:
            self._watch.end()

    def close(self) -> None:
        """The fit is over: no hook stays."""
        self._watch.end()


def located(found: Diagnosis, sighting: Sighting | None) -> Diagnosis:
    """A diagnosis from the state alone, with the module and the operands that the hooks saw, if they saw any."""
    if sighting is None or sighting.phase is None:
        return found
    module = sighting.module
    if found.cause == "bad_input" and sighting.clean:
        # That input did no harm: the module that failed was given finite values.
        found = Diagnosis(advice=f"Look into {_name(module)}: it was given finite values only.")
    elif found.cause == "bad_input" and sighting.given is not None:
        module = sighting.given
    origin = found.origin or Origin()
    origin = replace(origin, phase=sighting.phase, module=module, operands=origin.operands or sighting.operands)
    return replace(found, origin=origin)


def _name(module: str | None) -> str:
    return f"`{module}`" if module else "the root module"
