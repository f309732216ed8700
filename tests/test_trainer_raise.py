"""The default policy: the batch is captured, the run ends with an error that says everything, nothing is damaged."""

from __future__ import annotations

import json
import pickle
from collections import namedtuple
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from trainers import (
    Net,
    Samples,
    assert_finite,
    copied,
    differences,
    fit,
    loader,
    make_trainer,
    policy,
    rows,
    seed,
    without,
)

import nanguard
from nanguard import NanGuard, NonFiniteError


def failed(tmp: Path, data: Any, make: Any = Net, **options: Any) -> tuple[NonFiniteError, Any]:
    """The error and the module after a run that raised."""
    made = []
    with pytest.raises(NonFiniteError) as caught:
        fit(tmp, lambda: made.append(make()) or made[0], data, policy(tmp, "raise"), **options)
    return caught.value, made[0]


# -- the error


def test_the_default_policy_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NonFiniteError) as caught:
        fit(tmp_path, Net, rows(4, [2]), NanGuard())
    assert Path(caught.value.incident.capture).resolve().parent == tmp_path / "nanguard_captures"


def test_the_error(tmp_path: Path) -> None:
    error, _ = failed(tmp_path, rows(6, [2]))
    assert isinstance(error, FloatingPointError)
    assert isinstance(error, nanguard.NanGuardError)
    again = pickle.loads(pickle.dumps(error))
    assert again.incident == error.incident
    assert str(again) == str(error)
    assert str(error).splitlines()[-1] == error.incident.replay
    assert error.incident.replay.startswith(f"nanguard replay {error.incident.capture}")
    assert json.loads(json.dumps(error.incident.to_dict()))["cause"] == "bad_input"


@pytest.mark.parametrize(("kind", "trigger"), [("nan", "loss"), ("inf", "loss"), ("gradient", "gradients")])
def test_the_incident(tmp_path: Path, kind: str, trigger: str) -> None:
    error, _ = failed(tmp_path, rows(6, [1], kind), max_epochs=2)
    incident = error.incident
    assert (incident.step, incident.epoch, incident.batch_idx, incident.rank) == (1, 0, 1, 0)
    assert (incident.trigger, incident.action, incident.verdict) == (trigger, "raised", "reproduced")
    assert incident.samples == (2,)
    assert incident.dataset_indices == (6,)
    assert incident.cause == ("singular_gradient" if kind == "gradient" else "bad_input")
    assert incident.origin.file.endswith("trainers.py")
    assert incident.origin.phase == ("backward" if kind == "gradient" else "forward")


def test_the_place_in_a_later_epoch(tmp_path: Path) -> None:
    class Late(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss / 0 if self.current_epoch == 1 and batch_idx == 2 else loss

    error, _ = failed(tmp_path, rows(4), Late, max_epochs=3)
    assert (error.incident.step, error.incident.epoch, error.incident.batch_idx) == (6, 1, 2)


def test_the_guard_keeps_the_incident(tmp_path: Path) -> None:
    guard = NanGuard(policy(tmp_path, "raise"))
    with pytest.raises(NonFiniteError) as caught:
        fit(tmp_path, Net, rows(4, [2]), guard)
    assert guard.incidents == [caught.value.incident]


# -- nothing is damaged


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "lbfgs"])
@pytest.mark.parametrize("kind", ["nan", "gradient"])
def test_everything_is_as_before_the_batch(tmp_path: Path, optimizer: str, kind: str) -> None:
    data = rows(6, [3], kind)
    _, model = failed(tmp_path, data, lambda: Net(optimizer))
    reference = fit(tmp_path, lambda: Net(optimizer), data[:12]).model
    assert not differences(copied(model), copied(reference))
    assert differences(copied(model), copied(Net(optimizer)))  # it did train


def test_the_optimizer_is_as_before_the_batch(tmp_path: Path) -> None:
    data, guard = rows(6, [3]), NanGuard(policy(tmp_path, "raise"))
    seed()
    trainer = make_trainer(tmp_path, [guard])
    with pytest.raises(NonFiniteError):
        trainer.fit(Net("adam"), loader(data))
    reference = fit(tmp_path, lambda: Net("adam"), data[:12]).trainer
    states = [[optimizer.state_dict() for optimizer in t.optimizers] for t in (trainer, reference)]
    assert not differences(states[0], states[1])


