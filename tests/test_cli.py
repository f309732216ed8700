"""The command line, in real processes and in this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from replay_models import Net, a_batch

import nanguard
from nanguard import Incident
from nanguard.capture import StepSnapshot, write_capture
from nanguard.cli import main
from nanguard.rng import RngState

ROOT = Path(__file__).parent.parent
MODEL = """
import sys
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.hparams = {"width": width}
        self.layer = nn.Linear(4, width)

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch["x"]).sum() / batch["scale"].sum()
        return loss.clamp(max=3) if FIXED else loss

FIXED = False
number = 3

def build():
    return Net(5)

def broken():
    raise RuntimeError("no data here")

def needy(width):
    return Net(width)

def other():
    return 3

class Raising(Net):
    def training_step(self, batch, batch_idx):
        raise ValueError("bad shape")
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "my_model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    import my_model  # type: ignore[import-not-found]

    yield my_model
    del sys.modules["my_model"]


@pytest.fixture
def capture(model: Any, tmp_path: Path) -> Path:
    module = model.build()
    batch = {**a_batch(scale=0.0), "bad": torch.tensor([1.0, float("nan"), float("inf")]), "parse": len, "n": 2.5}
    batch.pop("parse")
    snapshot = StepSnapshot(
        step=12, epoch=1, batch_idx=3, args=(batch, 3), module=module, rng=RngState.save(), loss=float("inf")
    )
    return write_capture(tmp_path / "captures", snapshot, Incident(12, 1, 3, trigger="loss", detail="loss=inf"))


def nanguard_process(*arguments: object, code: str | None = None) -> subprocess.CompletedProcess[str]:
    command = ["-m", "nanguard"] if code is None else ["-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=200
    )


def test_show(capture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(capture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    incident = nanguard.load_capture(capture).incident.render().splitlines()
    assert lines[: len(incident)] == incident
    words = [line.split() for line in lines]
    assert ['batch["x"]', "float32", "6x4"] in words
    assert ['batch["bad"]', "float32", "3", "1", "1"] in words
    assert ['batch["n"]', "float", "2.5"] in words
    assert ["args[1]", "int", "3"] in words
    assert any(line.startswith("written by") and torch.__version__ in line for line in lines)


def test_show_as_json(capture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(capture), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["incident"]["step"] == 12
    assert {"path": 'batch["x"]', "shape": [6, 4], "dtype": "float32"}.items() <= found["leaves"][0].items()
    assert found["replay"] == f"nanguard replay {capture} --module my_model:Net"
    assert found["weights"] == 2


def test_show_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    snapshot = StepSnapshot(step=1, epoch=0, batch_idx=0, args=({"f": len},), module=Net(), rng=RngState.save())
    assert main(["show", str(write_capture(tmp_path, snapshot, Incident(1, 0, 0)))]) == 0
    out = capsys.readouterr().out
    assert 'not stored\nbatch["f"] (builtins.builtin_function_or_method): captures do not know this type' in out


def test_replay_of_a_failure_and_of_its_fix(capture: Path, model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(capture), "--module", "my_model:Net"]) == 1  # built from the captured hyperparameters
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "non-finite values in the loss at step 12, epoch 1, batch 3 (recorded)"
    assert lines[-1] == f"nanguard replay {capture} --module my_model:Net"
    assert "inf when captured" in lines[1]
    model.FIXED = True
    assert main(["replay", str(capture), "--module", "my_model:build", "--device", "cpu"]) in (0, 1)


def test_replay_in_a_process(capture: Path, tmp_path: Path) -> None:
    done = nanguard_process("replay", capture, "--module", f"{tmp_path / 'my_model.py'}:build", "--no-stabilize")
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[-1] == f"nanguard replay {capture} --module {tmp_path / 'my_model.py'}:build"
    assert done.stderr == ""


def test_a_finite_replay(model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    snapshot = StepSnapshot(
        step=1, epoch=0, batch_idx=0, args=(a_batch(), 0), module=model.build(), rng=RngState.save()
    )
    path = write_capture(tmp_path, snapshot, Incident(1, 0, 0, trigger="loss"))
    assert main(["replay", str(path), "--module", "my_model:build"]) == 0
    assert capsys.readouterr().out.startswith("finite: loss=")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("my_model", "--module: found 'my_model'; expected pkg.mod:factory or path/to/file.py:factory"),
        (
            "my_model:Nat",
            "--module my_model:Nat: my_model has no 'Nat'; expected a LightningModule class or a function",
        ),
        ("my_model:number", "--module my_model:number: found int; expected a class or a function that builds a module"),
        ("no_model:Net", "--module no_model:Net: no_model cannot be imported (looked in "),
        ("no_file.py:Net", "--module no_file.py:Net: there is no file no_file.py"),
        ("my_model:broken", "--module: broken() raised RuntimeError: no data here"),
        ("my_model:other", "--module: other() returned int; expected a LightningModule"),
        ("my_model:needy", "a function gets no arguments. Name a function that builds the module without arguments"),
        ("my_model:Raising", "the step cannot be replayed: ValueError: bad shape ("),
    ],
)
def test_modules_that_cannot_be_had(
    capture: Path, model: Any, reference: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", str(capture), "--module", reference]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("nanguard: ")
    assert "Traceback" not in error


def test_errors_of_captures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["show"], ["replay", "--module", "a:b"]):
        assert main([*command, str(tmp_path / "no")]) == 2
        assert capsys.readouterr().err == (
            f"nanguard: {tmp_path / 'no'}: there is no such directory; expected a capture, a folder with a manifest.json\n"
        )


def test_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy"]) == 0
    default = yaml.safe_load(capsys.readouterr().out)
    assert default["rules"][0]["action"] == "raise"
    (tmp_path / "policy.yaml").write_text("budget: {total: 7}")
    assert main(["policy", str(tmp_path / "policy.yaml")]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["budget"]["total"] == 7
    (tmp_path / "policy.yaml").write_text("budgets: {total: 7}")
    assert main(["policy", str(tmp_path / "policy.yaml")]) == 2
    assert "budgets: unknown key" in capsys.readouterr().err


def test_rule(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rule", "NG101"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# NG101 ")
    assert "What it does" in out
    assert main(["rule"]) == 0
    assert any(line.startswith("NG101  ") for line in capsys.readouterr().out.splitlines())
    assert main(["rule", "NG000"]) == 2
    error = capsys.readouterr().err
    assert "no rule 'NG000'" in error
    assert "NG101" in error


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["show"], ["replay", "x"]])
def test_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: nanguard" in capsys.readouterr().err


