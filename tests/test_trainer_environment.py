"""The guard without a change of code: the environment variable, and LightningCLI."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from trainers import Net, loader, make_trainer, policy, rows

from nanguard import NanGuard, NanGuardWarning, NonFiniteError

SCRIPT = """
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

class Model(BoringModel):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)["loss"]
        return loss * float("nan") if batch_idx == 1 else loss

if __name__ == "__main__":
    trainer = Trainer(accelerator="cpu", devices=1, max_steps=3, logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0)
    try:
        trainer.fit(Model())
    except FloatingPointError as error:
        print("RAISED", error.incident.batch_idx)
    print("GUARDS", sum(type(callback).__name__ == "NanGuard" for callback in trainer.callbacks))
    print("STEPS", trainer.global_step)
"""


def test_an_unchanged_script(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(path)],
        cwd=tmp_path,
        env={**os.environ, "NANGUARD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for line in ("RAISED 1", "GUARDS 1", "STEPS 1"):
        assert line in done.stdout.splitlines()
    assert len(list((tmp_path / "nanguard_captures").iterdir())) == 1


# -- the same in this process: the variable is read when a Trainer is made


def guards(trainer: Trainer) -> list[NanGuard]:
    return [callback for callback in trainer.callbacks if isinstance(callback, NanGuard)]


@pytest.mark.parametrize("value", ["0", "", "false", "OFF", "no", " "])
def test_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("NANGUARD", value)
    assert guards(make_trainer(tmp_path)) == []


@pytest.mark.parametrize("value", ["1", "true", "ON", "yes"])
def test_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("NANGUARD", value)
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(tmp_path)
    (guard,) = guards(trainer)
    with pytest.raises(NonFiniteError):
        trainer.fit(Net(), loader(rows(3, [1])))
    assert len(guard.incidents) == 1
    assert guards(trainer) == [guard]


def test_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(policy(tmp_path).to_yaml())
    monkeypatch.setenv("NANGUARD", str(path))
    trainer = make_trainer(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NanGuardWarning)
        trainer.fit(Net(), loader(rows(3, [1])))
    assert [incident.action for incident in guards(trainer)[0].incidents] == ["skipped"]


@pytest.mark.parametrize("text", [None, "version: 1\nrulez: []\n", "{"])
def test_a_path_that_is_of_no_use_is_told_and_the_default_guards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    path = tmp_path / "policy.yaml"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv("NANGUARD", str(path))
    with pytest.warns(NanGuardWarning, match=r"policy\.yaml"):
        trainer = make_trainer(tmp_path)
    assert guards(trainer)[0].policy.action(trigger="loss", cause="unknown", step=0) == "raise"


@pytest.mark.parametrize("first", [True, False])
def test_an_explicit_guard_takes_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool) -> None:
    monkeypatch.setenv("NANGUARD", "1")
    explicit = NanGuard(policy(tmp_path))
    trainer = make_trainer(tmp_path, [explicit])
    if first:
        trainer.callbacks.sort(key=lambda callback: callback is not explicit)
    assert len(guards(trainer)) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NanGuardWarning)
        trainer.fit(Net(), loader(rows(3, [1])))
    assert [incident.action for incident in explicit.incidents] == ["skipped"]
    assert all(guard is explicit or not guard.incidents for guard in guards(trainer))
    assert explicit in trainer.callbacks
    trainer.validate(Net(), loader(rows(1)), verbose=False)


def test_the_other_spelling_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = pytest.importorskip("pytorch_lightning")
    from pytorch_lightning.demos.boring_classes import BoringModel as OtherModel

    class Failing(OtherModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)["loss"]
            return loss * float("nan") if batch_idx == 1 else loss

    monkeypatch.setenv("NANGUARD", "1")
    monkeypatch.chdir(tmp_path)
    trainer = other.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    assert len(guards(trainer)) == 1
    with pytest.raises(NonFiniteError) as caught:
        trainer.fit(Failing())
    assert caught.value.incident.batch_idx == 1


# -- LightningCLI


class Failing(BoringModel):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)["loss"]
        return loss * float("nan") if batch_idx == 1 else loss


def cli(tmp: Path, callback: dict[str, Any]) -> LightningCLI:
    config = {
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "limit_train_batches": 3,
            "limit_val_batches": 0,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [callback],
        }
    }
    path = tmp / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return LightningCLI(
        Failing,
        BoringDataModule,
        run=False,
        args=["--config", str(path)],
        save_config_callback=None,
        auto_configure_optimizers=False,
    )


@pytest.mark.parametrize(
    "arguments",
    [{"action": "skip_step", "captures": "CAPTURES", "stabilize": False}, {"policy": "POLICY"}],
    ids=["flat", "path"],
)
def test_from_yaml(tmp_path: Path, arguments: dict[str, Any]) -> None:
    (tmp_path / "policy.yaml").write_text(policy(tmp_path).to_yaml())
    places = {"CAPTURES": str(tmp_path / "captures"), "POLICY": str(tmp_path / "policy.yaml")}
    arguments = {name: places.get(str(value), value) for name, value in arguments.items()}
    made = cli(tmp_path, {"class_path": "nanguard.NanGuard", "init_args": arguments})
    (guard,) = guards(made.trainer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NanGuardWarning)
        made.trainer.fit(made.model, datamodule=made.datamodule)
    assert [(incident.batch_idx, incident.action) for incident in guard.incidents] == [(1, "skipped")]
    assert guard.policy.stabilize.enabled is False
    assert len(list((tmp_path / "captures").iterdir())) == 1


def test_a_wrong_argument_in_yaml_is_an_error(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises((SystemExit, ValueError, NameError)):
        cli(tmp_path, {"class_path": "nanguard.NanGuard", "init_args": {"actoin": "raise"}})
    with pytest.raises(Exception, match="skip_stepp"):
        cli(tmp_path, {"class_path": "nanguard.NanGuard", "init_args": {"action": "skip_stepp"}})
