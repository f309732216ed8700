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

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from nanguard.archive import Archive, Circumstances
from nanguard.diagnosis import Diagnosis, MicroBatch, Rerun, diagnose, suspects
from nanguard.errors import NanGuardWarning
from nanguard.incident import Action, Incident, Swap, Trigger
from nanguard.policy import Policy
from nanguard.rng import RngState
from nanguard.sentinel import all_finite, nonfinite_names, norms
from nanguard.transaction import OptimizerSnapshot, Transaction
from nanguard.watch import UnstableOpsWatch

__all__ = ["Guard", "Moment", "Ruling"]

_DONE: dict[str, Action] = {"raise": "raised", "skip_step": "skipped", "record": "recorded", "stop": "stopped"}


@dataclass(frozen=True)
class Moment:
    """Where in the run a batch is: optimizer steps taken, epoch, index of the batch in the epoch, rank of the process."""

    step: int
    epoch: int
    batch_idx: int
    rank: int = 0


@dataclass(frozen=True)
class Ruling:
    """What is to be done with a step, and the incident that led to it."""

    action: Literal["proceed", "raise", "skip_step", "record", "stop"]
    incident: Incident | None = None


@dataclass(eq=False)
class _Attempt:
    moment: Moment
    micro: MicroBatch
    rewind: RngState | None = None
    stabilized: bool = False
    loss: Tensor | None = None
    norms: Tensor | None = None


