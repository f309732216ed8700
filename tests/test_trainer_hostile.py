"""What hostile users found: parameters that the forward pass changes, batches and modules of every kind, odd plugins."""

from __future__ import annotations

import dataclasses
import warnings
from collections import UserDict

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import Precision
from torch import nn
from torch.utils.data import DataLoader

import nanguard
from nanguard import NanGuard, NanGuardWarning, NonFiniteError

NAN = float("nan")


class Plain(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        return self.net(batch["x"]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-2, momentum=0.9)


def rows(bad=(), size=24):
    x = torch.randn(size, 4, generator=torch.Generator().manual_seed(1))
    for position in bad:
        x[position, 1] = NAN
    return list(x)


def collate(items):
    return {"x": torch.stack(items), "id": torch.arange(len(items))}


def fit(kind, data, guard, collate=collate, size=4, **options):
    torch.manual_seed(0)
    module = kind()
    settings = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(**{"max_epochs": 1, "accelerator": "cpu", **settings, **options}, callbacks=[guard])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, DataLoader(data, size, collate_fn=collate))
    return module


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


# -- parameters that move without the optimizer


class Centre(Plain):
    """The centre of DINO: a frozen parameter that follows the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.centre = nn.Parameter(torch.zeros(2), requires_grad=False)

    def training_step(self, batch, batch_idx):
        out = self.net(batch["x"])
        self.centre.data = 0.9 * self.centre.data + 0.1 * out.detach().mean(0)
        return (out - self.centre).square().mean()


class Teacher(Plain):
    """A teacher that follows the weights, edited past the version counter."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(4, 2).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        for slow, fast in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            slow.data.lerp_(fast.data, 0.1)
        return (self.net(batch["x"]) - self.teacher(batch["x"])).square().mean()


class Renormed(Plain):
    """An embedding that is renormed while it is looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4, max_norm=0.5)

    def training_step(self, batch, batch_idx):
        return self.net(self.table(batch["id"]) + batch["x"]).square().mean()


class Decayed(Plain):
    """Decoupled decay after the step, in the user's own `optimizer_step`."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        optimizer.step(closure=optimizer_closure)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(0.99)


@pytest.mark.parametrize("kind", [Centre, Teacher, Renormed, Decayed])
@pytest.mark.parametrize("bad", [0, 2, 5])
def test_a_skip_puts_back_parameters_that_the_optimizer_did_not_move(tmp_path, kind, bad):
    guard = NanGuard(action="skip_step", captures=tmp_path)
    guarded = fit(kind, rows([4 * bad + 1]), guard)
    assert [incident.batch_idx for incident in guard.incidents] == [bad]
    data = rows()
    reference = fit(kind, data[: 4 * bad] + data[4 * bad + 4 :], NanGuard(captures=tmp_path))
    assert same(guarded, reference)


# -- batches of every kind


@dataclasses.dataclass
class Record:
    x: torch.Tensor
    note: str = ""


class Thing:
    def __init__(self, x):
        self.x = x

    def to(self, *args, **kwargs):
        return self


class Encoding(UserDict):
    pass


class Attribute(Plain):
    def training_step(self, batch, batch_idx):
        return self.net(batch.x).square().mean()


class Pops(Plain):
    def training_step(self, batch, batch_idx):
        return self.net(batch.pop("x")).square().mean()


class Reassigns(Plain):
    def training_step(self, batch, batch_idx):
        batch["x"] = batch["x"] * 2
        return self.net(batch["x"]).square().mean()


