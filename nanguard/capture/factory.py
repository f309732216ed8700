"""Finds and builds the module that ``--module`` names."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanguard.capture.manifest import MANIFEST
from nanguard.errors import CaptureError

if TYPE_CHECKING:
    from nanguard.capture.load import Capture

__all__ = ["build_module", "find_factory"]


def find_factory(reference: str) -> Any:
    """The class or function that ``pkg.mod:name`` or ``path/to/file.py:name`` names; its module is imported.

    Raises:
        CaptureError: where there is no such module or name, or importing it fails.
    """
    source, _, name = reference.rpartition(":")
    if not source or not name:
        raise CaptureError(f"--module: found {reference!r}; expected pkg.mod:factory or path/to/file.py:factory")
    found: Any = _import(source, reference)
    for part in name.split("."):
        if not hasattr(found, part):
            raise CaptureError(
                f"--module {reference}: {source} has no {part!r}; expected a LightningModule class or a function"
            )
        found = getattr(found, part)
    if not callable(found):
        raise CaptureError(
            f"--module {reference}: found {type(found).__name__}; expected a class or a function that builds a module"
        )
    return found


def build_module(factory: Any, capture: Capture) -> Any:
    """What `factory` builds: called without arguments, or, a class that needs some, with the captured hyperparameters.

    Raises:
        CaptureError: where it cannot be built, or what it builds is no module.
    """
    from torch import nn

    try:
        module = factory()
    except TypeError as error:
        module = _from_hparams(factory, capture, error)
    except Exception as error:
        raise CaptureError(f"--module: {factory.__name__}() raised {type(error).__name__}: {error}") from error
    if not isinstance(module, nn.Module):
        raise CaptureError(
            f"--module: {factory.__name__}() returned {type(module).__name__}; expected a LightningModule"
        )
    return module


def _from_hparams(factory: Any, capture: Capture, error: TypeError) -> Any:
    nodes = capture.manifest["module"]["hparams"]
    if not isinstance(factory, type) or not nodes:
        reason = "the capture holds no hyperparameters" if isinstance(factory, type) else "a function gets no arguments"
        raise CaptureError(
            f"--module: {factory.__name__}() cannot be called: {error}; {reason}. "
            "Name a function that builds the module without arguments"
        ) from error
    from nanguard.capture.sections import decoded

    hparams = decoded(capture.path / MANIFEST, nodes)
    try:
        return factory(**hparams)
    except Exception as second:
        raise CaptureError(
            f"--module: {factory.__name__}(**hyperparameters of the capture) raised {type(second).__name__}: {second}. "
            "Name a function that builds the module without arguments"
        ) from second


def _import(source: str, reference: str) -> Any:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        if source.endswith(".py"):
            return _from_file(Path(source), reference)
        return importlib.import_module(source)
    except CaptureError:
        raise
    except ModuleNotFoundError as error:
        hint = (
            f"looked in {Path.cwd()} and the environment"
            if error.name == source.partition(".")[0] or error.name == source
            else str(error)
        )
        raise CaptureError(f"--module {reference}: {source} cannot be imported ({hint})") from error
    except (Exception, SystemExit) as error:
        raise CaptureError(
            f"--module {reference}: importing {source} raised {type(error).__name__}: {error}\n"
            'A script that trains when it is imported needs its training under `if __name__ == "__main__":`'
        ) from error


def _from_file(file: Path, reference: str) -> Any:
    if not file.is_file():
        raise CaptureError(f"--module {reference}: there is no file {file}; it is looked for from {Path.cwd()}")
    # Under its own name, and with its neighbours at hand, as when the script itself runs.
    sys.path.insert(0, str(file.resolve().parent))
    loaded = sys.modules.get(file.stem)
    if loaded is not None and Path(getattr(loaded, "__file__", None) or "").resolve() == file.resolve():
        return loaded
    name = file.stem if loaded is None else f"_nanguard_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
