"""What a replay knows about its failure besides the bare numbers: the same diagnosis as in the run."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from nanguard.capture.running import after_backward_of, users_hook
from nanguard.capture.showing import around_of
from nanguard.diagnosis import MicroBatch, Rerun, diagnose
from nanguard.incident import Incident
from nanguard.transaction import Transaction

if TYPE_CHECKING:
    from nanguard.capture.running import FailedStep

__all__ = ["explained"]


def explained(step: FailedStep, incident: Incident) -> Incident:
    """The incident with origin, cause, samples and advice, from further runs of the step."""
    step.rewind()
    transaction = Transaction(step.module)
    micro = MicroBatch(incident.batch_idx, step.args, transaction.savepoint())
    rerun = Rerun(
        step.module,
        transaction,
        lambda *args: step(*args, **step.kwargs),
        backward=users_hook(step.module, "backward"),
        after_backward=after_backward_of(step.capture, step.module),
    )
    if step.capture.function == "validation_step":
        rerun = replace(rerun, graph=False)
    if incident.trigger == "activations" or not rerun.graph:
        rerun = replace(rerun, ends=around_of(step.capture, step.module))
    found = diagnose(micro, rerun)
    return replace(
        incident,
        origin=found.origin,
        cause=found.cause,
        samples=found.samples,
        verdict=found.verdict,
        advice=found.advice,
    )