@pytest.mark.parametrize("kind", ["nan", "gradient"])
def test_checkpoints_written_on_the_exception_are_finite(tmp_path: Path, kind: str) -> None:
    saving = [
        OnExceptionCheckpoint(tmp_path / "one"),
        ModelCheckpoint(tmp_path / "two", save_on_exception=True, every_n_epochs=1),
    ]
    _, model = failed(tmp_path, rows(6, [3], kind), lambda: Net("adam"), callbacks=saving, enable_checkpointing=True)
    found = [*(tmp_path / "one").glob("*.ckpt"), *(tmp_path / "two").glob("*.ckpt")]
    assert len(found) == 2
    for path in found:
        checkpoint = torch.load(path, weights_only=False)
        assert_finite(checkpoint["state_dict"])
        assert_finite(checkpoint["optimizer_states"])
        assert not differences(dict(checkpoint["state_dict"]), copied(model))


# -- the capture


@pytest.mark.parametrize("optimizer", ["sgd", "lbfgs"])
def test_the_capture_holds_the_step_as_it_was(tmp_path: Path, optimizer: str) -> None:
    data = rows(6, [3])
    error, _ = failed(tmp_path, data, lambda: Net(optimizer))
    path = Path(error.incident.capture)
    assert path.is_dir()
    assert path.parent == tmp_path / "captures"
    capture = nanguard.load_capture(path)
    assert capture.incident.cause == error.incident.cause
    result = nanguard.replay(capture, Net(optimizer))
    assert not result.finite
    assert result.reproduced


def test_no_capture_where_none_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError) as caught:
        fit(tmp_path, Net, rows(4, [2]), policy(tmp_path, "raise", capture={"enabled": False}))
    assert caught.value.incident.capture is None
    assert caught.value.incident.replay is None
    assert not (tmp_path / "captures").exists()


# -- every way that Lightning gives batches


Pair = namedtuple("Pair", ["x", "y"])


