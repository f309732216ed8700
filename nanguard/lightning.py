"""The `NanGuard` callback: translates a Lightning Trainer to the guard and back. The only module that imports lightning."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional, Union, final

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, Callback, LearningRateFinder
from torch import Tensor

from nanguard.errors import NanGuardError
from nanguard.incident import Advice, Incident, Swap
from nanguard.policy import Policy, load_policy, with_overrides
from nanguard.session import Session

__all__ = ["NanGuard"]


@final
class NanGuard(Callback):
    """Guards the `fit` of a Trainer: stabilises the loss, catches non-finite steps before they do damage, captures them.

    Args:
        policy: a path of a YAML file, a `Policy`, or `None` for the default policy, which captures and raises.
        action: one action for every incident (``raise``, ``skip_step``, ``record``, ``stop``), in place of the rules.
        captures: directory of the captures, in place of the policy's.
        stabilize: whether unstable computations are replaced, in place of what the policy says.

    Attributes:
        incidents: the `Incident` records so far, in order.
        swaps: the `Swap` records so far: unstable computations that were replaced.
        advice: the `Advice` records so far: computations that were left as they are, but should be written otherwise.
        policy: the effective `Policy`.

    Raises:
        PolicyError: where the policy cannot be used.
        NonFiniteError: out of ``Trainer.fit``, where a step is non-finite and the policy says to raise.
    """

    def __init__(
        self,
        policy: Union[str, Path, Policy, None] = None,  # noqa: UP007 - LightningCLI reads these annotations
        *,
        action: Optional[str] = None,  # noqa: UP045
        captures: Union[str, Path, None] = None,  # noqa: UP007
        stabilize: Optional[bool] = None,  # noqa: UP045
    ) -> None:
        if policy is None:
            policy = Policy()
        elif not isinstance(policy, Policy):
            policy = load_policy(policy)
        self.policy = with_overrides(policy, action=action, captures=captures, stabilize=stabilize)
        self.incidents: list[Incident] = []
        self.swaps: list[Swap] = []
        self.advice: list[Advice] = []
        self.from_environment = False
        self._session: Session | None = None
        self._trainer: Any = None
        self._found: list[Callback] = []
        self._ordered: list[Callback] = []

    def __getstate__(self) -> dict[str, Any]:
        # Lightning hangs the module's `log` and `log_dict` on each callback; with them a copy would hold the whole module.
        own = {name: value for name, value in self.__dict__.items() if name not in ("log", "log_dict")}
        return {**own, "_session": None, "_trainer": None, "_found": [], "_ordered": []}

    # -- the beginning and the end: whatever is put in place here is taken away in `teardown` and `on_exception`

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Takes the first place among the callbacks and wraps the step."""
        if stage != "fit":
            return
        self._close()
        others = [callback for callback in trainer.callbacks if isinstance(callback, NanGuard) and callback is not self]
        if self.from_environment and others:
            trainer.callbacks = [callback for callback in trainer.callbacks if callback is not self]
            return
        if any(other._session is not None for other in others):
            raise NanGuardError(
                "the Trainer's callbacks hold more than one NanGuard; expected one. Remove the others, or merge their policies"
            )
        self._session = Session(
            self.policy, trainer, pl_module, incidents=self.incidents, swaps=self.swaps, advice=self.advice
        )
        self._trainer, self._found, self._ordered = trainer, trainer.callbacks, _first(trainer.callbacks, self)
        trainer.callbacks = self._ordered

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves the Trainer, the module and torch as they were found."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """The same after an exception, where Lightning calls no `teardown`."""
        self._close()

    def _close(self) -> None:
        session, self._session = self._session, None
        if session is None:
            return
        session.close()
        trainer, self._trainer = self._trainer, None
        if trainer.callbacks is self._ordered:
            trainer.callbacks = self._found
        elif self in trainer.callbacks:
            # Somebody else changed the list meanwhile: only the guard goes back to its place.
            others = [callback for callback in trainer.callbacks if callback is not self]
            others.insert(self._found.index(self), self)
            trainer.callbacks = others
        self._found, self._ordered = [], []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds the modules that the policy watches, which all exist now."""
        if self._session is not None:
            self._session.guard.start()

    # -- one batch

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Saves the state before the step."""
        if self._session is not None:
            self._session.begin(batch, batch_idx)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Takes note of the loss."""
        if self._session is not None:
            self._session.guard.saw_loss(loss)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes note of the gradients of a micro-batch that no optimizer step follows."""
        if self._session is not None:
            self._session.after_backward()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Decides, before clipping and before the update."""
        if self._session is not None:
            self._session.judge(optimizer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Closes the step."""
        if self._session is not None:
            self._session.end_batch()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finishes a skip: what follows must find everything as if the batch had never been."""
        if self._session is not None:
            self._session.settle()

    # -- validation

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Saves the state before the step, where the policy watches the validation."""
        if self._session is not None and self._session.validation is not None:
            self._session.validation.begin(batch, batch_idx, dataloader_idx)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Looks at what the step gave."""
        if self._session is not None and self._session.validation is not None:
            self._session.validation.end(outputs, batch_idx, dataloader_idx)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Processes that validate together decide together."""
        if self._session is not None and self._session.validation is not None:
            self._session.validation.finish()


def _first(callbacks: list[Callback], guard: Callback) -> list[Callback]:
    """A new list with the guard before all others but the tuners, which run a fit of their own."""
    others = [callback for callback in callbacks if callback is not guard]
    tuners = sum(isinstance(callback, (BatchSizeFinder, LearningRateFinder)) for callback in others)
    return [*others[:tuners], guard, *others[tuners:]]
