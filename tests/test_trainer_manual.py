"""Manual optimization: however many optimizers step, and whenever, the batch is left out as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric
from trainers import BATCH, assert_finite, assert_same, copied, differences, fit, policy, rows, without

import nanguard
from nanguard import NonFiniteError


class Manual(pl.LightningModule):
    """What the manual modules have in common."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.one = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 1))
        self.two = nn.Linear(1, 1)
        self.mean = MeanMetric(nan_strategy="disable")
        self.calls: list[int] = []

    def loss(self, batch: Any) -> Tensor:
        x, y, flag = batch
        out = self.one(x + 0.01 * torch.randn_like(x))
        loss = F.mse_loss(out, y) + 0.1 * (out * flag).pow(2).sum(1).sqrt().mean()
        self.calls.append(len(x))
        self.mean.update(loss.detach())
        self.log("loss", loss, on_epoch=True)
        return loss

    def step(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class Gan(Manual):
    """Two optimizers; the second may go bad after the first has stepped."""

    def __init__(self, fails: str = "second") -> None:
        super().__init__()
        self.fails = fails

    def training_step(self, batch: Any, batch_idx: int) -> None:
        one, two = self.optimizers()
        clean = (torch.nan_to_num(batch[0], 0.5), *batch[1:])
        first, second = (batch, clean) if self.fails == "first" else (clean, batch)
        self.toggle_optimizer(one)
        self.step(one, self.loss(first))
        self.untoggle_optimizer(one)
        self.log("between", self.one[0].weight.sum(), on_epoch=True)
        self.toggle_optimizer(two)
        self.step(two, (self.two(second[0][:, :1]) - second[1]).pow(2).mean())
        self.untoggle_optimizer(two)
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def configure_optimizers(self) -> Any:
        optimizers = [torch.optim.Adam(self.one.parameters(), 0.01), torch.optim.SGD(self.two.parameters(), 0.1, 0.9)]
        return optimizers, [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5) for optimizer in optimizers]


@pytest.mark.parametrize("fails", ["first", "second"])
@pytest.mark.parametrize("bad", [(0,), (2,), (5,), (2, 3)], ids=str)
def test_two_optimizers(tmp_path: Path, fails: str, bad: tuple[int, ...]) -> None:
    data = rows(6, bad)
    guarded = fit(tmp_path, lambda: Gan(fails), data, policy(tmp_path), max_epochs=2)
    reference = fit(tmp_path, lambda: Gan(fails), without(data, bad), max_epochs=2)
    assert [(i.epoch, i.batch_idx) for i in guarded.incidents] == [(epoch, batch) for epoch in (0, 1) for batch in bad]
    assert_same(guarded, reference)


def test_raising_undoes_the_first_update_too(tmp_path: Path) -> None:
    data, made = rows(6, [3]), []
    with pytest.raises(NonFiniteError) as caught:
        fit(tmp_path, lambda: made.append(Gan()) or made[0], data, policy(tmp_path, "raise"))
    assert caught.value.incident.batch_idx == 3
    assert caught.value.incident.cause == "bad_input"
    assert_finite(copied(made[0]))
    assert not differences(copied(made[0]), copied(fit(tmp_path, Gan, data[: 3 * BATCH]).model))


def test_the_capture_replays(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError) as caught:
        fit(tmp_path, Gan, rows(6, [3]), policy(tmp_path, "raise"))
    result = nanguard.replay(nanguard.load_capture(caught.value.incident.capture), Gan())
    assert not result.finite


class Single(Manual):
    """One optimizer of any kind, which may be given a closure."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        if self.kind != "lbfgs":
            self.step(optimizer, self.loss(batch))
            return

        def closure() -> Tensor:
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)

    def configure_optimizers(self) -> Any:
        if self.kind == "lbfgs":
            return torch.optim.LBFGS(self.one.parameters(), lr=0.1, max_iter=3)
        return torch.optim.RMSprop(self.one.parameters(), lr=0.01, momentum=0.9)


@pytest.mark.parametrize("kind", ["lbfgs", "rmsprop"])
@pytest.mark.parametrize("failure", ["nan", "gradient"])
@pytest.mark.parametrize("bad", [(0,), (3,), (4, 5)], ids=str)
def test_one_optimizer(tmp_path: Path, kind: str, failure: str, bad: tuple[int, ...]) -> None:
    data = rows(6, bad, failure)
    guarded = fit(tmp_path, lambda: Single(kind), data, policy(tmp_path))
    assert len(guarded.incidents) == len(bad)
    assert_same(guarded, fit(tmp_path, lambda: Single(kind), without(data, bad)))


class Accumulating(Manual):
    """Steps after every second batch."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch) / 2)
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.one.parameters(), 0.01)


@pytest.mark.parametrize("bad", range(6))
def test_accumulation_by_hand(tmp_path: Path, bad: int) -> None:
    data = rows(6, [bad])
    guarded = fit(tmp_path, Accumulating, data, policy(tmp_path))
    window = {bad // 2 * 2, bad // 2 * 2 + 1}
    kept = [sample for position, sample in enumerate(data) if position // BATCH not in window]
    assert [incident.batch_idx for incident in guarded.incidents] == [bad]
    assert_same(guarded, fit(tmp_path, Accumulating, kept))


class Past(Manual):
    """Steps the torch optimizer itself, past Lightning."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers().optimizer
        self.step(optimizer, self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.one.parameters(), 0.01)


@pytest.mark.parametrize("make", [Gan, lambda: Single("lbfgs"), lambda: Single("rmsprop"), Accumulating, Past])
def test_healthy_runs_are_left_alone(tmp_path: Path, make: Any) -> None:
    guarded = fit(tmp_path, make, rows(6), policy(tmp_path), max_epochs=2)
    assert guarded.incidents == []
    assert_same(guarded, fit(tmp_path, make, rows(6), max_epochs=2))


@pytest.mark.parametrize("hold", [False, True])
def test_global_step(tmp_path: Path, hold: bool) -> None:
    guarded = fit(tmp_path, Gan, rows(4, [1]), policy(tmp_path, hold_global_step=hold))
    reference = fit(tmp_path, Gan, without(rows(4, [1]), [1]))
    assert reference.trainer.global_step == 6
    assert guarded.trainer.global_step == (6 if hold else 8)


def test_stop(tmp_path: Path) -> None:
    data = rows(6, [3])
    guarded = fit(tmp_path, Gan, data, policy(tmp_path, "stop"), max_epochs=2)
    assert [incident.action for incident in guarded.incidents] == ["stopped"]
    assert_same(guarded, fit(tmp_path, Gan, data[: 3 * BATCH]))
