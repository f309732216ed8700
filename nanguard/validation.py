"""The validation step under watch: what it returns and logs is looked at after each batch, if the policy says so."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn

from nanguard.archive import Archive, Circumstances
from nanguard.diagnosis import Diagnosis, MicroBatch, suspects
from nanguard.errors import NonFiniteError
from nanguard.incident import Action, Incident
from nanguard.inputs import InputKeeper
from nanguard.peers import Peers
from nanguard.policy import Policy
from nanguard.telling import tell_incident
from nanguard.transaction import Savepoint, Transaction
from nanguard.trees import named_tensors
from nanguard.watching.rows import WIDTH, Row, measure
from nanguard.window import Moment

__all__ = ["ValidationWatch", "validation_arguments"]

_DONE: dict[str, Action] = {"raise": "raised", "stop": "stopped"}
_ADVICE = (
    "This was a validation step: no weights were touched. Replay the capture with "
    "nanguard.replay(capture, module, step=type(module).validation_step)."
)


@final
class ValidationWatch:
    """Looks at each validation batch.

    1. One synchronisation for each batch. 2. Scalars have to be finite; of larger outputs NaN counts, and infinities as
    ``watch.infinities`` says, because outputs may be masked. 3. ``skip_step`` is taken for ``record``: there is no step to be
    left out. 4. Where several processes validate together, they raise or stop together, when the validation ends. 5. What is
    logged accumulates, so each name is told of once in a validation.

    Args:
        policy: what to do.
        module: what is validated.
        circumstances: called for a capture, gives what a replay has to know about the run, or `None` where there can be none.
        incidents: filled while the run goes on.
        peers: the processes that validate together with this one, if there are any.
        ignored: names of attributes of modules that belong to a framework.
    """

    def __init__(
        self,
        policy: Policy,
        module: nn.Module,
        circumstances: Callable[[], Circumstances | None],
        incidents: list[Incident],
        peers: Peers | None = None,
        ignored: Iterable[str] = (),
    ) -> None:
        self._policy = policy
        self._module = module
        self._incidents = incidents
        self._peers = peers
        self._transaction = Transaction(module, ignored=ignored)
        self._archive = Archive(policy, module, circumstances)
        self._inputs = InputKeeper()
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

    def end(self, moment: Moment, output: Any, logged: Iterable[tuple[str, Tensor]], place: str = "") -> bool:
        """After the step. Returns whether the run is to stop.

        Args:
            moment: where in the run it is.
            output: what the step returned.
            logged: values that the step has logged, as they have accumulated so far, by name.
            place: more about where it is, for the incident.

        Raises:
            NonFiniteError: where the policy says so, and no other process has to be told.
        """
        before, self._before = self._before, None
        if before is None:
            return False
        try:
            bad = self._bad(output, logged)
            if not bad:
                return False
            incident = self._incident(moment, bad, before, _loss(output), place)
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
        bad = [name for name, row in rows if self._is_bad(row) and name not in self._told]
        self._told.update(name for name in bad if not name.startswith("output"))
        return bad

    def _is_bad(self, row: Row) -> bool:
        return row.bad(self._policy.watch.infinities if row.shape else "all")

    def _incident(self, moment: Moment, bad: list[str], before: Savepoint, loss: Tensor | None, place: str) -> Incident:
        found = Diagnosis()
        if self._policy.diagnosis.enabled:
            found = suspects(self._module, self._args, self._transaction.buffers(before), run=True)
        action = self._policy.action(trigger="loss", cause=found.cause, step=moment.step)
        shown = ", ".join(bad[:3]) + (", ..." if len(bad) > 3 else "")
        incident = Incident(
            moment.step,
            moment.epoch,
            moment.batch_idx,
            moment.rank,
            "loss",
            origin=found.origin,
            cause=found.cause,
            advice=" ".join(filter(None, [found.advice, _ADVICE])),
            action=_DONE.get(action, "recorded"),
            detail=f"in the validation step{place}: non-finite {shown}",
        )
        with torch.inference_mode(False), torch.no_grad():
            after = self._transaction.savepoint()
            try:
                before.restore()
                micro = MicroBatch(moment.batch_idx, self._args, before)
                stored = self._archive.store(incident, micro, loss)
            finally:
                after.restore()
                after.release()
        return replace(stored, replay=None)  # the command would call the training step


def validation_arguments(module: Any, batch: Any, batch_idx: int, dataloader_idx: int) -> tuple[Any, ...]:
    """As many of them as the validation step takes."""
    parameters = inspect.signature(module.validation_step).parameters
    return (batch, batch_idx, dataloader_idx)[: len(parameters)]


def _loss(output: Any) -> Tensor | None:
    loss = output.get("loss") if isinstance(output, dict) else output
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None
