"""One `fit` under the guard: what is wrapped for it, and how the events of a step reach the guard. Imports no lightning."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, final

import torch
from torch import Tensor

from nanguard.archive import Circumstances
from nanguard.diagnosis import Rerun
from nanguard.errors import NanGuardError, NonFiniteError
from nanguard.guard import Guard, Moment
from nanguard.incident import Incident, Swap
from nanguard.patches import Patches
from nanguard.policy import Policy
from nanguard.rng import RngState
from nanguard.sampling import IndexRecorder, base_indices
from nanguard.trainer_state import IGNORED, hold_schedulers, quiet, save_progress, save_results
from nanguard.transaction import Transaction
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

    Raises:
        NanGuardError: where the strategy is one that a guard cannot work with.
    """

    def __init__(
        self, policy: Policy, trainer: Any, module: Any, *, incidents: list[Incident], swaps: list[Swap]
    ) -> None:
        _refuse_engines(trainer)
        self._trainer = trainer
        self._module = module
        self._policy = policy
        self._patches = Patches()
        self._held = Patches()
        self._progress: Undo | None = None
        self._recorder: IndexRecorder | None = None
        self._dataset: Any = None
        self._fetches: deque[RngState] = deque()
        self._judged = False
        self._streaming = False
        self.guard = self._make_guard(incidents, swaps)
        self._wrap()

    def _make_guard(self, incidents: list[Incident], swaps: list[Swap]) -> Guard:
        trainer, module = self._trainer, self._module
        transaction = Transaction(module, ignored=IGNORED, participants=[lambda: save_results(trainer)])
        alone = trainer.world_size == 1
        rerun = None
        if alone and module.automatic_optimization:
            rerun = Rerun(module, transaction, self._step, lambda: quiet(trainer, module, self._surroundings))
        return Guard(
            self._policy,
            module,
            transaction=transaction,
            rerun=rerun,
            agree=None if alone else lambda bad: trainer.strategy.reduce_boolean_decision(bad, all=False),
            circumstances=self._circumstances,
            incidents=incidents,
            swaps=swaps,
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

    def close(self) -> None:
        """Takes everything away again. Does nothing the second time."""
        self._held.undo()
        self._patches.undo()

    @contextmanager
    def _surroundings(self) -> Iterator[None]:
        with self._plain_context(), self.guard.stabilizing():
            yield

    def _optimizer_step(self, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any) -> Any:
        name = self._module._current_fx_name
        try:
            return self._plain_step(optimizer, model=model, closure=closure, **kwargs)
        except SkipStep:
            self._module._current_fx_name = name
            self._left_out(optimizer)
            return None

    def _processing(self, plain: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def process(loader: Any) -> Any:
            loader = plain(loader)
            if self._trainer.training:
                self._record_indices(loader)
            return loader

        return process

    def _record_indices(self, loader: Any) -> None:
        if self._dataset is not None:  # several loaders: an index would not say into which dataset
            self._recorder = None
            return
        self._dataset = getattr(loader, "dataset", None)
        self._recorder = IndexRecorder.install(loader, self._patches, self._before_fetch)

    def _before_fetch(self) -> None:
        self.settle()
        if self._policy.may_continue():
            self._fetches.append(RngState.save())

    # -- one batch

    def begin(self, batch: Any, batch_idx: int) -> None:
        """Before the training step."""
        self.settle()
        trainer = self._trainer
        self._judged = False
        self._streaming = _gives_iterators(trainer)
        args: tuple[Any, ...] = ()
        if not self._streaming:
            args = tuple(trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), batch, batch_idx).values())
        indices = self._recorder.next_indices() if self._recorder is not None else None
        self._progress = save_progress(trainer) if self._policy.hold_global_step else None
        self.guard.begin(
            Moment(trainer.global_step, trainer.current_epoch, batch_idx, trainer.global_rank),
            args,
            indices=base_indices(self._dataset, indices),
            rewind=self._fetches.popleft() if self._fetches else None,
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
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        ruling = self.guard.judge(parameters, scaler=getattr(self._trainer.precision_plugin, "scaler", None))
        if ruling.action == "raise" and ruling.incident is not None:
            raise NonFiniteError(ruling.incident)
        if ruling.action in ("skip_step", "stop"):
            self._trainer.should_stop |= ruling.action == "stop"
            raise SkipStep

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
        if not self._judged:
            return
        if not self.guard.dropping:
            self.guard.end_window()
        elif self._progress is not None:
            self._progress()

    def settle(self) -> None:
        """Ends a skip: undoes what hooks did with the batch after it had been left out."""
        if self.guard.dropping:
            self.guard.restore()
            self.guard.end_window()
            self._held.undo()

    # -- a second run of the step

    def _step(self, *args: Any) -> Any:
        output = self._module.training_step(*args)
        loss = output.get("loss") if isinstance(output, dict) else output
        return loss / self._trainer.accumulate_grad_batches if isinstance(loss, Tensor) else None

    def _circumstances(self) -> Circumstances | None:
        if self._streaming:
            return None
        trainer, plugin = self._trainer, self._trainer.precision_plugin
        scaler = getattr(plugin, "scaler", None)
        return Circumstances(
            optimizers=tuple(trainer.optimizers),
            precision=_autocast(plugin.forward_context),
            scale=float(scaler.get_scale()) if scaler is not None else None,
            accumulate=trainer.accumulate_grad_batches,
            hparams=dict(self._module.hparams),
            trainer={"max_epochs": trainer.max_epochs, "max_steps": trainer.max_steps},
        )


def _refuse_engines(trainer: Any) -> None:
    name = type(trainer.strategy).__name__
    if "DeepSpeed" in name:
        raise NanGuardError(
            f"NanGuard: found the strategy {name}, whose engine steps the optimizer by itself; expected one that steps through "
            "Lightning (DDP, FSDP, a single device). Remove the callback, or use FSDP"
        )


def _gives_iterators(trainer: Any) -> bool:
    return type(trainer.fit_loop._data_fetcher).__name__ == "_DataLoaderIterDataFetcher"


def _autocast(context: Callable[[], AbstractContextManager[Any]]) -> dict[str, str] | None:
    """What autocast the precision plugin enters, read off from inside it."""
    with context():
        for device in ("cuda", "cpu"):
            if torch.is_autocast_enabled(device):
                dtype = str(torch.get_autocast_dtype(device)).removeprefix("torch.")
                return {"autocast_device": device, "autocast_dtype": dtype}
    return None
