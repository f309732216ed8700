"""Puts a failed step on disk as the policy says. A capture that cannot be written is told once and never ends the run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, final

from torch import Tensor, nn

from nanguard.capture import CaptureLimitReached, StepSnapshot, replay_command, scalar_attributes, write_capture
from nanguard.diagnosis import MicroBatch
from nanguard.errors import CaptureError, NanGuardWarning
from nanguard.incident import Incident
from nanguard.policy import Policy

__all__ = ["Archive", "Circumstances"]


@dataclass(frozen=True, eq=False)
class Circumstances:
    """What a replay has to know about the run besides the step.

    Attributes:
        optimizers: in the order of ``configure_optimizers``.
        precision: ``{"autocast_device": "cpu", "autocast_dtype": "bfloat16"}``, or `None` without autocast.
        scale: the loss scale, or `None` without a scaler.
        accumulate: what the loss is divided by.
        hparams: what builds the module again.
        trainer: facts that a training step may ask its Trainer for.
    """

    optimizers: tuple[Any, ...] = ()
    precision: Mapping[str, str] | None = None
    scale: float | None = None
    accumulate: int = 1
    hparams: Mapping[str, Any] | None = None
    trainer: Mapping[str, Any] = field(default_factory=dict)


@final
class Archive:
    """Writes captures of one module's steps.

    Args:
        policy: its ``capture`` and ``stabilize`` parts are used.
        module: the module, as it is when the run begins.
        circumstances: called for each capture; gives `None` where a step cannot be captured.
    """

    def __init__(
        self, policy: Policy, module: nn.Module, circumstances: Callable[[], Circumstances | None] | None
    ) -> None:
        self._policy = policy
        self._module = module
        self._circumstances = circumstances or Circumstances
        self._initial = scalar_attributes(module) if policy.capture.enabled else None
        self._told: set[str] = set()
        # Absolute from the beginning: some programs change their working directory.
        self._directory = policy.capture.directory.expanduser().absolute()

    def store(
        self, incident: Incident, micro: MicroBatch, loss: Tensor | None, function: str = "training_step"
    ) -> Incident:
        """Captures the step of an incident, and returns the incident with the place of the capture.

        The module must be in the state in which it was before the step.

        Args:
            incident: what happened.
            micro: the call.
            loss: what it gave.
            function: the method that was called.
        """
        options = self._policy.capture
        around = self._circumstances() if options.enabled else None
        if around is None:
            return incident
        snapshot = StepSnapshot(
            step=incident.step,
            epoch=incident.epoch,
            batch_idx=incident.batch_idx,
            rank=incident.rank,
            args=micro.args,
            module=self._module,
            rng=micro.before.rng,
            initial_attributes=self._initial,
            optimizers=around.optimizers,
            precision=around.precision,
            stabilize={**self._policy.stabilize.model_dump(), "enabled": micro.stabilized},
            scale=1.0 if around.scale is None else around.scale,
            accumulate=around.accumulate,
            hparams=around.hparams,
            trainer=around.trainer,
            loss=None if loss is None or loss.numel() != 1 else float(loss),
            function=function,
            watch=self._watch(incident, function),
        )
        try:
            path = write_capture(
                self._directory,
                snapshot,
                incident,
                module=options.model,
                optimizer=options.optimizer,
                max_count=options.max_count,
                max_gib=options.max_gib,
            )
        except CaptureError as error:
            self._tell_once(error)
            return incident
        return replace(incident, capture=str(path), replay=replay_command(path, self._module, function))

    def _watch(self, incident: Incident, function: str) -> dict[str, Any] | None:
        """What had to be good besides loss and gradients, where that is what the incident is about."""
        watch = self._policy.watch
        if function == "validation_step":
            return {"modules": [], "infinities": watch.infinities}
        if incident.trigger != "activations":
            return None
        return {"modules": list(watch.modules), "infinities": watch.infinities}

    def _tell_once(self, error: CaptureError) -> None:
        kind = "limit" if isinstance(error, CaptureLimitReached) else "failure"
        if kind not in self._told:
            self._told.add(kind)
            warnings.warn(f"{error} (the run goes on; this is said once)", NanGuardWarning, stacklevel=2)
