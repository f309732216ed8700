"""The validation step under watch: what it returns and logs, and what is done about it."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import CatMetric, MeanMetric
from trainers import Net, Run, assert_finite, assert_same, fit, loader, make_trainer, policy, rows, seed

from nanguard import NanGuard, NonFiniteError, assert_finite_step, load_capture, replay
from nanguard.cli import main

WATCH = {"validation": True}


class Logging(Net):
    """Logs its loss and returns nothing."""


class Returning(Net):
    def validation_step(self, batch: Any) -> Any:
        x, y, _ = batch
        return {"loss": (self(x) - y).square().mean(), "logits": torch.full((2, 2), -math.inf)}


class Both(Net):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        super().validation_step(batch, batch_idx)
        x, y, _ = batch
        return (self(x) - y).square().mean()


def run(
    tmp: Path,
    make: Any,
    bad: Any = (1,),
    action: str = "record",
    watch: Any = WATCH,
    capture: Any = None,
    **options: Any,
) -> Run:
    sections = {"watch": watch} if capture is None else {"watch": watch, "capture": capture}
    return fit(tmp, make, rows(3), policy(tmp, action, **sections), val=rows(3, bad), **options)


@pytest.mark.parametrize("make", [Logging, Returning, Both])
def test_a_bad_batch_is_told_and_captured(tmp_path: Path, make: Any) -> None:
    (incident,) = run(tmp_path, make).incidents
    assert (incident.trigger, incident.action, incident.batch_idx) == ("loss", "recorded", 1)
    assert (incident.cause, incident.origin.tensor) == ("bad_input", "batch[0]")
    name = "val_loss" if make is Logging else 'output["loss"]' if make is Returning else "output"
    assert f"in the validation step: non-finite {name}" in incident.detail
    origin = incident.origin
    assert (origin.op, origin.phase, origin.module) == ("aten.addmm", "forward", "block.linear")
    assert (incident.samples, incident.dataset_indices, incident.verdict) == ((2,), (6,), "reproduced")
    assert incident.lead_up.steps == (0, 1, 2, 3)
    capture = load_capture(incident.capture)
    assert capture.batch[0].isnan().any()
    for step in (None, make.validation_step):
        again = replay(capture, make(), step=step)
        assert (again.finite, again.reproduced) == (False, True)
        assert again.incident.samples == incident.samples
        assert "gradient" not in str(again.incident)
    if make is not Logging:
        own = replay(capture, make(), step=lambda module, *args: _loss(module.validation_step(*args)))
        assert not own.finite


def test_the_command_replays_the_validation_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (incident,) = run(tmp_path, Both).incidents
    command = shlex.split(incident.replay)
    assert command[:2] == ["nanguard", "replay"]
    assert command[-2:] == ["--step", "validation_step"]
    assert main(command[1:]) == 1
    shown = capsys.readouterr().out
    assert "used batch[0] in the forward of `block.linear`" in shown
    assert incident.replay in shown
    assert main(command[1:-2]) == 1  # the capture says which step it is of
    with pytest.raises(AssertionError, match="non-finite results of the validation step: "):
        assert_finite_step(Both(), incident.capture)
    assert main([*command[1:-1], "training_step"]) == 2  # it takes other arguments


class Cured(Both):
    """The same model once the step has been mended."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.nan_to_num())


def test_a_step_that_was_mended_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (incident,) = run(tmp_path, Both).incidents
    assert_finite_step(Cured(), incident.capture)
    command = shlex.split(incident.replay.replace(":Both", ":Cured"))
    assert main(command[1:]) == 0
    assert "gradient" not in capsys.readouterr().out


def test_without_a_capture_nothing_is_said_of_a_replay(tmp_path: Path) -> None:
    (incident,) = run(tmp_path, Both, capture={"enabled": False}).incidents
    assert (incident.capture, incident.replay) == (None, None)
    assert "eplay" not in str(incident).replace("not_replayed", "")
    assert incident.samples == (2,)


def test_activations_are_shown_where_modules_are_watched(tmp_path: Path) -> None:
    (incident,) = run(tmp_path, Both, watch={**WATCH, "modules": ["head", "block.*"], "every_n_steps": 99}).incidents
    ranges = {stats.name: stats.nan for stats in incident.activations if "call" not in stats.name}
    assert ranges == {"block.linear": 6, "block.norm": 6, "block.drop": 6, "head": 1}
    assert "first non-finite output of a watched module: `block.linear`" in incident.detail


