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

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nanguard.archive import Archive, Circumstances
from nanguard.budget import SkipBudget
from nanguard.diagnosis import Diagnosis, MicroBatch, Rerun
from nanguard.examination import Examination, Provenance, incident_of
from nanguard.incident import Action, Advice, Incident, Swap, Trigger
from nanguard.inputs import InputKeeper
from nanguard.lead_up import LeadUp
from nanguard.moving import MovingParameters
from nanguard.observer import Observer
from nanguard.peers import Peers
from nanguard.policy import Policy, RuleAction
from nanguard.rng import RngState
from nanguard.sentinel import norms
from nanguard.stabilizing import StepStabilizer
from nanguard.telling import tell_incident
from nanguard.transaction import Transaction
from nanguard.watching import Sighting
from nanguard.window import Attempt, Moment, Window, figures, first_suspect, gradients_of

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
        provenance: knows how the batches are made of samples of the dataset.
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
        provenance: Provenance | None = None,
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
        self._peers = peers
        self._provenance = provenance
        self._archive = Archive(policy, module, circumstances)
        self._stabilizer = StepStabilizer(policy.stabilize, self.swaps, self.advice)
        self._inputs = InputKeeper()
        self._observer = Observer(module, policy.watch)
        self._examine = Examination(policy.diagnosis, module, self._transaction, rerun, self._observer.ends, provenance)
        self._window = Window(self._transaction)
        self._arguments: Sequence[Any] = ()
        self._scaler_streak = 0
        self._budget = SkipBudget(policy.budget)
        self.dropping = False

    @property
    def pending(self) -> bool:
        """Whether micro-batches wait for the optimizer."""
        return bool(self._window.attempts) and not self.dropping

    @property
    def forward_only(self) -> bool:
        """Whether micro-batches wait for an optimizer that none of them has any gradients for."""
        return self.pending and all(attempt.loss is None for attempt in self._window.attempts)

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
        optimizers: Sequence[torch.optim.Optimizer] = (),
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
        self._observer.begin(moment.step, first=not self._window.attempts, optimizers=optimizers)
        self._arguments = args
        kept = self._inputs.keep(args)
        micro = MicroBatch(moment.batch_idx, kept, self._transaction.savepoint(), indices, self._stabilizer.needed)
        self._window.attempts.append(Attempt(moment, micro, micro.before, rewind))
        if self.policy.may_continue() or self.policy.stores_weights():
            self._window.follow(list(optimizers))

    def starts_here(self) -> None:
        """The step begins only now: what happened since `begin` is undone by a skip, but is no part of the step itself."""
        if self._window.attempts and not self.dropping:
            attempt = self._window.attempts[-1]
            args = self._inputs.keep_anew(self._arguments)  # hooks may have written into the batch
            attempt.micro = replace(attempt.micro, args=args, before=self._transaction.savepoint())

    def starts_again(self) -> None:
        """The optimizer calls the step once more for the same batch, and may have moved the parameters, as LBFGS does."""
        self._inputs.learn()
        self.starts_here()
        if self._window.attempts:
            self._window.attempts[-1].moved = True

    def stabilizing(self, micro: MicroBatch | None = None) -> AbstractContextManager[Any]:
        """What the forward pass of the present micro-batch runs in, or that of an earlier one which is run again."""
        again = micro is not None
        if micro is None and self._window.attempts:
            micro = self._window.attempts[-1].micro
        off = micro is not None and not micro.stabilized
        around = nullcontext() if off else self._stabilizer.around or nullcontext()
        return around if again or self.dropping else self._observer.around(around)

    def saw_loss(self, loss: Tensor) -> None:
        """Takes note of the loss before the backward pass; no synchronisation."""
        if self._window.attempts:
            self._window.attempts[-1].loss = loss.detach()
        self._stabilizer.saw_loss(loss)

    def saw_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Takes note of the gradients accumulated so far, so that the micro-batch at fault can be told; no synchronisation."""
        if self._window.attempts:
            self._window.attempts[-1].norms = norms(gradients_of(parameters))

    # -- the decision

    def judge(self, parameters: Iterable[Tensor], *, scaler: Any = None, optimizer: Any = None) -> Ruling:
        """Whether the optimizer may use these gradients.

        Args:
            parameters: those that the optimizer is about to step.
            scaler: the GradScaler that will skip non-finite gradients by itself, if there is one.
            optimizer: the optimizer itself, where it is known; its learning rates are followed.
        """
        if not self._window.attempts:
            return _PROCEED
        if self.dropping:
            return Ruling("skip_step", self.incidents[-1])
        self._transaction.learn()
        parameters = list(parameters)
        gradients = gradients_of(parameters)
        found = None
        statistics = self._window.attempts[-1].micro.before.statistics
        if self._observer.suspicious(self._window.attempts, gradients, statistics, parameters, optimizer, scaler):
            found = first_suspect(self._window.attempts, gradients)
            if found is None:
                self._observer.false_alarm(gradients, optimizer)
        if self._window.told:  # in manual optimization: what the incident was about goes on
            return _PROCEED
        if scaler is not None and (found is None or found[1] == "gradients"):
            found = self._judge_scaler(scaler, found)
        if found is None and (position := self._observer.bad_micro_batch()) is not None:
            found = self._window.attempts[position], "activations"
        bad = found is not None
        if self._peers is not None:
            bad = self._peers.any(bad)
        if not bad:
            return _PROCEED
        attempt, trigger = found or (self._window.attempts[-1], "gradients")
        lead_up = self._observer.lead_up(parameters, optimizer)
        return self._rule(attempt, trigger, parameters, self._elsewhere(found), lead_up)

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
        position, loss = self._window.attempts.index(attempt), trigger == "loss"
        sighting = self._observer.sighting(position, loss_finite=not loss) if elsewhere is None else None
        with self._observer.paused():
            found = self._examine(attempt, trigger, sighting) if elsewhere is None else Diagnosis()
        if self._peers is not None:
            elsewhere = self._peers.reproducing(found.verdict == "reproduced", elsewhere)
            trigger = self._peers.told(trigger, elsewhere)
            if elsewhere is not None:
                found, sighting = Diagnosis(), None
        moment = attempt.moment
        action = self.policy.action(trigger=trigger, cause=found.cause, step=moment.step)
        if self._peers is not None:
            action = self._peers.agreed(action, elsewhere)
        action, remark = self._budget.spend(action)
        if elsewhere is None:
            details = [*self._details(attempt, parameters, sighting), remark]
        else:
            details = [f"it began on rank {elsewhere}, which has the batch; this rank was given its gradients", remark]
            moment = replace(moment, rank=elsewhere)
        incident = incident_of(
            moment, attempt.micro, trigger, found, _DONE[action], details, lead_up, sighting, self._provenance
        )
        if elsewhere is None:
            with self._window.before(attempt):
                incident = self._archive.store(incident, attempt.micro, attempt.loss)
        self.incidents.append(incident)
        self._window.incident = trigger
        return self._carry_out(action, incident)

    def _details(self, attempt: Attempt, parameters: list[Tensor], sighting: Sighting | None) -> Iterator[str]:
        yield figures(attempt, parameters, self._module)
        yield sighting.detail if sighting is not None else ""
        if self._inputs.learn():
            yield "the step has written into its batch, which is captured as the step left it"

    def _carry_out(self, action: RuleAction, incident: Incident) -> Ruling:
        if action != "record":
            self._window.restore()
            self.dropping = action != "raise"
        if self.dropping:
            self._window.hold([p for p in self._module.parameters() if not is_lazy(p)])
        if action != "raise":
            tell_incident(incident)
        return Ruling(action, incident)

    def lead_up_to_validation(self, step: int) -> LeadUp:
        """The steps of the training up to a validation after so many of them."""
        return self._observer.lead_up_to_validation(step)

    # -- after the step

    def restore(self) -> None:
        """Puts everything back to before the window's first micro-batch. May be called again after more has happened."""
        self._window.restore()

    def end_window(self) -> None:
        """Forgets the window: its step was taken, or left out for good."""
        if not self.dropping and self._window.attempts:
            self._budget.healthy_step()
            if self._window.incident is None and not self._scaler_streak:  # what the scaler left out was not well
                self._examine.was_healthy(self._window.attempts[-1].micro)
        self._observer.end(skipped=self.dropping)
        self._window.close()
        self._arguments = ()
        self._inputs.learn()
        self.dropping = False
