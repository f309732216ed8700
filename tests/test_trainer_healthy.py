"""A healthy run under the guard is the run without it, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, StochasticWeightAveraging
from trainers import OPTIMIZERS, SCHEDULES, Net, Run, assert_same, copied, differences, fit, loader, policy, rows

from nanguard import NanGuard, load_policy

CONFIGS = Path(__file__).parent.parent / "configs"


def healthy(tmp: Path, make: Any = Net, guard: Any = None, batches: int = 5, **options: Any) -> Run:
    """Asserts that the run under the guard equals the run without it, and returns it."""
    data = options.pop("data", None) or (lambda: loader(rows(batches), shuffle=True))
    guarded = fit(tmp, make, data(), guard or policy(tmp), **{"max_epochs": 2, **options})
    reference = fit(tmp, make, data(), **{"max_epochs": 2, **options})
    assert guarded.incidents == []
    assert guarded.trainer.global_step == reference.trainer.global_step
    assert_same(guarded, reference)
    return guarded


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers(tmp_path: Path, optimizer: str) -> None:
    healthy(tmp_path, lambda: Net(optimizer))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(tmp_path: Path, schedule: str) -> None:
    healthy(tmp_path, lambda: Net("sgd", schedule))


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
        {"precision": "bf16-mixed"},
        {"accumulate_grad_batches": 2},
        {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1},
        {"limit_train_batches": 3},
        {"val_check_interval": 2},
        {"reload_dataloaders_every_n_epochs": 1},
        {"detect_anomaly": True},
    ],
    ids=str,
)
def test_trainer_options(tmp_path: Path, options: dict[str, Any]) -> None:
    healthy(tmp_path, lambda: Net("adamw", "step"), val=rows(2), **options)


@pytest.mark.parametrize("action", ["raise", "skip_step", "record", "stop"])
@pytest.mark.parametrize("hold", [False, True])
def test_actions(tmp_path: Path, action: str, hold: bool) -> None:
    healthy(tmp_path, guard=policy(tmp_path, action, hold_global_step=hold))


@pytest.mark.parametrize("name", ["default", "survive", "debug", "pretraining"])
def test_shipped_policies_with_the_stabiliser_as_they_have_it(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = healthy(tmp_path, guard=NanGuard(load_policy(CONFIGS / f"{name}.yaml")), max_epochs=3)
    assert run.guard.swaps == []
    assert not (tmp_path / "nanguard_captures").exists()


def test_the_default_guard(tmp_path: Path) -> None:
    healthy(tmp_path, guard=NanGuard(), max_epochs=3)


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_workers(tmp_path: Path, workers: int, persistent: bool) -> None:
    options = {"num_workers": workers, "persistent_workers": persistent, "shuffle": True}
    healthy(tmp_path, data=lambda: loader(rows(4), **options))


def test_beside_other_callbacks(tmp_path: Path) -> None:
    def others() -> list[Any]:
        return [ModelCheckpoint(tmp_path / "c", monitor="loss"), StochasticWeightAveraging(0.01, swa_epoch_start=1)]

    options = {"max_epochs": 4, "enable_checkpointing": True}
    guarded, reference = (
        fit(tmp_path, Net, rows(4), guard, callbacks=others(), **options) for guard in (policy(tmp_path), None)
    )
    assert_same(guarded, reference)


def test_rates_are_monitored_alike(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    read = []
    for number, guard in enumerate((policy(tmp_path), None)):
        logger = CSVLogger(tmp_path, name=str(number))
        monitor = [LearningRateMonitor("step")]
        fit(tmp_path, lambda: Net("sgd", "step"), rows(4), guard, callbacks=monitor, logger=logger, log_every_n_steps=1)
        logger.save()
        read.append(Path(logger.log_dir, "metrics.csv").read_text())
    assert read[0] == read[1]
    assert "lr-SGD" in read[0]


def test_validate_test_and_predict_are_left_alone(tmp_path: Path) -> None:
    found = []
    for guard in (policy(tmp_path), None):
        run = fit(tmp_path, Net, rows(2), guard)
        found.append([run.trainer.validate(run.model, loader(rows(2)), verbose=False), copied(run.model)])
    assert not differences(found[0], found[1])
    assert found[0][0][0]["val_loss"] > 0


def test_a_seed_makes_a_difference(tmp_path: Path) -> None:
    """Comparing runs means something only if different runs differ."""

    class Drawing(Net):
        def __init__(self) -> None:
            super().__init__()
            torch.rand(())

    one, other = fit(tmp_path, Net, rows(3)), fit(tmp_path, Drawing, rows(3))
    found = differences(one.fingerprint(), other.fingerprint())
    for place in ("parameters", "rng.torch", "metrics", "optimizers", "results"):
        assert any(place in line for line in found)