class Ratio(Both):
    """Fails in one operation, for one sample; counts and gathers in torchmetrics, and writes into what it was left."""

    def __init__(self) -> None:
        super().__init__()
        self.error, self.all = MeanMetric(nan_strategy="disable"), CatMetric(nan_strategy="disable")
        self.total = torch.zeros(())
        self.register_buffer("worst", torch.zeros(4, 1), persistent=False)

    def on_validation_epoch_start(self) -> None:
        self.total = torch.zeros(())
        self.worst = torch.zeros(4, 1)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, flag = batch
        ratio = (self(x) - y.clamp(-9, 9)) / flag
        self.error(ratio)
        self.all.update(ratio)
        self.total += ratio.sum()
        torch.maximum(self.worst, ratio, out=self.worst)
        self.log("error", self.error)
        self.log_dict({"ratio": ratio.mean(), "count": float(len(x))})
        return ratio.abs().mean()


def test_metrics_and_sums_are_what_they_were(tmp_path: Path) -> None:
    def fitted(watch: Any) -> Run:
        val = rows(3, [1], "gradient")
        return fit(tmp_path, Ratio, rows(3), policy(tmp_path, "record", watch=watch), val=val)

    found = fitted(WATCH)
    (incident,) = found.incidents
    assert (incident.origin.op, incident.origin.code) == ("aten.div", "ratio = (self(x) - y.clamp(-9, 9)) / flag")
    assert (incident.cause, incident.samples, incident.dataset_indices) == ("division_by_zero", (2,), (6,))
    assert "non-finite output, ratio" in incident.detail
    assert replay(incident.capture, Ratio(), strict=True).reproduced
    plain = fitted({})
    assert_same(found, plain)


def test_weights_that_are_bad_are_the_cause(tmp_path: Path) -> None:
    class Spoiled(Both):
        def on_validation_start(self) -> None:
            with torch.no_grad():
                self.head.weight[0, 0] = math.nan

    found = run(tmp_path, Spoiled, [])
    incident = found.incidents[0]
    assert (incident.cause, incident.origin.tensor, incident.samples) == ("parameters", "head.weight", None)
    assert len(found.incidents) == 3


def test_samples_of_a_shuffled_loader_are_places_in_the_batch(tmp_path: Path) -> None:
    seed()
    model, guard = Both(), NanGuard(policy(tmp_path, "record", watch=WATCH))
    val = loader(rows(3, [1]), shuffle=True)
    make_trainer(tmp_path, [guard]).fit(model, loader(rows(3)), val)
    (incident,) = guard.incidents
    (sample,) = incident.samples
    assert load_capture(incident.capture).batch[0][sample].isnan().all()
    assert incident.dataset_indices is None


def test_each_loader_counts_its_own_samples(tmp_path: Path) -> None:
    seed()
    guard = NanGuard(policy(tmp_path, "record", watch=WATCH))
    make_trainer(tmp_path, [guard]).fit(Both(), loader(rows(3)), [loader(rows(2)), loader(rows(3, [2]))])
    (incident,) = guard.incidents
    assert (incident.batch_idx, incident.samples, incident.dataset_indices) == (2, (2,), (10,))
    assert "in the validation step of loader 1" in incident.detail


def _loss(output: Any) -> Any:
    return output["loss"] if isinstance(output, dict) else output


def test_without_the_key_nothing_is_looked_at(tmp_path: Path) -> None:
    assert run(tmp_path, Both, watch={}).incidents == []


@pytest.mark.parametrize("inference", [True, False])
def test_a_watched_validation_changes_nothing(tmp_path: Path, inference: bool) -> None:
    options = {"max_epochs": 2, "val_check_interval": 2, "inference_mode": inference, "num_sanity_val_steps": 1}
    for bad in ([], [1]):
        found = run(tmp_path, Both, bad, **options)
        assert len(found.incidents) == 2 * len(bad)
        assert_same(found, run(tmp_path, Both, bad, watch={}, **options))


def test_raising_ends_the_fit_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="in the validation step: non-finite") as caught:
        run(tmp_path, Both, action="raise")
    assert caught.value.incident.action == "raised"
    assert caught.value.incident.step == 3


def test_raising_in_the_sanity_check(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="step 0, epoch 0, batch 0"):
        run(tmp_path, Both, [0], action="raise", num_sanity_val_steps=2)


def test_stopping(tmp_path: Path) -> None:
    found = run(tmp_path, Both, action="stop", max_epochs=3)
    assert [incident.action for incident in found.incidents] == ["stopped"]
    assert found.trainer.current_epoch == 1
    assert_finite(found.model.state_dict())


def test_what_is_logged_is_told_once_in_each_validation(tmp_path: Path) -> None:
    found = run(tmp_path, Logging, [0, 1], max_epochs=2)
    assert [incident.batch_idx for incident in found.incidents] == [0, 0]
    assert [incident.batch_idx for incident in run(tmp_path, Both, [0, 1]).incidents] == [0, 1]
