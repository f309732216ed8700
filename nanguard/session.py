"""One `fit` under the guard: what is wrapped for it, and how the events of a step reach the guard. Imports no lightning."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor

from nanguard.archive import Circumstances
from nanguard.diagnosis import MicroBatch, Rerun
from nanguard.errors import NanGuardWarning, NonFiniteError
from nanguard.guard import Guard
from nanguard.incident import Advice, Incident, Swap
from nanguard.moving import MovingParameters
from nanguard.patches import Patches
from nanguard.policy import Policy
from nanguard.rng import RngState
from nanguard.sampling import SampleRecord
from nanguard.source import is_users_hook
from nanguard.strays import StrayGradients
from nanguard.through_trainer import undisturbed
from nanguard.trainer_state import (
    IGNORED,
    changes_before_step,
    circumstances,
    gives_iterators,
    hold_schedulers,
    loss_of_step,
    moment_of,
    peers_of,
    quiet,
    refuse_engines,
    save_manual,
    save_progress,
    save_results,
)
from nanguard.transaction import Transaction
from nanguard.validating import ValidationLoop
from nanguard.values import Undo

__all__ = ["Session", "SkipStep"]


class SkipStep(Exception):
    """Raised between the backward pass and the optimizer, and caught around the optimizer's step."""


