"""A step that is run again for a diagnosis counts nowhere, and takes nothing from anybody."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from trainers import assert_same, fit, policy

import nanguard

CALLS = [0]
LEVEL = 0.0


def _raised() -> float:
    global LEVEL
    LEVEL += 0.25
    return LEVEL


def _other(count: int = 64) -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(count, 4)), batch_size=4, shuffle=True)


class Counting(pl.LightningModule):
    """The second batch holds a 0; how much each step counts for depends on what was counted before."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.prepare()

    def prepare(self) -> None: ...

    def weight(self) -> Any:
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x,) = batch
        loss = self.layer(x).square().mean() * self.weight()
        return loss + x[:, 0].abs().log().mean() * self.layer.bias.sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class InAGlobal(Counting):
    def prepare(self) -> None:
        global LEVEL
        LEVEL, CALLS[0] = 0.0, 0

    def weight(self) -> Any:
        CALLS[0] += 1
        return CALLS[0] + _raised()


def in_a_closure() -> Counting:
    calls = {"number": 0}
    level = 0

    class InAClosure(Counting):
        def weight(self) -> Any:
            nonlocal level
            level += 2
            calls["number"] += 1
            return calls["number"] + level

    return InAClosure()


class InItsClass(Counting):
    number = 0

    def prepare(self) -> None:
        type(self).number = 0

    def weight(self) -> Any:
        type(self).number += 1
        return self.number


class InTheEnvironment(Counting):
    def prepare(self) -> None:
        os.environ["NANGUARD_TEST_CALLS"] = "0"

    def weight(self) -> Any:
        os.environ["NANGUARD_TEST_CALLS"] = number = str(int(os.environ["NANGUARD_TEST_CALLS"]) + 1)
        return int(number)


class FromACycle(Counting):
    def prepare(self) -> None:
        self.weights = {"cycle": itertools.cycle([1.0, 2.0, 3.0]), "list": iter([1.0] * 9)}

    def weight(self) -> Any:
        return next(self.weights["cycle"]) * next(self.weights["list"])


class FromAGenerator(Counting):
    def prepare(self) -> None:
        self.weights = (float(k) for k in range(1, 100))

    def weight(self) -> Any:
        return next(self.weights)


class FromAnotherLoader(Counting):
    def on_train_start(self) -> None:
        self.others = iter(_other())

    def weight(self) -> Any:
        return self.layer(next(self.others)[0]).square().mean()


AGAIN = [InAGlobal, in_a_closure, InItsClass, InTheEnvironment, FromACycle]
NEVER = [FromAGenerator, FromAnotherLoader]


@pytest.mark.parametrize("make", [*AGAIN, *NEVER])
def test_the_run_goes_on_as_if_nobody_had_looked(tmp_path: Path, make: Any) -> None:
    data = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    data[6, 0] = 0.0
    runs = []
    for enabled in (True, False):
        guard = policy(tmp_path, "skip_step", capture={"enabled": False}, diagnosis={"enabled": enabled})
        runs.append(fit(tmp_path, make, DataLoader(TensorDataset(data), batch_size=4), guard))
    assert_same(*runs)
    (incident,) = runs[0].incidents
    assert incident.batch_idx == 1
    if make in NEVER:
        assert incident.verdict == "not_replayed"
        assert "NotRewound" in incident.advice
    else:
        assert (incident.cause, incident.samples, incident.verdict) == ("log_of_zero", (2,), "reproduced")


# -- what a step reaches through its Trainer


class Reaching(Counting):
    def weight(self) -> Any:
        return 1.0


class SetsTheLearningRate(Reaching):
    def weight(self) -> Any:
        for group in self.optimizers().param_groups:
            group["lr"] *= 0.9
        return 1.0


class StepsItsSchedule(Reaching):
    def weight(self) -> Any:
        self.lr_schedulers().step()
        return 1.0

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


class ClearsGradients(Reaching):
    """As after an attack on its own inputs."""

    def weight(self) -> Any:
        x = torch.ones(2, 4, requires_grad=True)
        self.layer(x).sum().backward()
        self.zero_grad()
        return 1.0 + x.grad.sum()


class ReadsGradients(Reaching):
    """As where losses are weighted by the gradients of the step before."""

    def weight(self) -> Any:
        return self.layer.weight.grad.norm().clamp(0.5, 2.0) if self.global_step == 1 else 1.0


class Weighs(TensorDataset):
    def __init__(self, *tensors: Tensor) -> None:
        super().__init__(*tensors)
        self.weights = [1.0]


class WritesIntoItsData(Reaching):
    def weight(self) -> Any:
        weights = self.trainer.train_dataloader.dataset.weights
        weights.append(weights[-1] + 1)
        return weights[-1]


class StopsOnSmallBatches(Reaching):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.trainer.should_stop |= len(batch[0]) < 4
        return super().training_step(batch, batch_idx)


class TellsItsLogger(Reaching):
    def weight(self) -> Any:
        assert isinstance(self.logger, CSVLogger)
        assert self.logger.version == 0
        self.logger.experiment.log_metrics({"x": 1.0}, self.global_step)
        self.logger.log_metrics({"y": 1.0}, step=self.global_step)
        return 1.0


REACHING = [
    SetsTheLearningRate,
    StepsItsSchedule,
    ClearsGradients,
    ReadsGradients,
    WritesIntoItsData,
    StopsOnSmallBatches,
    TellsItsLogger,
]


@pytest.mark.parametrize("make", REACHING)
@pytest.mark.parametrize("action", ["skip_step", "record"])
def test_what_a_step_reaches_through_its_trainer_stays(tmp_path: Path, make: Any, action: str) -> None:
    data = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    data[6, 0] = 0.0
    runs, told = [], []
    for enabled in (True, False):
        guard = policy(tmp_path, action, capture={"enabled": False}, diagnosis={"enabled": enabled})
        logger = CSVLogger(tmp_path / str(enabled), version=0)
        loader = DataLoader(Weighs(data), batch_size=4)
        runs.append(fit(tmp_path, make, loader, guard, logger=logger, max_epochs=2))
        told.append([path.read_text() for path in tmp_path.glob(f"{enabled}/**/metrics.csv")])
    assert_same(*runs)
    assert told[0] == told[1]
    incident = runs[0].incidents[0]
    assert (incident.cause, incident.samples, incident.verdict) == ("log_of_zero", (2,), "reproduced")


# -- tensors of every layout, wherever they are held


class Sparse(Reaching):
    def prepare(self) -> None:
        self.neighbours = torch.eye(4).to_sparse()
        self.rows = torch.eye(4).to_sparse_csr()
        self.lengths = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
        self.register_buffer("degrees", torch.eye(4).to_sparse())

    def weight(self) -> Any:
        return (
            torch.sparse.mm(self.neighbours, self.layer.weight.T).sum()
            + torch.sparse.mm(self.degrees, torch.ones(4, 1)).sum()
        )


def test_a_module_that_holds_tensors_of_other_layouts(tmp_path: Path) -> None:
    data = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    data[6, 0] = 0.0
    dataset = TensorDataset(data)
    dataset.neighbours, dataset.nowhere = torch.eye(3).to_sparse(), torch.empty(3, device="meta")
    guard = policy(tmp_path, "skip_step", capture={"directory": str(tmp_path / "captures")})
    incident = fit(tmp_path, Sparse, DataLoader(dataset, batch_size=4), guard).incidents[0]
    assert (incident.cause, incident.samples, incident.verdict) == ("log_of_zero", (2,), "reproduced")
    assert incident.capture is not None
    assert nanguard.replay(incident.capture, Sparse()).reproduced
