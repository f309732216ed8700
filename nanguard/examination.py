"""The diagnosis of one micro-batch under a policy: by further runs where the step can be run again, else by what was seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol, final

from torch import nn

from nanguard.diagnosis import Diagnosis, Ends, MicroBatch, Rerun, batch_size, diagnose, suspects
from nanguard.incident import Action, Incident, Trigger
from nanguard.lead_up import LeadUp
from nanguard.observer import located
from nanguard.policy import Diagnosis as Options
from nanguard.transaction import Transaction
from nanguard.watching import Sighting
from nanguard.window import Attempt, Moment

__all__ = ["Examination", "Provenance", "attempted", "incident_of"]

_SCALER_ADVICE = (
    "Without the loss scale the gradients are finite, so they overflow in half precision only. Lower the learning rate or "
    "the initial scale, or train in bfloat16."
)


class Provenance(Protocol):
    """What is known of how the batches are made."""

    def sources(self, indices: Sequence[int], rows: Sequence[int], size: int) -> tuple[int, ...] | None:
        """Of the indices of a batch, those that rows were made of, given its size."""

    def parts(self, indices: Sequence[int], batch: Any) -> Callable[[Sequence[int]], Any] | None:
        """What collates some of the samples of a batch; `None` where its rows can be cut."""


@final
class Examination:
    """Examines micro-batches that failed.

    Args:
        options: how far to go.
        module: what is trained.
        transaction: knows the buffers as they were before the step.
        rerun: runs a step again; without it only inputs, parameters and watched modules are looked at.
        ends: what a step runs in where the outputs of watched modules have to be good, as `Rerun` takes it.
        provenance: knows how the batches are made.
    """

    def __init__(
        self,
        options: Options,
        module: nn.Module,
        transaction: Transaction,
        rerun: Rerun | None,
        ends: Callable[[Ends], AbstractContextManager[Callable[[Any], None]]],
        provenance: Provenance | None = None,
    ) -> None:
        self._options = options
        self._module = module
        self._transaction = transaction
        self._rerun = rerun
        self._ends = ends
        self._provenance = provenance
        self._healthy: MicroBatch | None = None

    def was_healthy(self, micro: MicroBatch) -> None:
        """Remembers the last micro-batch that was well, to compare with."""
        self._healthy = micro if self._rerun is not None else None

    def __call__(self, attempt: Attempt, trigger: Trigger, sighting: Sighting | None) -> Diagnosis:
        """What happened.

        Args:
            attempt: the micro-batch at fault.
            trigger: what noticed it. From an activation that does not reach the loss the step is walked back.
            sighting: what watched modules saw of it, which counts where the step is not run again.
        """
        found = Diagnosis()
        if self._options.enabled:
            found = attempted(lambda: self._autopsy(attempt, trigger, sighting))
        return located(found, sighting) if found.verdict == "not_replayed" else found

    def _autopsy(self, attempt: Attempt, trigger: Trigger, sighting: Sighting | None) -> Diagnosis:
        if self._rerun is None:
            before = self._transaction.buffers(attempt.micro.before)
            return suspects(self._module, attempt.micro.args, before, watched=sighting is not None)
        silent = trigger == "activations"  # an earlier step with such a one went unseen where it was not watched
        found = diagnose(
            attempt.micro,
            replace(self._rerun, ends=self._ends) if silent else self._rerun,
            healthy=None if silent else self._healthy,
            samples=self._options.samples,
            counterfactual=self._options.counterfactuals,
            parts=self._provenance.parts if self._provenance is not None else None,
        )
        if trigger == "scaler" and found.verdict == "transient":
            return Diagnosis(advice=_SCALER_ADVICE)
        return found


def attempted(diagnosis: Callable[[], Diagnosis]) -> Diagnosis:
    """A diagnosis; one that fails says so: whatever is wrong with it, the incident is worth more."""
    try:
        return diagnosis()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
        return Diagnosis(advice=f"The diagnosis itself failed: {reason}")


def incident_of(
    moment: Moment,
    micro: MicroBatch,
    trigger: Trigger,
    found: Diagnosis,
    action: Action,
    details: Iterable[str],
    lead_up: LeadUp,
    sighting: Sighting | None,
    provenance: Provenance | None = None,
) -> Incident:
    """All that is known of one failed step.

    Args:
        moment: when, and on which rank.
        micro: the micro-batch at fault.
        trigger: what noticed it.
        found: what its examination has shown.
        action: what was done.
        details: remarks, of which empty ones are left out.
        lead_up: the steps before.
        sighting: what watched modules saw of it.
        provenance: tells which samples rows of a batch were made of; without it those that stand at the same place.
    """
    return Incident(
        step=moment.step,
        epoch=moment.epoch,
        batch_idx=moment.batch_idx,
        rank=moment.rank,
        trigger=trigger,
        origin=found.origin,
        cause=found.cause,
        samples=found.samples,
        dataset_indices=_dataset_indices(micro, found, provenance),
        verdict=found.verdict,
        advice=found.advice,
        action=action,
        detail="; ".join(filter(None, details)),
        lead_up=lead_up,
        activations=sighting.activations if sighting else (),
    )


def _dataset_indices(micro: MicroBatch, found: Diagnosis, provenance: Provenance | None) -> tuple[int, ...] | None:
    """The samples at fault in a micro-batch as indices into the dataset, where they are known."""
    indices, samples = micro.indices, found.samples
    if indices is None or samples is None:
        return None
    if len(indices) == 1:
        return indices
    if found.collated:
        return tuple(indices[position] for position in samples)
    size = batch_size(micro.args[0], len(indices))
    if provenance is not None:
        return None if size is None else provenance.sources(indices, samples, size)
    # Otherwise collation made another number of rows of these samples.
    return tuple(indices[position] for position in samples) if size == len(indices) else None