@final
class Session:
    """One `fit`: the guard, and all that was put in place for it.

    Args:
        policy: what to do.
        trainer: a Lightning Trainer that is about to fit.
        module: its LightningModule.
        incidents: filled while the run goes on.
        swaps: filled while the run goes on.
        advice: filled while the run goes on.

    Raises:
        NanGuardError: where the strategy is one that a guard cannot work with.
    """

    def __init__(
        self,
        policy: Policy,
        trainer: Any,
        module: Any,
        *,
        incidents: list[Incident],
        swaps: list[Swap],
        advice: list[Advice],
    ) -> None:
        refuse_engines(trainer)
        self._trainer = trainer
        self._module = module
        self._policy = policy
        self._patches = Patches()
        self._held = Patches()
        self._progress: Undo | None = None
        self._samples = SampleRecord(self._before_fetch)
        self._handles: list[Any] = []
        self._inside = False
        self._judged = False
        self._called = False
        self._streaming = False
        self._arguments = 0
        self._step_before = 0
        self._warned = False
        self._own_start = changes_before_step(trainer, module)
        self.guard = self._make_guard(incidents, swaps, advice)
        self.validation: ValidationLoop | None = None
        if policy.watch.validation:
            lead_up = self.guard.lead_up_to_validation
            self.validation = ValidationLoop(policy, trainer, module, incidents, self._circumstances, lead_up)
        self._wrap()

    def _make_guard(self, incidents: list[Incident], swaps: list[Swap], advice: list[Advice]) -> Guard:
        trainer, module = self._trainer, self._module
        strays = StrayGradients(module, lambda: trainer.optimizers)
        participants = [lambda: save_results(trainer), strays.save]
        if not module.automatic_optimization:
            participants.append(lambda: save_manual(trainer))
        transaction = Transaction(module, ignored=IGNORED, participants=participants, moving=MovingParameters(module))
        peers = peers_of(trainer) if trainer.world_size > 1 else None
        rerun = None
        # Under DDP each process holds the whole model; where it is sharded, one process cannot run it alone.
        alone = peers is None or type(trainer.strategy).__name__ == "DDPStrategy"
        if alone and module.automatic_optimization:
            rerun = Rerun(
                module,
                transaction,
                self._step,
                self._again,
                lambda: quiet(trainer, module),
                lambda: trainer.optimizers,
                backward=module.backward if is_users_hook(module, "backward") else None,
                after_backward=module.on_after_backward if is_users_hook(module, "on_after_backward") else None,
                aside=lambda: undisturbed(trainer),
            )
        return Guard(
            self._policy,
            module,
            transaction=transaction,
            rerun=rerun,
            peers=peers,
            provenance=self._samples,
            circumstances=self._circumstances,
            incidents=incidents,
            swaps=swaps,
            advice=advice,
        )

    # -- wrapping

    def _wrap(self) -> None:
        plugin = self._trainer.precision_plugin
        self._plain_context = plugin.train_step_context
        self._plain_step = plugin.optimizer_step
        self._patches.set(plugin, "train_step_context", self._surroundings)
        self._patches.set(plugin, "optimizer_step", self._optimizer_step)
        strategy = self._trainer.strategy
        self._patches.set(strategy, "process_dataloader", self._processing(strategy.process_dataloader))
        # Validation draws a seed and switches to `eval` before its first hook: that is too late to put anything back.
        validation = self._trainer.fit_loop.epoch_loop.val_loop
        self._patches.set(validation, "run", self._settled(validation.run))

    def close(self) -> None:
        """Takes everything away again. Does nothing the second time."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._held.undo()
        self.guard.close()
        self._samples.close()
        self._patches.undo()

    @contextmanager
    def _surroundings(self) -> Iterator[None]:
        if self._called:  # LBFGS runs the step several times
            self.guard.starts_again()
        elif self._own_start:
            self.guard.starts_here()
        self._called = True
        with self._plain_context(), self.guard.stabilizing():
            yield

    @contextmanager
    def _again(self, micro: MicroBatch) -> Iterator[None]:
        with self._plain_context(), self.guard.stabilizing(micro):
            yield

    def _optimizer_step(self, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any) -> Any:
        name, self._inside = self._module._current_fx_name, True
        try:
            return self._plain_step(optimizer, model=model, closure=closure, **kwargs)
        except SkipStep:
            self._module._current_fx_name = name
            self._left_out(optimizer)
            return None
        finally:
            self._inside = False

    def _settled(self, plain: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            if self.guard.pending:  # validation in the middle of an accumulation window: judge what there is of it
                self._decide(list(self._module.parameters()))
            self.settle()
            return plain()

        return run

    def _stepped_past_lightning(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Before a step in manual optimization that evades Lightning's hooks, as `opt.optimizer.step()` does."""
        if not self._inside and not self._decide(_parameters(optimizer), optimizer):
            optimizer.zero_grad(set_to_none=True)  # without gradients a step changes nothing

    def _processing(self, plain: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def process(loader: Any) -> Any:
            loader = plain(loader)
            if self._trainer.training:
                self._samples.watch(loader)
            return loader

        return process

    def _before_fetch(self) -> RngState | None:
        if self._streaming:  # the step fetches for itself
            return None
        self.settle()
        return RngState.save() if self._policy.may_continue() else None

    # -- one batch

    def begin(self, batch: Any, batch_idx: int) -> None:
        """Before the training step."""
        self.settle()
        trainer = self._trainer
        self._judged = self._called = False
        self._step_before = trainer.global_step
        self._own_start = changes_before_step(trainer, self._module)
        self._streaming = gives_iterators(trainer.fit_loop)
        if not self._handles and not self._module.automatic_optimization:
            self._handles = [o.register_step_pre_hook(self._stepped_past_lightning) for o in trainer.optimizers]
        args: tuple[Any, ...] = ()
        indices = rewind = None
        if not self._streaming:
            if not self._arguments:  # Lightning inspects the signature, at some expense
                self._arguments = len(trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), batch, batch_idx))
            args = (batch, batch_idx)[: self._arguments]
            indices, rewind = self._samples.next_batch()
        self._progress = save_progress(trainer) if self._policy.hold_global_step else None
        self.guard.begin(
            moment_of(trainer, batch_idx),
            args,
            indices=indices,
            rewind=rewind,
            optimizers=trainer.optimizers if self._moves_early() else (),
        )

    def _moves_early(self) -> bool:
        """Whether parameters may have moved before the last decision about a step."""
        return not self._module.automatic_optimization or any(
            isinstance(optimizer, torch.optim.LBFGS) for optimizer in self._trainer.optimizers
        )

    def after_backward(self) -> None:
        """After the backward pass of one micro-batch."""
        if self._module.automatic_optimization and self._trainer.fit_loop._should_accumulate():
            self.guard.saw_gradients(self._module.parameters())

    def judge(self, optimizer: torch.optim.Optimizer) -> None:
        """Before the optimizer uses the gradients."""
        self._judged = True
        if not self._decide(_parameters(optimizer), optimizer):
            raise SkipStep

    def _decide(self, parameters: list[Tensor], optimizer: Any = None) -> bool:
        """Whether the gradients of these parameters may be used."""
        scaler = getattr(self._trainer.precision_plugin, "scaler", None)
        ruling = self.guard.judge(parameters, scaler=scaler, optimizer=optimizer)
        if ruling.action == "raise" and ruling.incident is not None:
            raise NonFiniteError(ruling.incident)
        self._trainer.should_stop |= ruling.action == "stop"
        return ruling.action not in ("skip_step", "stop")

    def _left_out(self, optimizer: Any) -> None:
        """The optimizer did not step: what follows it must not happen either."""
        optimizer.zero_grad()
        scaler = getattr(self._trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            # Forget that the gradients were unscaled, and keep the scale: to the scaler, too, the step never was.
            scaler.update(scaler.get_scale())
        self._held.undo()
        hold_schedulers(self._trainer, self._held)

    def end_batch(self) -> None:
        """After the training step and the optimizer."""
        if self.guard.dropping and not self._module.automatic_optimization:
            self._judged = True  # the step went past Lightning
        if self.guard.forward_only:  # as when StochasticWeightAveraging gathers the statistics of BatchNorm
            self._judged = True
            self._decide([])
        if not self._judged:
            if self._trainer.global_step > self._step_before and not self._warned:
                self._warned = True
                warnings.warn(
                    _UNASKED.format(type(self._trainer.precision_plugin).__name__), NanGuardWarning, stacklevel=2
                )
            return
        if not self.guard.dropping:
            self.guard.end_window()
        elif self._progress is not None:
            self._progress()

    def settle(self) -> None:
        """Ends a skip: undoes what hooks did with the batch after it had been left out."""
        if self.guard.dropping:
            self.guard.restore()
            if self._judged:  # otherwise the rest of the accumulation window is left out, too
                self.guard.end_window()
                self._held.undo()

    # -- a second run of the step

    def _step(self, *args: Any) -> Any:
        return loss_of_step(self._trainer, self._module, args)

    def _circumstances(self) -> Circumstances | None:
        return None if self._streaming else circumstances(self._trainer, self._module)


_UNASKED = (
    "{} lets the optimizer step without Lightning's `on_before_optimizer_step`, so NanGuard is never asked and cannot protect "
    "this run. Call the hook between the closure and the update, as `Precision.optimizer_step` does through `_wrap_closure`"
)


def _parameters(optimizer: Any) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
