"""The validation loop of a Trainer under watch: how its events reach the watch. Imports no lightning."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, final

from nanguard.archive import Circumstances
from nanguard.diagnosis import MicroBatch
from nanguard.incident import Incident
from nanguard.lead_up import LeadUp
from nanguard.policy import Policy
from nanguard.sampling import indices_in_order
from nanguard.trainer_state import (
    IGNORED,
    gives_iterators,
    moment_of,
    peers_of,
    quiet,
    validated_values,
    validation_loader,
)
from nanguard.validation import ValidationWatch

__all__ = ["ValidationLoop"]


@final
class ValidationLoop:
    """The validation loop of one `fit`.

    Args:
        policy: what to do.
        trainer: a Lightning Trainer that is about to fit.
        module: its LightningModule.
        incidents: filled while the run goes on.
        circumstances: called for a capture, gives what a replay has to know about the run, or `None` where there can be none.
        lead_up: gives the steps of the training up to a validation after so many of them.
    """

    def __init__(
        self,
        policy: Policy,
        trainer: Any,
        module: Any,
        incidents: list[Incident],
        circumstances: Callable[[], Circumstances | None],
        lead_up: Callable[[int], LeadUp],
    ) -> None:
        self._trainer = trainer
        self._module = module
        peers = peers_of(trainer) if trainer.world_size > 1 else None
        self._watch = ValidationWatch(
            policy,
            module,
            circumstances,
            incidents,
            peers=peers,
            ignored=IGNORED,
            surroundings=self._quiet if peers is None else None,
            lead_up=lead_up,
        )

    def begin(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Before a validation step."""
        if not gives_iterators(self._trainer.fit_loop.epoch_loop.val_loop):
            taken = len(inspect.signature(self._module.validation_step).parameters)
            self._watch.begin((batch, batch_idx, dataloader_idx)[:taken])

    def end(self, output: Any, batch_idx: int, dataloader_idx: int) -> None:
        """After a validation step."""
        trainer = self._trainer
        trainer.should_stop |= self._watch.end(
            moment_of(trainer, batch_idx),
            output,
            validated_values(trainer),
            place=f" of loader {dataloader_idx}" if dataloader_idx else "",
            indices=lambda: indices_in_order(validation_loader(trainer, dataloader_idx), batch_idx),
        )

    def finish(self) -> None:
        """After the last validation step."""
        self._trainer.should_stop |= self._watch.finish(moment_of(self._trainer, 0))

    @contextmanager
    def _quiet(self, micro: MicroBatch) -> Iterator[None]:
        with quiet(self._trainer, self._module, "validation_step"), self._trainer.precision_plugin.val_step_context():
            yield
