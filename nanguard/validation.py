"""The validation step under watch: what it returns and logs is looked at after each batch, if the policy says so."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn

from nanguard.archive import Archive, Circumstances
from nanguard.diagnosis import Diagnosis, MicroBatch, Rerun, diagnose, suspects
from nanguard.errors import NonFiniteError
from nanguard.examination import attempted, incident_of
from nanguard.incident import Action, Incident
from nanguard.inputs import InputKeeper, copy_of
from nanguard.lead_up import LeadUp
from nanguard.peers import Peers
from nanguard.policy import Policy
from nanguard.telling import tell_incident
from nanguard.transaction import Savepoint, Transaction
from nanguard.trees import named_tensors
from nanguard.watching import ModuleWatch, Sighting, StepResults, infinities_of, loss_in
from nanguard.watching.rows import WIDTH, measure
from nanguard.window import Moment

__all__ = ["ValidationWatch"]

_DONE: dict[str, Action] = {"raise": "raised", "stop": "stopped"}
_ADVICE = "This was a validation step: no weights were touched."
_FUNCTION = "validation_step"


@final
class ValidationWatch:
    """Looks at each validation batch.

    1. One synchronisation for each batch. 2. Scalars have to be finite; of larger outputs NaN counts, and infinities as
    ``watch.infinities`` says, because outputs may be masked. 3. ``skip_step`` is taken for ``record``: there is no step to be
    left out. 4. Where several processes validate together, they raise or stop together, when the validation ends. 5. What is
    logged accumulates, so each name is told of once in a validation. 6. A step that failed is run again, without autograd and
    from the state before it, and all is put back to what it was after it.

    Args:
        policy: what to do.
        module: what is validated.
        circumstances: called for a capture, gives what a replay has to know about the run, or `None` where there can be none.
        incidents: filled while the run goes on.
        peers: the processes that validate together with this one, if there are any.
        ignored: names of attributes of modules that belong to a framework.
        surroundings: what a step that is run again runs in; without it none is.
        lead_up: gives the steps of the training up to a validation after so many of them.
    """

    def __init__(
        self,
        policy: Policy,
        module: nn.Module,
        circumstances: Callable[[], Circumstances | None],
        incidents: list[Incident],
        *,
        peers: Peers | None = None,
        ignored: Iterable[str] = (),
        surroundings: Callable[[MicroBatch], AbstractContextManager[Any]] | None = None,
        lead_up: Callable[[int], LeadUp] | None = None,
    ) -> None:
        self._policy = policy
        self._module = module
        self._incidents = incidents
        self._peers = peers
        self._transaction = Transaction(module, ignored=ignored)
        self._archive = Archive(policy, module, circumstances)
        self._inputs = InputKeeper()
        self._surroundings = surroundings
        self._lead_up = lead_up or (lambda step: LeadUp())
        self._modules = ModuleWatch(module, policy.watch.model_copy(update={"every_n_steps": 1}))
        self._healthy: MicroBatch | None = None
        self._told: set[str] = set()
        self._waiting: Incident | None = None
        self._args: tuple[Any, ...] = ()
        self._before: Savepoint | None = None

    def begin(self, args: Sequence[Any]) -> None:
        """Before the step, with its arguments."""
        # Copies that were made in inference mode could not be put back outside it.
        with torch.inference_mode(False), torch.no_grad():
            self._args = self._inputs.keep(args)
            self._before = self._transaction.savepoint()

    def end(
        self,
        moment: Moment,
        output: Any,
        logged: Iterable[tuple[str, Tensor]],
        *,
        place: str = "",
        indices: Callable[[], tuple[int, ...] | None] = lambda: None,
    ) -> bool:
        """After the step. Returns whether the run is to stop.

        Args:
            moment: where in the run it is.
            output: what the step returned.
            logged: values that the step has logged, as they have accumulated so far, by name.
            place: more about where it is, for the incident.
            indices: gives the samples of the batch as indices into the dataset, where they are known.

        Raises:
            NonFiniteError: where the policy says so, and no other process has to be told.
        """
        before, self._before = self._before, None
        if before is None:
            return False
        try:
            found = self._bad(output, logged)
            if not found:
                self._healthy = MicroBatch(moment.batch_idx, self._args, before)
            bad = [name for name in found if name not in self._told]
            if not bad:
                return False
            self._told.update(name for name in bad if not name.startswith("output"))
            micro = MicroBatch(moment.batch_idx, self._args, before, indices())
            incident = self._incident(moment, bad, micro, loss_in(output), place)
        finally:
            self._inputs.learn()
            before.release()
        self._incidents.append(incident)
        if incident.action != "raised":
            tell_incident(incident)
        if self._peers is None:
            if incident.action == "raised":
                raise NonFiniteError(incident)
            return incident.action == "stopped"
        if self._waiting is None or incident.action == "raised":
            self._waiting = incident
        return False

    def finish(self, moment: Moment) -> bool:
        """After the last batch; every process takes part. Returns whether the run is to stop.

        Raises:
            NonFiniteError: in all processes, where one of them has to raise.
        """
        self._told.clear()
        self._healthy = None
        waiting, self._waiting = self._waiting, None
        if self._peers is None:
            return False
        severity = ["recorded", "stopped", "raised"]
        votes = self._peers.gather(0 if waiting is None else severity.index(waiting.action))
        worst = max(votes)
        if worst == 2:
            if waiting is None or waiting.action != "raised":
                rank = votes.index(2)
                waiting = Incident(moment.step, moment.epoch, moment.batch_idx, rank, "loss", action="raised")
                waiting = replace(waiting, detail=f"it began in the validation step of rank {rank}")
                self._incidents.append(waiting)
            raise NonFiniteError(waiting)
        return worst == 1

    def _bad(self, output: Any, logged: Iterable[tuple[str, Tensor]]) -> list[str]:
        found = [(name, measure(tensor)) for name, tensor in (*named_tensors(output, "output"), *logged)]
        rows = [(name, row) for name, row in found if row is not None and row.device is not None]
        if not rows:
            return []
        first = rows[0][1].device
        assert first is not None
        stacked = torch.cat([row.device.to(first.device) for _, row in rows if row.device is not None])
        values = stacked.tolist()  # the synchronisation
        for position, (_, row) in enumerate(rows):
            row.values = values[position * WIDTH : (position + 1) * WIDTH]
        return [name for name, row in rows if row.bad(infinities_of(row.shape, self._policy.watch.infinities))]

    def _incident(
        self, moment: Moment, bad: Sequence[str], micro: MicroBatch, loss: Tensor | None, place: str
    ) -> Incident:
        with torch.inference_mode(False), torch.no_grad():
            found, sighting = self._examined(micro, bad)
            action = _DONE.get(self._policy.action(trigger="loss", cause=found.cause, step=moment.step), "recorded")
            found = replace(found, advice=" ".join(filter(None, [found.advice, _ADVICE])))
            shown = ", ".join(bad[:3]) + (", ..." if len(bad) > 3 else "")
            details = [
                f"in the validation step{place}: non-finite {shown}",
                sighting.detail if sighting is not None else "",
            ]
            lead_up = self._lead_up(moment.step)
            incident = incident_of(moment, micro, "loss", found, action, details, lead_up, sighting)
            after = self._transaction.savepoint()
            try:
                micro.before.restore()
                return self._archive.store(incident, micro, loss, _FUNCTION)
            finally:
                after.restore()
                after.release()

    # -- the step once more

    def _examined(self, micro: MicroBatch, bad: Collection[str]) -> tuple[Diagnosis, Sighting | None]:
        options = self._policy.diagnosis
        if not options.enabled:
            return Diagnosis(), None
        if self._surroundings is None:
            before = self._transaction.buffers(micro.before)
            return suspects(self._module, micro.args, before, why="several processes validate together"), None
        validate: Any = self._module.validation_step
        rerun = Rerun(
            self._module,
            self._transaction,
            validate,
            self._surroundings,
            ends=StepResults(self._module, self._policy.watch.infinities, bad),
            graph=False,
        )
        found = attempted(
            lambda: diagnose(
                micro, rerun, healthy=self._healthy, samples=options.samples, counterfactual=options.counterfactuals
            )
        )
        return found, self._sighting(micro, rerun) if self._policy.watch.modules else None

    def _sighting(self, micro: MicroBatch, rerun: Rerun) -> Sighting | None:
        """What the watched modules take and give, measured in a run of their own."""
        watch = self._modules
        watch.begin(first=True)
        try:
            rerun(micro, copy_of(micro.args), within=watch.recording)
            watch.receive([number for row in watch.pending() for number in row.tolist()])
            return watch.sighting(0, loss_finite=False)
        finally:
            watch.end()
