"""Captures as regression tests, in a real pytest."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from nanguard import Incident
from nanguard.capture import StepSnapshot, write_capture
from nanguard.rng import RngState

pytest_plugins = ["pytester"]
ROOT = Path(__file__).parent.parent

MODEL = """
import torch
from torch import nn

class Ratio(nn.Module):
    def __init__(self, eps=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.eps = eps

    def training_step(self, batch, batch_idx):
        return (self.weight / (batch + self.eps)).sum()
"""
TEST = """
import nanguard
from ratio import Ratio

def test_step(nanguard_capture):
    nanguard.assert_finite_step(Ratio(), nanguard_capture)
"""
LIGHT = """
def test_step(nanguard_capture):
    assert nanguard_capture.step in (1, 2)
"""
MARKED = """
import pytest

@pytest.mark.nanguard_captures({})
def test_step(nanguard_capture):
    assert nanguard_capture.step == 1
"""


@pytest.fixture(scope="module")
def captures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Step 1 divides by zero, step 2 by two."""

    class Ratio(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

    directory = tmp_path_factory.mktemp("captures")
    for step, divisor in ((1, 0.0), (2, 2.0)):
        snapshot = StepSnapshot(
            step=step, epoch=0, batch_idx=0, args=(torch.tensor([divisor]), 0), module=Ratio(), rng=RngState.save()
        )
        write_capture(directory, snapshot, Incident(step, 0, 0, trigger="loss"))
    return directory


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Callable[..., pytest.RunResult]:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(pytester.path)]))
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # others' plugins take seconds to import
    pytester.makepyfile(ratio=MODEL)

    def run(*arguments: object) -> pytest.RunResult:
        options = ["-p", "nanguard.pytest_plugin", "-p", "no:cacheprovider", "--strict-markers", *map(str, arguments)]
        return pytester.runpytest_subprocess(*options)

    return run


def test_one_test_per_capture(pytester: pytest.Pytester, run: Callable[..., pytest.RunResult], captures: Path) -> None:
    pytester.makepyfile(test_it=TEST)
    result = run("--nanguard-captures", captures, "-v")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        [
            "*test_step?step-00000001-rank0? FAILED*",
            "*test_step?step-00000002-rank0? PASSED*",
            "*AssertionError: the captured step is not finite:",
            "*non-finite values in the loss at step 1, epoch 0, batch 0*",
            f"E*nanguard replay {captures}/step-00000001-rank0 --module ratio:Ratio",
        ]
    )
    assert "replaying.py" not in result.stdout.str()


def test_a_damaged_capture_fails_its_own_test_only(
    pytester: pytest.Pytester, run: Callable[..., pytest.RunResult], captures: Path
) -> None:
    shutil.copytree(captures, pytester.path / "copies")
    (pytester.path / "copies" / "step-00000001-rank0" / "manifest.json").write_text("{")
    pytester.makepyfile(test_it=TEST)
    result = run("--nanguard-captures", "copies")
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*manifest.json: cannot be read as JSON*"])
    assert "Traceback" not in result.stdout.str()


def test_the_marker_wins_over_the_option(
    pytester: pytest.Pytester, run: Callable[..., pytest.RunResult], captures: Path
) -> None:
    shutil.copytree(captures / "step-00000001-rank0", pytester.path / "sub" / "data" / "first")
    shutil.copytree(captures / "step-00000001-rank0", pytester.path / "data" / "first")
    shutil.copytree(captures / "step-00000001-rank0", pytester.path / "data" / "deeper" / "second")
    (pytester.path / "sub" / "test_near.py").write_text(MARKED.format("'data'"))
    (pytester.path / "other").mkdir()
    (pytester.path / "other" / "test_far.py").write_text(MARKED.format("directory='data'"))
    result = run("--nanguard-captures", captures, "-v", "--rootdir", pytester.path)
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(["*test_far.py::test_step?deeper/second?*", "*test_far.py::test_step?first?*"])
    result.stdout.fnmatch_lines(["*test_near.py::test_step?first?*"])


