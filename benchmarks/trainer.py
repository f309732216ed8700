"""Short fits in a Lightning Trainer, timed from the end of one batch to the end of the next."""

from __future__ import annotations

import logging
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from models import Case
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nanguard import NanGuard

__all__ = ["milliseconds"]


class Training(pl.LightningModule):
    """Trains the model of a case."""

    def __init__(self, case: Case, model: nn.Module) -> None:
        super().__init__()
        self.case = case
        self.model = model

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The loss."""
        return self.case.loss(self.model, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The same optimizer as in the plain loop."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Clock(Callback):
    """Notes when each batch ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Notes the time."""
        self.ends.append(time.perf_counter())


def milliseconds(
    case: Case, model: nn.Module, batch: tuple[Tensor, Tensor], steps: int, *, guarded: bool
) -> list[float]:
    """Milliseconds of each step but the first, of one fit."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    clock = Clock()
    trainer = pl.Trainer(
        max_steps=steps,
        max_epochs=1,
        accelerator="cpu",
        callbacks=[NanGuard(), clock] if guarded else [clock],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    trainer.fit(Training(case, model), DataLoader([batch] * steps, batch_size=None))
    return [(after - before) * 1e3 for before, after in zip(clock.ends, clock.ends[1:], strict=False)]
