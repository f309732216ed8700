"""Which samples are at fault where no batch is known to be well, and where the kernel depends on the size of the batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trainers import fit, policy

import nanguard
from nanguard.incident import Incident

CULPRITS = (1, 3)


class Gated(pl.LightningModule):
    """Does something else to samples whose flag is set."""

    def __init__(self, gate: Callable[[Gated, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.expert = nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.tensor(200.0))
        self.gru = nn.GRU(2, 2, batch_first=True)
        self.gate = gate
        with torch.no_grad():
            self.expert.weight[0, 0] = float("nan")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.gate(self, self.body(batch[0]), batch[1]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def constant(module: Gated, h: Tensor, flag: Tensor) -> Tensor:
    return h + torch.where(flag, torch.ones_like(h) / 0, torch.zeros_like(h)).detach()


def scale(module: Gated, h: Tensor, flag: Tensor) -> Tensor:
    return torch.where(flag, h * module.scale.exp().detach(), h)


def expert(module: Gated, h: Tensor, flag: Tensor) -> Tensor:
    rows = flag.squeeze(1)
    if not rows.any():
        return h
    return h.index_put((rows,), module.expert(h[rows]))


def everyone(module: Gated, h: Tensor, flag: Tensor) -> Tensor:
    return module.expert(h)


def recurrent(module: Gated, h: Tensor, flag: Tensor) -> Tensor:
    # One row goes to another matrix product than several do.
    steps = h.clamp(-3, 3)[:, None].expand(-1, 3, -1).masked_fill(flag[:, None], float("-inf"))
    return module.gru(steps)[0]


def incident_of(tmp: Path, make: Callable[[], Any], size: int) -> Incident:
    generator = torch.Generator().manual_seed(4)
    data = [(torch.randn(2, generator=generator), torch.tensor([index in CULPRITS])) for index in range(size)]
    run = fit(tmp, make, DataLoader(data, batch_size=size), policy(tmp, capture={"directory": tmp / "captures"}))
    assert len(run.incidents) == 1, run.incidents
    return run.incidents[0]


@pytest.mark.parametrize("size", [4, 12])
@pytest.mark.parametrize(
    ("gate", "cause", "samples"),
    [
        (constant, "division_by_zero", CULPRITS),
        (scale, "overflow", CULPRITS),
        (expert, "parameters", CULPRITS),
        (everyone, "parameters", None),
        (recurrent, "invalid_domain", CULPRITS),
    ],
)
def test_the_first_batch_of_a_run_fails_by_some_of_its_samples(
    tmp_path: Path, gate: Callable[..., Tensor], cause: str, samples: tuple[int, ...] | None, size: int
) -> None:
    incident = incident_of(tmp_path, lambda: Gated(gate), size)
    assert (incident.cause, incident.samples) == (cause, samples)
    assert ("No sample is at fault" in incident.advice) == (samples is None and cause != "parameters")
    replayed = nanguard.replay(nanguard.load_capture(incident.capture), Gated(gate))
    assert replayed.reproduced
    assert replayed.incident.samples == samples


def differences() -> nn.Linear:
    """A layer that makes inf - inf of infinities, whatever the seed."""
    layer = nn.Linear(2, 2)
    nn.init.constant_(layer.weight, 1.0)
    with torch.no_grad():
        layer.weight[:, 1] = -1.0
    return layer


@pytest.mark.parametrize("layer", [differences(), nn.LayerNorm(2)], ids=["linear", "norm"])
def test_the_logsumexp_of_a_masked_row_that_a_layer_makes_nan(tmp_path: Path, layer: nn.Module) -> None:
    def pooled(module: Gated, h: Tensor, flag: Tensor) -> Tensor:
        energy = h.masked_fill(flag, float("-inf")).logsumexp(1, keepdim=True)
        return module.layer(h + energy)

    class Pooling(Gated):
        def __init__(self) -> None:
            super().__init__(pooled)
            self.layer = copy.deepcopy(layer)

    incident = incident_of(tmp_path, Pooling, 12)
    assert (incident.cause, incident.samples, incident.origin.module) == ("fully_masked", CULPRITS, "layer")
    assert "logsumexp is -inf" in incident.advice
