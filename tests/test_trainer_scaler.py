"""A GradScaler's own skips are part of its work, until they are too many; a non-finite loss is an incident at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from trainers import Net, Run, assert_finite, assert_same, copied, differences, fit, policy, rows, without

from nanguard import NonFiniteError

pytestmark = pytest.mark.filterwarnings("ignore::nanguard.NanGuardWarning")


def scaled(tmp: Path, data: Any, guard: Any = None, *, make: Any = Net, scale: float = 128.0, **options: Any) -> Run:
    """A run in half precision with a real GradScaler on the CPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
    return fit(tmp, make, data, guard, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], **options)


def state(run: Run) -> dict[str, Any]:
    return run.trainer.precision_plugin.scaler.state_dict()


def test_a_healthy_run_is_left_alone(tmp_path: Path) -> None:
    guarded = scaled(tmp_path, rows(8), policy(tmp_path))
    assert guarded.incidents == []
    assert_same(guarded, scaled(tmp_path, rows(8)))
    assert state(guarded)["scale"] > 128


@pytest.mark.parametrize("scale", [2.0**20, 2.0**24])
def test_calibration_is_no_incident(tmp_path: Path, scale: float) -> None:
    guarded = scaled(tmp_path, rows(10), policy(tmp_path, "raise"), scale=scale)
    reference = scaled(tmp_path, rows(10), scale=scale)
    assert guarded.incidents == []
    assert_same(guarded, reference)
    assert state(guarded)["scale"] < scale  # it did overflow


class Overflowing(Net):
    """A finite loss whose gradient no scale can represent."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + 0 * (self.head.weight.sum() * 0).sqrt()


def test_too_many_skips_in_a_row_are_an_incident(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError) as caught:
        scaled(tmp_path, rows(30), policy(tmp_path, "raise"), make=Overflowing, scale=2.0**40)
    assert caught.value.incident.trigger == "scaler"
    assert caught.value.incident.batch_idx == 19


def test_a_batch_that_the_scaler_left_out_was_not_well(tmp_path: Path) -> None:
    class Distances(Net):
        """The distance between two things that are the same for one sample of each batch, after the first."""

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            x = batch[0].flatten(1).float()
            other = x.flip(1) + 1
            if batch_idx:
                other[2] = x[2]
            with torch.autocast("cpu", enabled=False):
                distance = (x - other).mul(self.head.weight.mean()).square().sum(1).sqrt()
            return super().training_step(batch, batch_idx) + distance.mean()

    guard = policy(tmp_path, "record", scaler={"max_consecutive_skips": 3})
    incident = scaled(tmp_path, rows(8), guard, make=Distances).incidents[0]
    assert incident.origin is not None
    assert (incident.trigger, incident.origin.op, incident.samples) == ("scaler", "aten.sqrt", (2,))


@pytest.mark.parametrize("most", [1, 3])
def test_the_policy_says_how_many(tmp_path: Path, most: int) -> None:
    guard = policy(tmp_path, "raise", scaler={"max_consecutive_skips": most})
    with pytest.raises(NonFiniteError) as caught:
        scaled(tmp_path, rows(8), guard, make=Overflowing, scale=2.0**40)
    assert caught.value.incident.batch_idx == most - 1


def test_a_spent_scale_is_an_incident(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError) as caught:
        scaled(tmp_path, rows(12), policy(tmp_path, "raise"), make=Overflowing, scale=4.0)
    assert caught.value.incident.trigger == "scaler"
    assert caught.value.incident.batch_idx < 5


def test_a_healthy_step_ends_the_row(tmp_path: Path) -> None:
    class Now(Net):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss if batch_idx % 2 else loss + 0 * (self.head.weight.sum() * 0).sqrt()

    guard = policy(tmp_path, "raise", scaler={"max_consecutive_skips": 2})
    assert scaled(tmp_path, rows(8), guard, make=Now, scale=2.0**16).incidents == []


@pytest.mark.parametrize("bad", [(0,), (3,), (7,), (2, 3)], ids=str)
@pytest.mark.parametrize("clip", [None, 0.1])
def test_skipping_leaves_the_scaler_untouched(tmp_path: Path, bad: tuple[int, ...], clip: float | None) -> None:
    data = rows(8, bad)
    make = lambda: Net("adam", "step")  # noqa: E731
    guarded = scaled(tmp_path, data, policy(tmp_path), make=make, gradient_clip_val=clip)
    reference = scaled(tmp_path, without(data, bad), make=make, gradient_clip_val=clip)
    assert [incident.trigger for incident in guarded.incidents] == ["loss"] * len(bad)
    assert state(guarded) == state(reference)
    assert_same(guarded, reference)


def test_skipping_right_after_the_scaler_skipped(tmp_path: Path) -> None:
    data = rows(12, [3, 7])
    guarded = scaled(tmp_path, data, policy(tmp_path), scale=2.0**19)
    reference = scaled(tmp_path, without(data, [3, 7]), scale=2.0**19)
    assert len(guarded.incidents) == 2
    assert state(guarded)["scale"] < 2.0**19
    assert_same(guarded, reference)


@pytest.mark.parametrize("bad", [2, 3])
def test_with_accumulation(tmp_path: Path, bad: int) -> None:
    data = rows(8, [bad])
    guarded = scaled(tmp_path, data, policy(tmp_path), accumulate_grad_batches=2)
    reference = scaled(tmp_path, without(data, [2, 3]), accumulate_grad_batches=2)
    assert [incident.batch_idx for incident in guarded.incidents] == [bad]
    assert_same(guarded, reference)


def test_raising_leaves_weights_and_buffers_finite(tmp_path: Path) -> None:
    made: list[Any] = []
    data = rows(6, [3])
    with pytest.raises(NonFiniteError):
        scaled(tmp_path, data, policy(tmp_path, "raise"), make=lambda: made.append(Net()) or made[0])
    assert_finite(copied(made[0]))
    assert not differences(copied(made[0]), copied(scaled(tmp_path, data[:12]).model))


def test_a_fused_optimizer_that_unscales_for_itself(tmp_path: Path) -> None:
    data = rows(6, [3])
    make = lambda: Net("adam-fused")  # noqa: E731
    guarded = scaled(tmp_path, data, policy(tmp_path), make=make)
    assert len(guarded.incidents) == 1
    assert_same(guarded, scaled(tmp_path, without(data, [3]), make=make))