def test_the_ini_file(pytester: pytest.Pytester, run: Callable[..., pytest.RunResult], captures: Path) -> None:
    shutil.copytree(captures, pytester.path / "data")
    pytester.makeini("[pytest]\nnanguard_captures = data")
    pytester.makepyfile(test_it=LIGHT)
    run().assert_outcomes(passed=2)


def test_no_captures_skip_and_say_so(pytester: pytest.Pytester, run: Callable[..., pytest.RunResult]) -> None:
    (pytester.path / "empty").mkdir()
    pytester.makepyfile(test_it=LIGHT)
    result = run("--nanguard-captures", "empty", "-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines([f"*no captures in {pytester.path}/empty*"])
    result = run("-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(
        ["*no captures: give --nanguard-captures DIR or mark the test with nanguard_captures(DIR)*"]
    )


def test_a_missing_directory_is_a_usage_error(pytester: pytest.Pytester, run: Callable[..., pytest.RunResult]) -> None:
    pytester.makepyfile(test_it=LIGHT)
    result = run("--nanguard-captures", "nowhere")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert [line for line in result.stderr.lines if line] == [
        f"ERROR: --nanguard-captures nowhere: there is no directory {pytester.path}/nowhere; "
        "expected one that holds captures of nanguard"
    ]


def test_a_marked_directory_that_is_not_there(pytester: pytest.Pytester, run: Callable[..., pytest.RunResult]) -> None:
    (pytester.path / "sub").mkdir()
    pytester.makeini("[pytest]")
    (pytester.path / "sub" / "test_it.py").write_text(MARKED.format("'nowhere'"))
    result = run()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        [
            f"sub/test_it.py::test_step: nanguard_captures('nowhere'): there is no directory {pytester.path}/sub/nowhere and "
            f"no {pytester.path}/nowhere; expected one that holds captures of nanguard"
        ]
    )


@pytest.mark.parametrize("arguments", ["", "1", "'a', 'b'", "folder='a'"])
def test_a_marker_that_names_no_directory(
    pytester: pytest.Pytester, run: Callable[..., pytest.RunResult], arguments: str
) -> None:
    pytester.makepyfile(test_it=MARKED.format(arguments))
    result = run()
    result.assert_outcomes(errors=1)
    assert f"found nanguard_captures({arguments}); expected one directory" in result.stdout.str()


def test_other_suites_are_not_slowed_down(
    pytester: pytest.Pytester, run: Callable[..., pytest.RunResult], captures: Path
) -> None:
    pytester.makepyfile(
        test_it="""
        import sys

        def test_plain():
            assert not {"torch", "lightning", "safetensors"} & set(sys.modules)

        def test_captured(request, nanguard_capture):
            assert "torch" not in sys.modules
            assert nanguard_capture.incident.step in (1, 2)
            assert "torch" not in sys.modules
            nanguard_capture.batch
            assert "torch" in sys.modules
    """
    )
    run("--nanguard-captures", captures, "-k", "plain or 1-rank").assert_outcomes(passed=2, deselected=1)


@pytest.mark.parametrize("how", ["-p", "conftest", "entry point"])
def test_both_ways_of_loading_the_plugin(
    pytester: pytest.Pytester, run: Callable[..., pytest.RunResult], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The entry point of an installed package, and a request by name: once is enough."""
    monkeypatch.delenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD")
    package = pytester.path / "nanguard_again-0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: nanguard-again\nVersion: 0\n")
    (package / "entry_points.txt").write_text("[pytest11]\nnanguard = nanguard.pytest_plugin\n")
    if how == "conftest":
        pytester.makeconftest("pytest_plugins = ['nanguard.pytest_plugin']")
    pytester.makepyfile(
        test_it="def test_it(request):\n    assert request.config.getoption('--nanguard-captures') is None\n"
    )
    options = ["-p", "nanguard.pytest_plugin"] if how == "-p" else []
    pytester.runpytest_subprocess("-p", "no:cacheprovider", *options).assert_outcomes(passed=1)


def test_workers_collect_the_same(
    pytester: pytest.Pytester, run: Callable[..., pytest.RunResult], captures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xdist")
    monkeypatch.delenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD")
    pytester.makepyfile(test_it=MARKED.format(repr(str(captures / "step-00000001-rank0"))))
    run("-n", "2").assert_outcomes(passed=1)
