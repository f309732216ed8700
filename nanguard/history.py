"""A ring of the last steps, so that a failure can be told from a spike that led up to it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from nanguard.lead_up import LeadUp
from nanguard.reading import Reading
from nanguard.sentinel import norms, values_of

__all__ = ["STEPS", "LossScale", "StepHistory"]

STEPS = 500
_PARAMETERS_EVERY = 50


@final
class LossScale:
    """The scale of a GradScaler, which may live on the device: there it is read with the rest, not by a wait of its own.

    Relies on the attribute ``_scale`` of torch's GradScaler, a scalar tensor that exists from its first use on.
    """

    def __init__(self, scaler: Any) -> None:
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        held = getattr(self._scaler, "_scale", None)
        self.tensor: Tensor | None = held if isinstance(held, Tensor) and not held.is_cpu else None

    def value(self, along: float | None) -> float | None:
        """The scale, or `None` without a scaler; `along` is the number that `tensor` was read as."""
        if self._scaler is None:
            return None
        return along if along is not None else float(self._scaler.get_scale())


@dataclass
class _Entry:
    step: int
    loss: float | None = None
    gradients: dict[int, float] = field(default_factory=dict)
    parameters: dict[int, float] = field(default_factory=dict)
    rates: dict[int, list[Any]] = field(default_factory=dict)
    scale: float | None = None
    skipped: bool = False


@final
class StepHistory:
    """Follows loss, gradient norm, parameter norm, learning rates and loss scale of the last 500 optimizer steps.

    1. There is one entry for each window of micro-batches, from `begin` to `end`. 2. Loss and gradient norm are those that the
    sentinel reads anyway: the loss of the whole window, and the norm before clipping. 3. Where several optimizers step in one
    window, the loss is that of the last backward pass before the last of them, and the norms are over all of them together.
    4. The norm of the parameters costs a pass over them, so it is taken in every 50th step, and in a step that fails. 5. Where
    the parameters are sharded over processes, norms are of the shard of this process.
    """

    def __init__(self, size: int = STEPS) -> None:
        self._ring: deque[_Entry] = deque(maxlen=size)
        self._open: _Entry | None = None
        self._optimizers: Sequence[Any] = ()
        self._begun = 0

    def begin(self, step: int, optimizers: Sequence[Any] = ()) -> None:
        """A window begins, after so many optimizer steps; `optimizers` are those that step in it, if several may."""
        self._open = _Entry(step)
        self._optimizers = optimizers
        self._begun += 1

    def wants(self, parameters: list[Tensor]) -> Tensor | None:
        """The norms of the parameters, in those steps that take them; no synchronisation."""
        if self._open is None or self._begun % _PARAMETERS_EVERY != 1:
            return None
        with torch.no_grad():
            return norms(parameters)

    def note(
        self, reading: Reading, optimizer: Any = None, scale: float | None = None, parameters: float | None = None
    ) -> None:
        """What was read before an optimizer steps.

        Args:
            reading: of the window so far.
            optimizer: the one that is about to step; a later note about the same one takes the place of an earlier one.
            scale: what the loss is multiplied by.
            parameters: the norm of its parameters, where it was taken.
        """
        entry, key = self._open, id(optimizer)
        if entry is None:
            return
        factor = scale or 1.0
        if reading.loss is not None:
            entry.loss = reading.loss / factor
        if reading.gradient_norm is not None:
            # Fused optimizers unscale by themselves, so that nobody has done it yet.
            scaled = scale is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
            entry.gradients[key] = reading.gradient_norm / (factor if scaled else 1.0)
        if parameters is not None:
            entry.parameters[key] = parameters
        if optimizer is not None:
            entry.rates[key] = _rates(optimizer)
        entry.scale = scale

    def measure(self, gradients: list[Tensor], optimizer: Any = None) -> None:
        """Takes the norm of gradients that are finite, but too large for a norm in their own precision."""
        values = [entry for entry in map(values_of, gradients) if entry is not None]
        if self._open is not None and id(optimizer) in self._open.gradients:
            norms = [float(torch.linalg.vector_norm(entry.detach(), dtype=_wide(entry))) for entry in values]
            self._open.gradients[id(optimizer)] = math.hypot(*norms)

    def weigh(self, parameters: list[Tensor], optimizer: Any = None) -> None:
        """Takes the norm of these parameters now: the step fails, and what that costs is no matter any more."""
        if self._open is not None:
            with torch.no_grad():
                found = norms(parameters)
            if found is not None:
                self._open.parameters[id(optimizer)] = math.hypot(*found.tolist())
            # Those whose turn has not come yet have learning rates, too.
            rates = {id(entry): _rates(entry) for entry in self._optimizers}
            self._open.rates = {**rates, **self._open.rates}

    def left_out(self) -> None:
        """The GradScaler will leave the present step out."""
        if self._open is not None:
            self._open.skipped = True

    def end(self, *, skipped: bool) -> None:
        """The window is over: its step was taken, or left out."""
        if self._open is not None:
            self._open.skipped |= skipped
            self._ring.append(self._open)
        self._open = None

    def lead_up(self, validation: int | None = None) -> LeadUp:
        """The steps so far, the present one last; in a `validation` after so many steps it stands for that."""
        present = self._open if validation is None else _Entry(validation)
        entries = [*self._ring, *([present] if present is not None else [])]
        if self._ring.maxlen is not None:
            entries = entries[-self._ring.maxlen :]
        return LeadUp(
            steps=tuple(entry.step for entry in entries),
            loss=tuple(entry.loss for entry in entries),
            gradient_norm=tuple(_together(entry.gradients) for entry in entries),
            parameter_norm=tuple(_together(entry.parameters) for entry in entries),
            learning_rates=tuple(_distinct(entry.rates) for entry in entries),
            loss_scale=tuple(entry.scale for entry in entries),
            skipped=tuple(entry.skipped for entry in entries),
        )


def _wide(values: Tensor) -> torch.dtype:
    return torch.complex128 if values.is_complex() else torch.float64


def _rates(optimizer: Any) -> list[Any]:
    return [_held(group.get("lr")) for group in optimizer.param_groups]


def _held(rate: Any) -> Any:
    """A learning rate that will not change any more; one that is a tensor is copied on its device, and read when asked for."""
    return rate.detach().clone() if isinstance(rate, Tensor) else rate


def _together(norms: dict[int, float]) -> float | None:
    return math.hypot(*norms.values()) if norms else None


def _distinct(rates: dict[int, list[Any]]) -> tuple[float, ...]:
    found = [float(rate) for group in rates.values() for rate in group if isinstance(rate, (int, float, Tensor))]
    return tuple(dict.fromkeys(found))
