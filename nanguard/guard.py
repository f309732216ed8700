"""The guard: sentinel, diagnosis, capture and transaction composed under a policy. Knows no framework.

What happens to one optimizer step:

1. `Guard.begin` is called before each call of the training step (each micro-batch) and saves the state before it.
2. The training step runs inside `Guard.stabilizing`, its loss is shown to `Guard.saw_loss`.
3. `Guard.judge` is called when the gradients are complete and before they are clipped or used. It reads the loss and all
   gradients with one synchronisation. Where all is finite nothing else happens.
4. Where not, the step is run again to find the origin, the policy chooses an action, the batch is captured, and everything
   but the parameters, which nobody has touched yet, is put back to where it was before the first micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nanguard.archive import Archive, Circumstances
from nanguard.budget import SkipBudget
from nanguard.diagnosis import Diagnosis, MicroBatch, Rerun
from nanguard.examination import Examination, dataset_indices
from nanguard.incident import Action, Advice, Incident, Swap, Trigger
from nanguard.inputs import InputKeeper
from nanguard.lead_up import LeadUp
from nanguard.moving import MovingParameters, ParameterSnapshot
from nanguard.observer import Observer
from nanguard.peers import Peers
from nanguard.policy import Policy
from nanguard.rng import RngState
from nanguard.sentinel import norms
from nanguard.telling import tell_advice, tell_incident, tell_swap
from nanguard.transaction import OptimizerSnapshot, Transaction
from nanguard.watch import UnstableOpsWatch
from nanguard.window import Attempt, Moment, figures, first_suspect, gradients_of

__all__ = ["Guard", "Moment", "Ruling"]

_DONE: dict[str, Action] = {"raise": "raised", "skip_step": "skipped", "record": "recorded", "stop": "stopped"}


@dataclass(frozen=True)
class Ruling:
    """What is to be done with a step, and the incident that led to it."""

    action: Literal["proceed", "raise", "skip_step", "record", "stop"]
    incident: Incident | None = None


_PROCEED = Ruling("proceed")


@final
class Guard:
    """Guards the training of one module.

    Args:
        policy: what to do.
        module: what is trained.
        transaction: saves and restores what a step touches.
        rerun: runs a step again for the diagnosis; without it the diagnosis is limited to inputs and parameters.
        peers: the processes that train together with this one, if there are any.
        circumstances: called for a capture, gives what a replay has to know about the run.
    """

    def __init__(
        self,
        policy: Policy,
        module: nn.Module,
        *,
        transaction: Transaction | None = None,
        rerun: Rerun | None = None,
        peers: Peers | None = None,
        circumstances: Callable[[], Circumstances | None] | None = None,
        incidents: list[Incident] | None = None,
        swaps: list[Swap] | None = None,
        advice: list[Advice] | None = None,
    ) -> None:
        self.policy = policy
        self.incidents: list[Incident] = [] if incidents is None else incidents
        self.swaps: list[Swap] = [] if swaps is None else swaps
        self.advice: list[Advice] = [] if advice is None else advice
        self._module = module
        self._transaction = transaction or Transaction(module, moving=MovingParameters(module))
        self._examine = Examination(policy.diagnosis, module, self._transaction, rerun)
        self._peers = peers
        self._archive = Archive(policy, module, circumstances)
        self._watch = UnstableOpsWatch()
        self._stabilize = _stabilizer(policy, self.swaps, self.advice)
        self._told = len(self.swaps)
        self._advised = len(self.advice)
        self._inputs = InputKeeper()
        self._observer = Observer(module, policy.watch)
        self._window: list[Attempt] = []
        self._moved: OptimizerSnapshot | None = None
        self._left: ParameterSnapshot | None = None
        self._scaler_streak = 0
        self._budget = SkipBudget(policy.budget)
        self.dropping = False

    @property
    def pending(self) -> bool:
        """Whether micro-batches wait for the optimizer."""
        return bool(self._window) and not self.dropping

    @property
    def forward_only(self) -> bool:
        """Whether micro-batches wait for an optimizer that none of them has any gradients for."""
        return self.pending and all(attempt.loss is None for attempt in self._window)

    # -- before and during the step

    def start(self) -> None:
        """The fit begins. Raises `PolicyError` where ``watch.modules`` holds a pattern that matches no module."""
        self._observer.start()

    def close(self) -> None:
        """The fit is over, however it ended: no hook stays."""
        self._observer.close()

    def begin(
        self,
        moment: Moment,
        args: Sequence[Any],
        *,
        indices: tuple[int, ...] | None = None,
        rewind: RngState | None = None,
        optimizers: Iterable[torch.optim.Optimizer] = (),
    ) -> None:
        """Saves the state before one call of the training step with these arguments, the batch first.

        Args:
            moment: where in the run it is.
            args: arguments of the training step.
            indices: the samples of the batch as indices into the dataset.
            rewind: where random number streams go back to if the batch is left out, for loaders that draw while they fetch.
            optimizers: those that may move parameters before `judge` is called for the last time, as LBFGS does.
        """
        if self.dropping:  # the rest of a window that is left out
            return
        self._observer.begin(moment.step, first=not self._window)
        stabilized = self._stabilize is not None and self._watch.needed
        kept = self._inputs.keep(args)
        micro = MicroBatch(moment.batch_idx, kept, self._transaction.savepoint(), indices, stabilized)
        self._window.append(Attempt(moment, micro, micro.before, rewind))
        optimizers = list(optimizers)
        if optimizers and self._moved is None and (self.policy.may_continue() or self.policy.stores_weights()):
            self._moved = OptimizerSnapshot(optimizers)

    def starts_here(self) -> None:
        """The step begins only now: what happened since `begin` is undone by a skip, but is no part of the step itself."""
        if self._window:
            attempt = self._window[-1]
            attempt.micro = replace(attempt.micro, before=self._transaction.savepoint())

    def stabilizing(self, micro: MicroBatch | None = None) -> AbstractContextManager[Any]:
        """What the forward pass of the present micro-batch runs in, or that of an earlier one which is run again."""
        again = micro is not None
        if micro is None and self._window:
            micro = self._window[-1].micro
        on = self._stabilize is not None and (micro is None or micro.stabilized)
        around: AbstractContextManager[Any] = self._stabilize if on else nullcontext()
        return around if again or self.dropping else self._observer.around(around)

    def saw_loss(self, loss: Tensor) -> None:
        """Takes note of the loss before the backward pass; no synchronisation."""
        if self._window:
            self._window[-1].loss = loss.detach()
        if self._stabilize is not None:
            self._watch.look(loss)
            self._tell_swaps()

    def saw_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Takes note of the gradients accumulated so far, so that the micro-batch at fault can be told; no synchronisation."""
        if self._window:
            self._window[-1].norms = norms(gradients_of(parameters))

    # -- the decision

    def judge(self, parameters: Iterable[Tensor], *, scaler: Any = None, optimizer: Any = None) -> Ruling:
        """Whether the optimizer may use these gradients.

        Args:
            parameters: those that the optimizer is about to step.
            scaler: the GradScaler that will skip non-finite gradients by itself, if there is one.
            optimizer: the optimizer itself, where it is known; its learning rates are followed.
        """
        if not self._window:
            return _PROCEED
        if self.dropping:
            return Ruling("skip_step", self.incidents[-1])
        self._transaction.learn()
        parameters = list(parameters)
        gradients = gradients_of(parameters)
        found = None
        statistics = self._window[-1].micro.before.statistics
        if self._observer.suspicious(self._window, gradients, statistics, parameters, optimizer, scaler):
            found = first_suspect(self._window, gradients)
            if found is None:
                self._observer.false_alarm(gradients, optimizer)
        if scaler is not None and (found is None or found[1] == "gradients"):
            found = self._judge_scaler(scaler, found)
        if found is None and (position := self._observer.bad_micro_batch()) is not None:
            found = self._window[position], "activations"
        bad = found is not None
        if self._peers is not None:
            bad = self._peers.any(bad)
        if not bad:
            return _PROCEED
        attempt, trigger = found or (self._window[-1], "gradients")
        elsewhere = self._elsewhere(found)
        if self._peers is not None:
            trigger = self._peers.told(trigger, elsewhere)
        return self._rule(attempt, trigger, parameters, elsewhere, self._observer.lead_up(parameters, optimizer))

    def _elsewhere(self, found: tuple[Attempt, Trigger] | None) -> int | None:
        if self._peers is None:
            return None
        return self._peers.culprit(loss=found is not None and found[1] == "loss", alarm=found is not None)

    def _judge_scaler(self, scaler: Any, found: tuple[Attempt, Trigger] | None) -> tuple[Attempt, Trigger] | None:
        """A scaler's own skips are part of its work until there are too many of them, or the scale is spent."""
        if found is None:
            self._scaler_streak = 0
            return None
        self._scaler_streak += 1
        limits = self.policy.scaler
        if self._scaler_streak >= limits.max_consecutive_skips or float(scaler.get_scale()) < limits.min_scale:
            return found[0], "scaler"
        self._observer.left_out()
        return None

    def _rule(
        self,
        attempt: Attempt,
        trigger: Trigger,
        parameters: list[Tensor],
        elsewhere: int | None,
        lead_up: LeadUp,
    ) -> Ruling:
        position, loss = self._window.index(attempt), trigger == "loss"
        sighting = self._observer.sighting(position, loss_finite=not loss) if elsewhere is None else None
        with self._observer.paused():
            found = self._examine(attempt, trigger, sighting) if elsewhere is None else Diagnosis()
        moment = attempt.moment
        action = self.policy.action(trigger=trigger, cause=found.cause, step=moment.step)
        if self._peers is not None:
            action = self._peers.agreed(action, elsewhere)
        action, remark = self._budget.spend(action)
        if elsewhere is None:
            details = [figures(attempt, parameters, self._module), sighting.detail if sighting else "", remark]
            if self._inputs.learn():
                details.append("the step has written into its batch, which is captured as the step left it")
        else:
            details = [f"it began on rank {elsewhere}, which has the batch; this rank was given its gradients", remark]
        incident = Incident(
            step=moment.step,
            epoch=moment.epoch,
            batch_idx=moment.batch_idx,
            rank=moment.rank if elsewhere is None else elsewhere,
            trigger=trigger,
            origin=found.origin,
            cause=found.cause,
            samples=found.samples,
            dataset_indices=dataset_indices(attempt.micro, found.samples),
            verdict=found.verdict,
            advice=found.advice,
            action=_DONE[action],
            detail="; ".join(filter(None, details)),
            lead_up=lead_up,
            activations=sighting.activations if sighting else (),
        )
        if elsewhere is None:
            incident = self._store(incident, attempt)
        self.incidents.append(incident)
        if action != "record":
            self.restore()
            self.dropping = action != "raise"
        if self.dropping:
            self._left = ParameterSnapshot([p for p in self._module.parameters() if not is_lazy(p)])
        if action != "raise":
            tell_incident(incident)
        return Ruling(action, incident)

    def _store(self, incident: Incident, attempt: Attempt) -> Incident:
        """Captures the step from the state before it, and comes back to the state after it."""
        after = self._transaction.savepoint()
        moved = OptimizerSnapshot(self._moved.optimizers) if self._moved is not None else None
        try:
            attempt.micro.before.restore()
            if self._moved is not None:
                self._moved.restore()
            return self._archive.store(incident, attempt.micro, attempt.loss)
        finally:
            if moved is not None:
                moved.restore()
            after.restore()
            after.release()

    # -- after the step

    def restore(self) -> None:
        """Puts everything back to before the window's first micro-batch. May be called again after more has happened."""
        first = self._window[0]
        first.undo.restore()
        if first.rewind is not None:
            first.rewind.restore()
        if self._moved is not None:
            self._moved.restore()
        # What hooks and callbacks do to parameters after the step was left out must not stay either.
        if self._left is not None:
            self._left.restore()

    def end_window(self) -> None:
        """Forgets the window: its step was taken, or left out for good."""
        if not self.dropping and self._window:
            self._budget.healthy_step()
            self._examine.was_healthy(self._window[-1].micro)
        self._observer.end(skipped=self.dropping)
        for attempt in self._window:
            attempt.undo.release()
            attempt.micro.before.release()
        self._inputs.learn()
        self._window.clear()
        self._moved = None
        self._left = None
        self.dropping = False

    def _tell_swaps(self) -> None:
        for swap in self.swaps[self._told :]:
            self._told += 1
            tell_swap(swap)
        for advice in self.advice[self._advised :]:
            self._advised += 1
            tell_advice(advice)


def _stabilizer(policy: Policy, swaps: list[Swap], advice: list[Advice]) -> Any:
    if not policy.stabilize.enabled:
        return None
    from nanguard.stabilizer import stabilize

    options = policy.stabilize
    return stabilize(options.epsilon, saturated=options.saturated, swaps=swaps, advice=advice)
