"""The validation step under watch: what it returns and logs, and what is done about it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trainers import Net, Run, assert_finite, assert_same, fit, policy, rows

from nanguard import NonFiniteError, load_capture, replay

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


def run(tmp: Path, make: Any, bad: Any = (1,), action: str = "record", watch: Any = WATCH, **options: Any) -> Run:
    return fit(tmp, make, rows(3), policy(tmp, action, watch=watch), val=rows(3, bad), **options)


@pytest.mark.parametrize("make", [Logging, Returning, Both])
def test_a_bad_batch_is_told_and_captured(tmp_path: Path, make: Any) -> None:
    (incident,) = run(tmp_path, make).incidents
    assert (incident.trigger, incident.action, incident.batch_idx) == ("loss", "recorded", 1)
    assert (incident.cause, incident.origin.tensor) == ("bad_input", "batch[0]")
    name = "val_loss" if make is Logging else 'output["loss"]' if make is Returning else "output"
    assert f"in the validation step: non-finite {name}" in incident.detail
    assert incident.replay is None
    capture = load_capture(incident.capture)
    assert capture.batch[0].isnan().any()
    if make is not Logging:
        model = make()
        again = replay(capture, model, step=lambda module, *args: _loss(module.validation_step(*args)))
        assert not again.finite


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
