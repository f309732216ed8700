"""What a step can do besides computing a loss: write into its batch, prepare itself in hooks, step past Lightning."""

from __future__ import annotations

import warnings

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import nanguard
from nanguard import NanGuard, NanGuardWarning, NonFiniteError

NAN = float("nan")


class Plain(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1))

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def data(bad=None, value=NAN, size=24):
    x = torch.randn(size, 4, generator=torch.Generator().manual_seed(1))
    if bad is not None:
        x[bad, 1] = value
    return x


def fit(module, x, guard, **options):
    torch.manual_seed(2)
    settings = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(**{"max_epochs": 1, **settings, **options}, callbacks=[guard], accelerator="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, DataLoader(TensorDataset(x), 4))
    return trainer


def made(kind, **arguments):
    torch.manual_seed(0)
    return kind(**arguments)


def same_state(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


# -- running statistics that a forward pass spoils although its loss is finite


def test_statistics_spoiled_by_an_outlier_are_an_incident(tmp_path):
    module, guard = made(Plain), NanGuard(action="skip_step", captures=tmp_path)
    fit(module, data(9, 1e30), guard)
    (incident,) = guard.incidents
    assert (incident.trigger, incident.cause, incident.verdict) == ("parameters", "overflow", "reproduced")
    assert (incident.origin.op, incident.origin.module) == ("aten.native_batch_norm", "net.1")
    assert (incident.samples, incident.dataset_indices) == ((1,), (9,))
    assert "net.1.running_var" in incident.detail
    reference = made(Plain)
    fit(reference, torch.cat([data()[:8], data()[12:]]), NanGuard(captures=tmp_path))
    assert same_state(module, reference)


# -- steps that write into their batch


class WritesIntoItsBatch(Plain):
    def training_step(self, batch, batch_idx):
        batch[0].div_(10)
        return (self.net(batch[0]) / batch[0][:, :1].sign().abs()).square().mean()


@pytest.mark.parametrize("bad", [0, 13])
def test_the_batch_is_captured_as_it_came(tmp_path, bad):
    x = data()
    x[bad, 0] = 0
    guard = NanGuard(captures=tmp_path)
    with pytest.raises(NonFiniteError) as caught:
        fit(made(WritesIntoItsBatch), x, guard)
    incident = caught.value.incident
    assert (incident.cause, incident.dataset_indices) == ("division_by_zero", (bad,))
    capture = nanguard.load_capture(incident.capture)
    first = bad - bad % 4
    assert torch.equal(capture.batch[0], x[first : first + 4])
    assert nanguard.replay(capture, made(WritesIntoItsBatch)).reproduced


# -- hooks that prepare the step


class PreparedByItsHook(Plain):
    def on_train_batch_start(self, batch, batch_idx):
        self.beta = 0.0 if batch_idx == 2 else 1.0
        self.noise = torch.rand(1)

    def training_step(self, batch, batch_idx):
        return ((self.net(batch[0]) + self.noise) / self.beta).square().mean()


def test_what_the_hook_did_is_part_of_the_second_run_and_of_the_replay(tmp_path):
    guard = NanGuard(captures=tmp_path)
    with pytest.raises(NonFiniteError) as caught:
        fit(made(PreparedByItsHook), data(), guard)
    incident = caught.value.incident
    assert (incident.cause, incident.verdict, incident.batch_idx) == ("division_by_zero", "reproduced", 2)


def test_what_the_hook_did_is_undone_by_a_skip(tmp_path):
    module, guard = made(PreparedByItsHook), NanGuard(action="skip_step", captures=tmp_path)
    fit(module, data(), guard)
    assert [incident.batch_idx for incident in guard.incidents] == [2]

    class Reference(PreparedByItsHook):
        def on_train_batch_start(self, batch, batch_idx):
            self.beta, self.noise = 1.0, torch.rand(1)

    reference = made(Reference)
    fit(reference, torch.cat([data()[:8], data()[12:]]), NanGuard(captures=tmp_path))
    assert same_state(module, reference)


# -- steps past Lightning


class PastLightning(Plain):
    automatic_optimization = False

    def __init__(self, direct: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.direct = direct

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = self.net(batch[0]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        (optimizer.optimizer if self.direct else optimizer).step()


@pytest.mark.parametrize("direct", [True, False])
def test_a_step_past_lightning_is_judged_all_the_same(tmp_path, direct):
    module, guard = made(PastLightning, direct=direct), NanGuard(action="skip_step", captures=tmp_path)
    trainer = fit(module, data(9), guard)
    assert [incident.batch_idx for incident in guard.incidents] == [2]
    reference = made(PastLightning, direct=direct)
    fit(reference, torch.cat([data()[:8], data()[12:]]), NanGuard(captures=tmp_path))
    assert same_state(module, reference)
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks
    with pytest.raises(NonFiniteError):
        fit(made(PastLightning, direct=direct), data(9), NanGuard(captures=tmp_path))


# -- validation in the middle of an accumulation window


class Validated(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def validation_step(self, batch, batch_idx):
        assert not self.net.training
        self.seen.append(all(bool(torch.isfinite(value).all()) for value in self.state_dict().values()))
        self.log("val_loss", self.net(batch[0]).square().mean())

    def val_dataloader(self):
        return DataLoader(TensorDataset(data()), 8)


def test_validation_never_sees_what_a_bad_micro_batch_left(tmp_path):
    module, guard = made(Validated), NanGuard(action="skip_step", captures=tmp_path)
    options = {"accumulate_grad_batches": 3, "val_check_interval": 2, "num_sanity_val_steps": 0}
    fit(module, data(5), guard, **options)  # batch 1 of the window 0, 1, 2
    assert [incident.batch_idx for incident in guard.incidents] == [1]
    assert module.seen
    assert all(module.seen)
    reference = made(Validated)
    fit(reference, data()[12:], NanGuard(captures=tmp_path), **{**options, "val_check_interval": 1.0})
    assert same_state(module, reference)


# -- told once


def test_the_capture_folder_that_cannot_be_written_is_told_once(tmp_path):
    (tmp_path / "file").write_text("")
    guard = NanGuard(action="skip_step", captures=tmp_path / "file" / "captures")
    x = data()
    x[1], x[9] = NAN, NAN
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        torch.manual_seed(0)
        trainer = pl.Trainer(
            max_epochs=1, callbacks=[guard], logger=False, enable_checkpointing=False, enable_progress_bar=False
        )
        trainer.fit(Plain(), DataLoader(TensorDataset(x), 4))
    messages = [str(entry.message) for entry in record if issubclass(entry.category, NanGuardWarning)]
    assert sum("cannot be written" in message for message in messages) == 1
    assert [incident.capture for incident in guard.incidents] == [None, None]


# -- a hand-rolled loss that begins in the middle of the run


class Switches(Plain):
    def training_step(self, batch, batch_idx):
        logits = 100 * self.net(batch[0]) * torch.tensor([1.0, -1.0, 0.0])
        if batch_idx < 4:
            return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long)) * 1e-3
        return -torch.softmax(logits.detach() * 0 + logits / 100, 1)[:, 0].log().mean()


def test_the_stabiliser_comes_back_when_the_loss_changes(tmp_path):
    guard = NanGuard(captures=tmp_path)
    fit(made(Switches), data(), guard, max_epochs=2)
    (swap,) = guard.swaps
    # Off after three stable losses, on again from the step after the first hand-rolled one.
    assert swap.count == 3


class Targets(Plain):
    """Soft targets by hand, which no derivative flows into: the graph of the loss does not show them."""

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            e = (300 * batch[0][:, :2]).exp()
            targets = e / e.sum(1, keepdim=True)
        return F.cross_entropy(self.net(batch[0]) * torch.tensor([1.0, -1.0]), targets)


class Roots(Plain):
    """The trap of `torch.where`, which the graph shows."""

    def training_step(self, batch, batch_idx):
        z = self.net(batch[0]).relu()
        return torch.where(z > 0, z.sqrt(), z).mean() + self.net(batch[0]).square().mean()


@pytest.mark.parametrize(("module", "rule"), [(Targets, "NG201"), (Roots, "NG401")])
def test_the_stabiliser_stays_where_it_replaces_something(tmp_path, module, rule):
    guard = NanGuard(captures=tmp_path)
    fit(made(module), data(), guard, max_epochs=4)
    (swap,) = guard.swaps
    assert swap.rule == rule
    assert swap.count == 4 * 6
    assert guard.incidents == []