@pytest.mark.parametrize(
    ("kind", "make", "name"),
    [
        (Attribute, lambda items: Record(torch.stack(items)), "batch.x"),
        (Attribute, lambda items: Thing(torch.stack(items)), "batch.x"),
        (Plain, lambda items: Encoding(x=torch.stack(items)), 'batch["x"]'),
        (Pops, collate, 'batch["x"]'),
        (Reassigns, collate, 'batch["x"]'),
    ],
)
def test_batches_of_every_kind_are_understood(tmp_path, kind, make, name):
    guard = NanGuard(captures=tmp_path)
    with pytest.raises(NonFiniteError) as caught:
        fit(kind, rows([9]), guard, collate=make)
    incident = caught.value.incident
    assert (incident.cause, incident.origin.tensor) == ("bad_input", name)
    assert (incident.samples, incident.dataset_indices) == ((1,), (9,))
    if make is collate:
        assert sorted(nanguard.load_capture(incident.capture).batch) == ["id", "x"]


def test_many_bad_rows_are_all_named(tmp_path):
    bad = [1, 2, 4, 9, 13, 14, 15, 22]
    guard = NanGuard(captures=tmp_path)
    with pytest.raises(NonFiniteError):
        fit(Plain, rows(bad), guard, size=24)
    assert guard.incidents[0].samples == tuple(bad)


class Sparse(Plain):
    def training_step(self, batch, batch_idx):
        return self.net(batch.to_dense()).square().mean()


class Lazy(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d(), nn.LazyLinear(1))

    def configure_optimizers(self):
        return torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1e-2)


@pytest.mark.parametrize(("kind", "make"), [(Sparse, lambda items: torch.stack(items).to_sparse()), (Lazy, collate)])
def test_healthy_runs_of_odd_things_stay_healthy(tmp_path, kind, make):
    guard = NanGuard(captures=tmp_path)
    fit(kind, rows(), guard, collate=make)
    assert guard.incidents == []


class Nested(Plain):
    def training_step(self, batch, batch_idx):
        return torch.stack([self.net(part).square().mean() for part in batch.unbind()]).mean()


def test_a_diagnosis_that_fails_does_not_swallow_the_incident(tmp_path):
    guard = NanGuard(captures=tmp_path)
    with pytest.raises(NonFiniteError) as caught:
        fit(Nested, rows([9]), guard, collate=lambda items: torch.nested.nested_tensor(items))
    assert caught.value.incident.batch_idx == 2
    assert caught.value.incident.capture is not None


# -- a plugin that never asks


class OwnWay(Precision):
    def optimizer_step(self, optimizer, model, closure, **kwargs):
        closure()
        return optimizer.step(**kwargs)


def test_a_plugin_that_never_asks_is_reported(tmp_path):
    guard = NanGuard(captures=tmp_path)
    torch.manual_seed(0)
    trainer = pl.Trainer(
        max_epochs=1,
        callbacks=[guard],
        plugins=[OwnWay()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    with pytest.warns(NanGuardWarning, match="OwnWay lets the optimizer step without") as record:
        trainer.fit(Plain(), DataLoader(rows(), 4, collate_fn=collate))
    assert sum("OwnWay" in str(entry.message) for entry in record) == 1


def test_the_capture_folder_is_where_it_was_asked_for(tmp_path, monkeypatch):
    class Moves(Plain):
        def on_train_start(self):
            (tmp_path / "elsewhere").mkdir()
            monkeypatch.chdir(tmp_path / "elsewhere")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(NonFiniteError) as caught:
        fit(Moves, rows([1]), NanGuard(captures="here"))
    assert caught.value.incident.capture == str(tmp_path / "here" / "step-00000000-rank0")
    with pytest.raises(NonFiniteError) as caught:
        fit(Plain, rows([1]), NanGuard(captures="~/caught"))
    assert caught.value.incident.capture == str(tmp_path / "home" / "caught" / "step-00000000-rank0")


def test_a_lazy_module_whose_first_batch_is_bad_is_diagnosed(tmp_path):
    guard = NanGuard(captures=tmp_path)
    with pytest.raises(NonFiniteError) as caught:
        fit(Lazy, rows([1]), guard)
    incident = caught.value.incident
    assert (incident.batch_idx, incident.cause, incident.samples) == (0, "bad_input", (1,))
