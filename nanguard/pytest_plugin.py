"""Every capture a regression test: the fixture `nanguard_capture`, the option and the marker that say where captures lie.

Importing this, and collecting tests, imports neither torch nor lightning.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from nanguard.capture import Capture

__all__ = [
    "nanguard_capture",
    "pytest_addoption",
    "pytest_configure",
    "pytest_generate_tests",
    "pytest_plugin_registered",
]

_FIXTURE = "nanguard_capture"
_NAME = "nanguard_captures"


def pytest_plugin_registered(plugin: object, manager: pytest.PytestPluginManager) -> None:
    """Lets the entry point of the package and ``-p nanguard.pytest_plugin`` (or ``pytest_plugins``) stand side by side."""
    if plugin is sys.modules[__name__]:
        # A module must not be registered twice, and pytest knows the two ways by different names.
        other = __name__ if manager.get_name(plugin) != __name__ else "nanguard"
        manager.set_blocked(other)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds ``--nanguard-captures DIR`` and the ini option ``nanguard_captures``."""
    help_text = "directory of nanguard's captures; the fixture nanguard_capture runs once for each"
    parser.getgroup("nanguard").addoption("--nanguard-captures", metavar="DIR", default=None, help=help_text)
    parser.addini(_NAME, help_text, default=None)


def pytest_configure(config: pytest.Config) -> None:
    """Registers the marker, and refuses a directory that is not there."""
    config.addinivalue_line("markers", f"{_NAME}(directory): the captures that the fixture nanguard_capture runs over")
    directory, what = _configured(config)
    if directory is not None and not directory.is_dir():
        raise pytest.UsageError(_absent(what, [directory]))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per capture; where there is none, one test that is skipped and says why."""
    if _FIXTURE not in metafunc.fixturenames:
        return
    directory = _directory(metafunc)
    if directory is None:
        reason = f"no captures: give --nanguard-captures DIR or mark the test with {_NAME}(DIR)"
        metafunc.parametrize(_FIXTURE, [_skipped(reason)], indirect=True)
        return
    from nanguard.capture.manifest import find_captures

    found = find_captures(directory)
    parameters = [pytest.param(path, id=path.relative_to(directory).as_posix()) for path in found if path != directory]
    if directory in found:  # the directory of one capture
        parameters = [pytest.param(directory, id=directory.name)]
    metafunc.parametrize(_FIXTURE, parameters or [_skipped(f"no captures in {directory}")], indirect=True)


@pytest.fixture
def nanguard_capture(request: pytest.FixtureRequest) -> Capture:
    """A capture, opened; a damaged one fails its own test only."""
    from nanguard.capture import load_capture
    from nanguard.errors import CaptureError

    if not hasattr(request, "param"):
        pytest.fail(f"{_FIXTURE} runs once per capture: name it among the arguments of the test", pytrace=False)
    try:
        return load_capture(request.param)
    except CaptureError as error:
        pytest.fail(str(error), pytrace=False)


def _skipped(reason: str) -> object:
    return pytest.param(None, marks=pytest.mark.skip(reason=reason), id="no captures")


def _directory(metafunc: pytest.Metafunc) -> Path | None:
    """The marker's directory, else the option's, else the ini file's; `None` where none is given."""
    marker = metafunc.definition.get_closest_marker(_NAME)
    return _configured(metafunc.config)[0] if marker is None else _marked(marker, metafunc)


def _configured(config: pytest.Config) -> tuple[Path | None, str]:
    option, ini = config.getoption("--nanguard-captures"), config.getini(_NAME)
    if option is not None:
        return config.invocation_params.dir / option, f"--nanguard-captures {option}"
    if ini:
        return config.rootpath / ini, f"{_NAME} = {ini} in {config.inipath}"
    return None, ""


def _marked(marker: pytest.Mark, metafunc: pytest.Metafunc) -> Path:
    values = [*marker.args, *(value for key, value in marker.kwargs.items() if key == "directory")]
    where = metafunc.definition.nodeid
    if len(values) != 1 or len(marker.args) + len(marker.kwargs) != 1 or not isinstance(values[0], (str, Path)):
        shown = ", ".join([*map(repr, marker.args), *(f"{key}={value!r}" for key, value in marker.kwargs.items())])
        raise pytest.Collector.CollectError(
            f"{where}: found {_NAME}({shown}); expected one directory: {_NAME}('captures')"
        )
    candidates = [base / values[0] for base in (metafunc.definition.path.parent, metafunc.config.rootpath)]
    for path in candidates:
        if path.is_dir():
            return path
    raise pytest.Collector.CollectError(_absent(f"{where}: {_NAME}({str(values[0])!r})", candidates))


def _absent(what: str, candidates: list[Path]) -> str:
    looked = " and no ".join(dict.fromkeys(map(str, candidates)))
    return f"{what}: there is no directory {looked}; expected one that holds captures of nanguard"
