"""The benchmark runs and prints its tables; how long anything takes is no matter of a test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
SCRIPT = FOLDER / "overhead.py"


@pytest.mark.slow
@pytest.mark.parametrize("form", [[], ["--markdown"]], ids=["table", "markdown"])
def test_it_prints_a_table(form: list[str], tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--steps", "2", "--models", "mlp", "--fits", "1", *form]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "torch" in done.stdout.splitlines()[0]
    for way in ("bare", "nanguard", "detect_anomaly", "Trainer, NanGuard"):
        assert any("mlp" in line and way in line for line in done.stdout.splitlines()), done.stdout


@pytest.mark.slow
def test_the_stabilizer_is_measured(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "stabilizer.py"), "--quick", "--sizes", "8x4"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for title in ("Losses by hand", "One idle call", "An idle step", "Bars"):
        assert f"**{title}**" in lines, done.stdout
    for way in ("unguarded", "guarded", "built-in"):
        assert any("8x4" in line and f"| {way} |" in line for line in lines), done.stdout


@pytest.mark.slow
def test_the_diagnosis_is_measured(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "diagnosis.py"), "--models", "mlp", "--samples", "8", "--repeats", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for kind in ("forward", "backward"):
        assert any(f"| mlp | {kind} |" in line for line in done.stdout.splitlines()), done.stdout