class Bag:
    """A batch class of the user's own."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y


class Simple(pl.LightningModule):
    """A linear model that takes any batch apart."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.unpack: Any = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        while isinstance(batch, (tuple, dict)) and not isinstance(batch, Pair) and "x" not in batch:
            batch = batch[0] if isinstance(batch, tuple) else batch["a"]
        if isinstance(batch, Tensor):
            x, y = batch[..., :2], batch[..., 2:]
        elif isinstance(batch, dict):
            x, y = batch["x"], batch["y"]
        else:
            x, y = batch.x, batch.y
        return F.mse_loss(self.layer(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def numbers() -> Tensor:
    data = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
    data[9, 0] = float("nan")
    return data


COLLATE = {
    "tensor": (lambda rows: torch.stack(rows), "batch"),
    "dict": (lambda rows: {"x": torch.stack(rows)[:, :2], "y": torch.stack(rows)[:, 2:]}, 'batch["x"]'),
    "namedtuple": (lambda rows: Pair(torch.stack(rows)[:, :2], torch.stack(rows)[:, 2:]), "batch.x"),
}


@pytest.mark.parametrize("name", COLLATE)
def test_structures_of_batches(tmp_path: Path, name: str) -> None:
    collate, place = COLLATE[name]
    data = DataLoader(list(numbers()), batch_size=4, collate_fn=collate)
    error, _ = failed(tmp_path, data, Simple)
    assert error.incident.origin.tensor == place
    assert error.incident.samples == (1,)
    assert error.incident.dataset_indices == (9,)


def test_a_batch_of_the_users_own_class(tmp_path: Path) -> None:
    data = DataLoader(list(numbers()), batch_size=4, collate_fn=lambda rows: Bag(*torch.stack(rows).split([2, 1], 1)))
    error, model = failed(tmp_path, data, Simple)
    assert error.incident.batch_idx == 2
    assert_finite(copied(model))


def test_a_loader_that_does_not_batch(tmp_path: Path) -> None:
    error, _ = failed(tmp_path, DataLoader(list(numbers()), batch_size=None), Simple)
    assert (error.incident.batch_idx, error.incident.dataset_indices) in [(9, (9,)), (9, None)]


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(numbers())


@pytest.mark.parametrize("action", ["raise", "skip_step"])
def test_a_stream(tmp_path: Path, action: str) -> None:
    guard = NanGuard(policy(tmp_path, action))
    try:
        fit(tmp_path, Simple, DataLoader(Stream(), batch_size=4), guard)
    except NonFiniteError:
        assert action == "raise"
    assert [(i.batch_idx, i.samples, i.dataset_indices) for i in guard.incidents] == [(2, (1,), None)]


@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle", "max_size"])
def test_several_loaders(tmp_path: Path, mode: str) -> None:
    clean = torch.ones(16, 3)
    loaders = {"a": DataLoader(list(numbers()), batch_size=4), "b": DataLoader(list(clean), batch_size=4)}
    guard = NanGuard(policy(tmp_path, "skip_step"))
    run = fit(tmp_path, Simple, CombinedLoader(loaders, mode), guard)
    assert [incident.batch_idx for incident in guard.incidents] == [2]
    assert guard.incidents[0].dataset_indices is None
    assert_finite(copied(run.model))


class Streaming(Simple):
    """Takes the iterator, and fetches for itself."""

    def training_step(self, dataloader_iter: Any) -> Tensor:
        batch, batch_idx, _ = next(dataloader_iter)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("action", ["raise", "skip_step"])
def test_a_step_that_takes_the_iterator(tmp_path: Path, action: str) -> None:
    guard = NanGuard(policy(tmp_path, action))
    run = None
    try:
        run = fit(tmp_path, Streaming, DataLoader(list(numbers()), batch_size=4), guard)
    except NonFiniteError:
        assert action == "raise"
    assert len(guard.incidents) == 1
    assert guard.incidents[0].step == 2
    if run is not None:
        assert_finite(copied(run.model))


# -- what is no incident


class Huge(Simple):
    """Finite gradients whose L2 norm is infinite."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.scale * self.layer(torch.ones(4, 2)).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("scale", [1e20, 1e25, 1e30])
def test_finite_gradients_with_an_infinite_norm(tmp_path: Path, scale: float) -> None:
    run = fit(tmp_path, lambda: Huge(scale), rows(3), policy(tmp_path, "raise"))
    assert run.incidents == []
    assert run.trainer.global_step == 3


class Harmless(Net):
    """NaN wherever it does no harm."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("bad", torch.log(-torch.ones(())))
        unused = self.head.weight.sum() / torch.zeros(())  # never reaches the loss
        self.log("worse", unused.detach())
        masked = torch.where(torch.ones(3) > 0, torch.zeros(3), torch.full((3,), float("nan")))
        return loss + masked.sum()

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("val_loss", torch.tensor(float("nan")))
        return torch.tensor(float("nan"))


def test_nan_in_metrics_and_in_validation(tmp_path: Path) -> None:
    run = fit(tmp_path, Harmless, rows(3), policy(tmp_path, "raise"), val=rows(2, [0]))
    assert run.incidents == []


class Nones(Simple):
    """Has no loss for some batches."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx % 2 else super().training_step(batch, batch_idx)


def test_a_step_without_a_loss(tmp_path: Path) -> None:
    good = torch.nan_to_num(numbers())
    run = fit(tmp_path, Nones, DataLoader(list(good), batch_size=4), policy(tmp_path, "raise"))
    assert run.incidents == []
    error, _ = failed(tmp_path, DataLoader(list(numbers()), batch_size=4), Nones)
    assert error.incident.batch_idx == 2
    reference = fit(tmp_path, Nones, DataLoader(list(good), batch_size=4))
    assert not differences(copied(run.model), copied(reference.model))


# -- dtypes and shapes of the loss


class Shaped(Simple):
    def __init__(self, shape: tuple[int, ...], wrap: bool) -> None:
        super().__init__()
        self.shape, self.wrap = shape, wrap

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        batch = batch.to(self.layer.weight.dtype)
        loss = super().training_step(batch, batch_idx).reshape(self.shape)
        return {"loss": loss, "extra": [loss.detach()]} if self.wrap else loss


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize(("shape", "wrap"), [((), False), ((1,), False), ((1, 1), True)])
def test_shapes_and_dtypes(tmp_path: Path, shape: tuple[int, ...], wrap: bool, precision: str) -> None:
    data = DataLoader(list(numbers()), batch_size=4)
    error, model = failed(tmp_path, data, lambda: Shaped(shape, wrap), precision=precision)
    assert (error.incident.batch_idx, error.incident.cause, error.incident.samples) == (2, "bad_input", (1,))
    assert_finite(copied(model))


def test_data_without_the_batch_does_not_raise(tmp_path: Path) -> None:
    data = rows(6, [2])
    assert fit(tmp_path, Net, Samples(without(data, [2])), policy(tmp_path, "raise")).incidents == []
