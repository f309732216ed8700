"""Gradients that the user's own hooks make non-finite, once the backward pass has given them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trainers import assert_same, fit, policy


class Normalised(pl.LightningModule):
    """Brings gradients to length 1, and meets one that is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.calls: list[int] = []

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.layer(batch).square().mean() * (batch_idx != 1)


def _to_length_one(parameter: Tensor) -> None:
    if parameter.grad is not None:
        parameter.grad /= parameter.grad.norm()


class InAHook(Normalised):
    def on_after_backward(self) -> None:
        self.calls.append(len(self.calls))
        for parameter in self.parameters():
            _to_length_one(parameter)


class WhenAccumulated(Normalised):
    def __init__(self) -> None:
        super().__init__()
        for parameter in self.parameters():
            parameter.register_post_accumulate_grad_hook(_to_length_one)


class InItsOwnBackward(Normalised):
    def backward(self, loss: Tensor) -> None:
        loss.backward()
        with torch.no_grad():
            for parameter in self.parameters():
                _to_length_one(parameter)


@pytest.mark.parametrize("make", [InAHook, WhenAccumulated, InItsOwnBackward])
def test_gradients_that_a_hook_changes(tmp_path: Path, make: Any) -> None:
    data = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    runs = []
    for enabled in (True, False):
        guard = policy(tmp_path, capture={"enabled": False}, diagnosis={"enabled": enabled})
        runs.append(fit(tmp_path, make, DataLoader(data, batch_size=4), guard))
    assert_same(*runs)
    assert runs[0].model.calls == runs[1].model.calls
    incident = runs[0].incidents[0]
    origin = incident.origin
    assert origin is not None
    assert (incident.trigger, incident.cause, incident.verdict) == ("gradients", "division_by_zero", "reproduced")
    assert (origin.op, origin.phase, origin.code) == ("aten.div", "backward", "parameter.grad /= parameter.grad.norm()")
    assert (incident.batch_idx, incident.samples) == (1, (0, 1, 2, 3))
