"""The example is run as a user runs it, once; what it prints and what it leaves behind are what it promises."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from nanguard.capture import find_captures, load_capture

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "digits.py"

pytestmark = pytest.mark.slow


def _run(arguments: Sequence[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("digits")


@pytest.fixture(scope="module")
def demo(folder: Path) -> subprocess.CompletedProcess[str]:
    stale = folder / "captures" / "step-00000000-rank0"
    stale.mkdir(parents=True)
    return _run([SCRIPT, "--captures", folder / "captures"], folder)


@pytest.fixture(scope="module")
def acts(demo: subprocess.CompletedProcess[str]) -> list[str]:
    parts = re.split(r"^(?=Act \d|Summary)", demo.stdout, flags=re.MULTILINE)
    assert len(parts) == 6, demo.stdout + demo.stderr
    return parts[1:]


def _percent(act: str) -> float:
    found = re.search(r"test accuracy.*?([\d.]+)%", act)
    assert found is not None, act
    return float(found[1])


def test_it_shows_all_that_it_promises(demo: subprocess.CompletedProcess[str]) -> None:
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert "FAILED" not in demo.stdout
    assert demo.stderr == ""


def test_a_log_holds_no_progress_bar_and_no_escape_codes(demo: subprocess.CompletedProcess[str]) -> None:
    assert "\r" not in demo.stdout
    assert "\x1b" not in demo.stdout
    assert len(demo.stdout.splitlines()) < 120


def test_unguarded_the_weights_are_lost(acts: list[str]) -> None:
    assert re.search(r"stopped being finite at step \d+", acts[0])
    lost, total = re.findall(r"([\d,]+) of ([\d,]+) parameters are NaN", acts[0])[0]
    assert lost == total
    assert _percent(acts[0]) < 50


def test_guarded_it_finishes_and_names_the_lines_to_change(acts: list[str]) -> None:
    assert _percent(acts[1]) > 95
    assert re.search(r"digits\.py:\d+: NG\d+: replaced the unstable", acts[1])
    assert "Write instead:" in acts[1]


def test_the_named_lines_are_those_of_the_loss(acts: list[str]) -> None:
    lines = SCRIPT.read_text().splitlines()
    named = [lines[int(number) - 1] for number in re.findall(r"digits\.py:(\d+): NG", acts[1])]
    assert any("torch.log(picked)" in line for line in named), named
    assert all("exponentials" in line or "torch.log" in line for line in named), named


def test_bad_images_are_named_and_do_no_damage(acts: list[str]) -> None:
    assert "3 incidents" in acts[2]
    assert "they name the images 1000, 3000, 5000, and no other" in acts[2]
    assert re.search(r"BatchNorm statistics: 0 of \d+ numbers are not finite", acts[2])
    assert re.search(r"checkpoint, loaded again: 0 of [\d,]+ numbers are not finite", acts[2])
    assert _percent(acts[2]) > 95


def test_the_failures_are_replayed(acts: list[str]) -> None:
    assert acts[3].count("the same bit for bit") == 3
    assert "nanguard.assert_finite_step(Digits(), nanguard_capture)" in acts[3]


def test_the_summary_has_a_row_for_each_act(acts: list[str]) -> None:
    for row in ("1 unguarded", "2 guarded", "3 bad data", "4 replay"):
        assert row in acts[4]


def test_the_captures_are_those_of_this_run(demo: subprocess.CompletedProcess[str], folder: Path) -> None:
    captures = [load_capture(path) for path in find_captures(folder / "captures")]
    assert sorted(capture.incident.dataset_indices for capture in captures) == [(1000,), (3000,), (5000,)]
    assert not (folder / "captures" / "step-00000000-rank0").exists()


def test_the_printed_command_replays_a_capture(demo: subprocess.CompletedProcess[str], folder: Path) -> None:
    capture = next(iter(find_captures(folder / "captures")))
    replay = _run(["-m", "nanguard", "replay", capture, "--module", f"{SCRIPT}:Digits"], folder)
    assert replay.returncode == 1, replay.stderr
    assert "non-finite values in the loss" in replay.stdout


def test_help_says_what_can_be_chosen(tmp_path: Path) -> None:
    shown = _run([SCRIPT, "--help"], tmp_path)
    assert shown.returncode == 0
    assert all(option in shown.stdout for option in ("--captures", "--epochs", "--seed"))
