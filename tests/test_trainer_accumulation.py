"""Gradient accumulation: the micro-batch at fault is named, the whole window is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from trainers import BATCH, Net, assert_finite, assert_same, copied, differences, fit, policy, rows

import nanguard
from nanguard import NonFiniteError


def window(batch: int, size: int, batches: int) -> list[int]:
    start = batch // size * size
    return list(range(start, min(start + size, batches)))


def without_windows(data: list[Any], dropped: list[int]) -> list[Any]:
    return [sample for position, sample in enumerate(data) if position // BATCH not in dropped]


@pytest.mark.parametrize("kind", ["nan", "gradient"])
@pytest.mark.parametrize("bad", range(7))
@pytest.mark.parametrize("size", [2, 3])
def test_the_window_never_was(tmp_path: Path, size: int, bad: int, kind: str) -> None:
    data = rows(7, [bad], kind)  # the last window is short
    options = {"accumulate_grad_batches": size, "max_epochs": 2}
    guarded = fit(tmp_path, lambda: Net("adam", "step"), data, policy(tmp_path), **options)
    reference = fit(tmp_path, lambda: Net("adam", "step"), without_windows(data, window(bad, size, 7)), **options)
    assert_same(guarded, reference)
    assert [incident.batch_idx for incident in guarded.incidents] == [bad, bad]
    assert [incident.step for incident in guarded.incidents] == [bad // size, bad // size + -(-7 // size)]
    assert guarded.incidents[0].samples == (2,)
    assert guarded.incidents[0].dataset_indices == (bad * BATCH + 2,)


@pytest.mark.parametrize("bad", [(0, 1), (1, 2), (0, 1, 2, 3), (2, 5)], ids=str)
def test_several_bad_micro_batches(tmp_path: Path, bad: tuple[int, ...]) -> None:
    data = rows(8, bad)
    dropped = sorted({entry for batch in bad for entry in window(batch, 2, 8)})
    guarded = fit(tmp_path, Net, data, policy(tmp_path), accumulate_grad_batches=2)
    assert_same(guarded, fit(tmp_path, Net, without_windows(data, dropped), accumulate_grad_batches=2))
    assert len(guarded.incidents) == len(dropped) // 2


@pytest.mark.parametrize("hold", [False, True])
def test_validation_in_the_middle_of_a_window(tmp_path: Path, hold: bool) -> None:
    options = {"accumulate_grad_batches": 4, "val_check_interval": 2, "val": rows(1)}
    data = rows(8, [5])
    guarded = fit(tmp_path, Net, data, policy(tmp_path, hold_global_step=hold), **options)
    assert [incident.batch_idx for incident in guarded.incidents] == [5]
    reference = fit(tmp_path, Net, data[:16], **options)
    assert not differences(copied(guarded.model), copied(reference.model))
    assert_finite(guarded.trainer.callback_metrics)
    assert "val_loss" in guarded.trainer.callback_metrics
    assert guarded.trainer.global_step == (1 if hold else 2)


@pytest.mark.parametrize("bad", [2, 3])
def test_raising_names_the_micro_batch_and_restores_the_window(tmp_path: Path, bad: int) -> None:
    data, made = rows(6, [bad]), []
    with pytest.raises(NonFiniteError) as caught:
        fit(
            tmp_path,
            lambda: made.append(Net("adam")) or made[0],
            data,
            policy(tmp_path, "raise"),
            accumulate_grad_batches=2,
        )
    assert (caught.value.incident.step, caught.value.incident.batch_idx) == (1, bad)
    reference = fit(tmp_path, lambda: Net("adam"), data[:8], accumulate_grad_batches=2)
    assert not differences(copied(made[0]), copied(reference.model))
    result = nanguard.replay(nanguard.load_capture(caught.value.incident.capture), Net("adam"))
    assert result.reproduced


def test_a_change_of_the_window_size(tmp_path: Path) -> None:
    scheduler = GradientAccumulationScheduler({0: 1, 1: 2})
    data = rows(6, [3])
    run = fit(tmp_path, Net, data, policy(tmp_path), callbacks=[scheduler], max_epochs=2)
    assert [(incident.epoch, incident.batch_idx) for incident in run.incidents] == [(0, 3), (1, 3)]
    assert run.model.seen == (5 + 4) * BATCH


def test_clipping_value_of_a_window(tmp_path: Path) -> None:
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"}
    data = rows(6, [2])
    guarded = fit(tmp_path, Net, data, policy(tmp_path), **options)
    assert_same(guarded, fit(tmp_path, Net, without_windows(data, [2, 3]), **options))