def test_version_and_help() -> None:
    assert nanguard_process("--version").stdout == f"nanguard {nanguard.__version__}\n"
    help_text = nanguard_process("--help").stdout
    assert all(command in help_text for command in ("show", "replay", "policy", "rule"))
    assert "lint" not in help_text


@pytest.mark.parametrize(
    "arguments",
    [["show", "CAPTURE"], ["show", "CAPTURE", "--json"], ["policy"], ["rule"], ["rule", "NG101"], ["--help"]],
)
def test_what_needs_no_torch_imports_none(arguments: list[str], capture: Path) -> None:
    code = """
import sys
from nanguard.cli import main
try:
    assert main(sys.argv[1:]) == 0
except SystemExit as exit:
    assert exit.code == 0
heavy = {"torch", "lightning", "pytorch_lightning", "safetensors", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""
    done = nanguard_process(*[str(capture) if word == "CAPTURE" else word for word in arguments], code=code)
    assert done.returncode == 0, done.stderr


def test_that_this_test_can_fail(capture: Path) -> None:
    code = "import sys; from nanguard.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    assert nanguard_process("replay", capture, "--module", "my_model:build", code=code).returncode == 1


def test_a_reader_that_leaves_early(capture: Path) -> None:
    command = f"{sys.executable} -m nanguard show {capture} --json | head -c 1"
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.stdout == "{"
    assert done.stderr == ""


SCRIPT = """
import dataclasses, sys
import torch
from torch import nn

@dataclasses.dataclass
class Batch:
    x: object

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def training_step(self, batch):
        return (self.weight / batch.x).sum()

if __name__ == "__main__":
    from nanguard import Incident
    from nanguard.capture import StepSnapshot, write_capture
    from nanguard.rng import RngState
    step = StepSnapshot(step=1, epoch=0, batch_idx=0, args=(Batch(torch.zeros(2)),), module=Model(), rng=RngState.save())
    print(write_capture("captures", step, Incident(1, 0, 0, trigger="loss")))
"""


def test_what_a_script_captures_its_replay_command_replays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes of a script are those of ``__main__`` then, and of an imported file now."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    written = subprocess.run([sys.executable, "train.py"], capture_output=True, text=True, env=environment, check=True)
    command = nanguard.load_capture(written.stdout.strip()).incident.replay
    assert command == "nanguard replay captures/step-00000001-rank0 --module train.py:Model"
    done = nanguard_process(*command.split()[1:])
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[-1] == command