@final
class Guard:
    """Guards the training of one module.

    Args:
        policy: what to do.
        module: what is trained.
        transaction: saves and restores what a step touches.
        rerun: runs a step again for the diagnosis; without it the diagnosis is limited to inputs and parameters.
        agree: where several processes train together, whether any of them says so; every process calls it at each step.
        circumstances: called for a capture, gives what a replay has to know about the run.
    """

    def __init__(
        self,
        policy: Policy,
        module: nn.Module,
        *,
        transaction: Transaction | None = None,
        rerun: Rerun | None = None,
        agree: Callable[[bool], bool] | None = None,
        circumstances: Callable[[], Circumstances | None] | None = None,
        incidents: list[Incident] | None = None,
        swaps: list[Swap] | None = None,
    ) -> None:
        self.policy = policy
        self.incidents: list[Incident] = [] if incidents is None else incidents
        self.swaps: list[Swap] = [] if swaps is None else swaps
        self._module = module
        self._transaction = transaction or Transaction(module)
        self._rerun = rerun
        self._agree = agree
        self._archive = Archive(policy, module, circumstances)
        self._watch = UnstableOpsWatch()
        self._stabilize = _stabilizer(policy, self.swaps)
        self._told = len(self.swaps)
        self._window: list[_Attempt] = []
        self._moved: OptimizerSnapshot | None = None
        self._healthy: MicroBatch | None = None
        self._scaler_streak = 0
        self._consecutive = 0
        self._total = 0
        self.dropping = False

    # -- before and during the step

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
        micro = MicroBatch(moment.batch_idx, tuple(args), self._transaction.savepoint(), indices)
        self._window.append(_Attempt(moment, micro, rewind, self._stabilize is not None and self._watch.needed))
        optimizers = list(optimizers)
        if optimizers and self._moved is None and (self.policy.may_continue() or self.policy.stores_weights()):
            self._moved = OptimizerSnapshot(optimizers)

    def stabilizing(self) -> AbstractContextManager[Any]:
        """What the forward pass runs in."""
        return self._stabilize if self._stabilize is not None and self._watch.needed else nullcontext()

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
            self._window[-1].norms = norms(_gradients(parameters))

    # -- the decision

    def judge(self, parameters: Iterable[Tensor], *, scaler: Any = None) -> Ruling:
        """Whether the optimizer may use these gradients.

        Args:
            parameters: those that the optimizer is about to step.
            scaler: the GradScaler that will skip non-finite gradients by itself, if there is one.
        """
        if not self._window:
            return Ruling("proceed")
        if self.dropping:
            return Ruling("skip_step", self.incidents[-1])
        parameters = list(parameters)
        gradients = _gradients(parameters)
        self._window[-1].norms = norms(gradients)
        found = self._find(gradients)
        if scaler is not None and (found is None or found[1] != "loss"):
            found = self._judge_scaler(scaler, found)
        bad = found is not None
        if self._agree is not None:
            bad = self._agree(bad)
        if not bad:
            return Ruling("proceed")
        attempt, trigger = found or (self._window[-1], "gradients")
        return self._rule(attempt, trigger, parameters, elsewhere=found is None)

    def _find(self, gradients: list[Tensor]) -> tuple[_Attempt, Trigger] | None:
        entries: list[tuple[_Attempt, Trigger, Tensor | None]] = []
        for attempt in self._window:
            entries += [(attempt, "loss", attempt.loss), (attempt, "gradients", attempt.norms)]
        present = [(attempt, trigger, _row(value)) for attempt, trigger, value in entries if value is not None]
        if not present:
            return None
        device = present[-1][2].device
        numbers = torch.cat([row.to(device) for _, _, row in present]).tolist()  # the synchronisation
        if all(map(math.isfinite, numbers)):
            return None
        suspects: list[tuple[_Attempt, Trigger]] = []
        for attempt, trigger, row in present:
            mine, numbers = numbers[: row.numel()], numbers[row.numel() :]
            if not all(map(math.isfinite, mine)):
                suspects.append((attempt, trigger))
        if all(trigger == "gradients" for _, trigger in suspects) and all_finite(gradients):
            return None  # only a norm overflowed; the gradients themselves are finite
        return suspects[0]

    def _judge_scaler(self, scaler: Any, found: tuple[_Attempt, Trigger] | None) -> tuple[_Attempt, Trigger] | None:
        """A scaler's own skips are part of its work until there are too many of them, or the scale is spent."""
        if found is None:
            self._scaler_streak = 0
            return None
        self._scaler_streak += 1
        limits = self.policy.scaler
        if self._scaler_streak >= limits.max_consecutive_skips or float(scaler.get_scale()) < limits.min_scale:
            return found[0], "scaler"
        return None

    def _rule(self, attempt: _Attempt, trigger: Trigger, parameters: list[Tensor], *, elsewhere: bool) -> Ruling:
        found = self._diagnose(attempt, trigger, elsewhere)
        moment = attempt.moment
        action = self.policy.action(trigger=trigger, cause=found.cause, step=moment.step)
        action, remark = self._within_budget(action)
        indices = attempt.micro.indices
        incident = Incident(
            step=moment.step,
            epoch=moment.epoch,
            batch_idx=moment.batch_idx,
            rank=moment.rank,
            trigger=trigger,
            origin=found.origin,
            cause=found.cause,
            samples=found.samples,
            dataset_indices=_picked(indices, found.samples),
            verdict=found.verdict,
            advice=found.advice,
            action=_DONE[action],
            detail="; ".join(filter(None, [self._figures(attempt, parameters, elsewhere), remark])),
        )
        incident = self._store(incident, attempt)
        self.incidents.append(incident)
        if action != "record":
            self.restore()
            self.dropping = action != "raise"
        if action != "raise":
            place = incident.origin if incident.origin is not None and incident.origin.file is not None else None
            file, line = (place.file, place.line) if place is not None else ("nanguard", 0)
            warnings.warn_explicit(str(incident), NanGuardWarning, file or "nanguard", line or 0)
        return Ruling(action, incident)

    def _store(self, incident: Incident, attempt: _Attempt) -> Incident:
        """Captures the step from the state before it, and comes back to the state after it."""
        after = self._transaction.savepoint()
        moved = OptimizerSnapshot(self._moved.optimizers) if self._moved is not None else None
        try:
            attempt.micro.before.restore()
            if self._moved is not None:
                self._moved.restore()
            return self._archive.store(incident, attempt.micro, attempt.loss, stabilized=attempt.stabilized)
        finally:
            if moved is not None:
                moved.restore()
            after.restore()
            after.release()

    def _diagnose(self, attempt: _Attempt, trigger: Trigger, elsewhere: bool) -> Diagnosis:
        options = self.policy.diagnosis
        if not options.enabled or trigger == "scaler" or elsewhere:
            return Diagnosis()
        if self._rerun is None:
            return suspects(self._module, attempt.micro.args)
        return diagnose(attempt.micro, self._rerun, healthy=self._healthy, samples=options.samples)

    def _within_budget(self, action: str) -> tuple[Any, str]:
        if action != "skip_step":
            return action, ""
        self._consecutive += 1
        self._total += 1
        budget = self.policy.budget
        for count, limit, kind in (
            (self._consecutive, budget.consecutive, "skips in a row"),
            (self._total, budget.total, "skips in all"),
        ):
            if count > limit:
                return budget.then, f"the policy's budget of {limit} {kind} is spent"
        return action, ""

    def _figures(self, attempt: _Attempt, parameters: list[Tensor], elsewhere: bool) -> str:
        if elsewhere:
            return "another rank reported it; loss and gradients of this rank are finite"
        parts = [] if attempt.loss is None else [f"loss {_number(attempt.loss)}"]
        named = {id(parameter): name for name, parameter in self._module.named_parameters()}
        gradients = [(named.get(id(p), "?"), p.grad) for p in parameters if p.grad is not None]
        bad = nonfinite_names(gradients)
        if bad:
            shown = ", ".join(bad[:3]) + (", ..." if len(bad) > 3 else "")
            parts.append(f"{len(bad)} of {len(gradients)} gradients non-finite ({shown})")
        return ", ".join(parts)

    # -- after the step

    def restore(self) -> None:
        """Puts everything back to before the window's first micro-batch. May be called again after more has happened."""
        first = self._window[0]
        first.micro.before.restore()
        if first.rewind is not None:
            first.rewind.restore()
        if self._moved is not None:
            self._moved.restore()

    def end_window(self) -> None:
        """Forgets the window: its step was taken, or left out for good."""
        if not self.dropping and self._window:
            self._consecutive = 0
            self._healthy = self._window[-1].micro if self._rerun is not None else None
        for attempt in self._window:
            attempt.micro.before.release()
        self._window.clear()
        self._moved = None
        self.dropping = False

    def _tell_swaps(self) -> None:
        for swap in self.swaps[self._told :]:
            self._told += 1
            message = (
                f"{swap.rule}: replaced the unstable `{swap.original}` by its stable form while it runs. "
                f"Write instead: {swap.replacement}"
            )
            warnings.warn_explicit(message, NanGuardWarning, swap.file, swap.line)


def _stabilizer(policy: Policy, swaps: list[Swap]) -> Any:
    if not policy.stabilize.enabled:
        return None
    from nanguard.stabilizer import stabilize

    return stabilize(epsilon=policy.stabilize.epsilon, swaps=swaps)


def _gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _row(value: Tensor) -> Tensor:
    """As a vector of at least single precision: a loss may be of any shape and dtype."""
    return value.reshape(-1).to(torch.promote_types(value.dtype, torch.float32))


def _number(loss: Tensor) -> str:
    return f"{float(_row(loss).sum()):.6g}"


def _picked(indices: tuple[int, ...] | None, samples: tuple[int, ...] | None) -> tuple[int, ...] | None:
    if indices is None or samples is None or max(samples, default=-1) >= len(indices):
        return None
    return tuple(indices[position] for position in samples)
