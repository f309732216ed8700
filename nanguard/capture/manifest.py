"""The manifest of a capture: its names, its checks, its neighbours on disk. Free of torch."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from nanguard.capture.schema import check_manifest
from nanguard.errors import CaptureError

__all__ = [
    "BATCH",
    "FORMAT_VERSION",
    "MANIFEST",
    "MODULE",
    "OPTIMIZER",
    "PARTIAL",
    "RNG",
    "capture_name",
    "class_reference",
    "find_captures",
    "read_manifest",
    "replay_command",
]

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
BATCH, RNG, MODULE, OPTIMIZER = (f"{name}.safetensors" for name in ("batch", "rng", "module", "optimizer"))
# Folders with this prefix are captures that are being written, or that a crash left behind.
PARTIAL = ".tmp-"


def capture_name(step: int, rank: int) -> str:
    """The folder of a capture, such as ``step-00000123-rank0``."""
    return f"step-{step:08d}-rank{rank}"


def find_captures(directory: str | Path) -> list[Path]:
    """All captures in a directory and below it, in a fixed order; those that a crash left half-written are not captures."""
    found = []
    for folder, names, files in os.walk(directory):
        names[:] = [name for name in names if not name.startswith(PARTIAL)]
        if MANIFEST in files:
            found.append(Path(folder))
            names.clear()
    return sorted(found)


def class_reference(cls: type) -> str:
    """How the command line finds a class again: ``pkg.mod:Name``, or ``path/to/script.py:Name`` for that of a script."""
    module, name = cls.__module__, cls.__qualname__
    if module == "__main__":
        script = getattr(sys.modules["__main__"], "__file__", None)
        module = _shortest(script) if script else "path/to/script.py"
    # A class inside a function cannot be reached by name: the user has to offer a factory.
    return f"{module}:{'factory' if '<locals>' in name else name}"


def _shortest(script: str) -> str:
    """Relative to the working directory where it lies below it."""
    relative = os.path.relpath(script)
    return os.path.abspath(script) if relative.startswith(os.pardir) else relative


def replay_command(path: str | Path, module: object, step: str = "training_step") -> str:
    """The command that replays a capture.

    Args:
        path: of the capture.
        module: the live module, its class, or ``pkg.mod:factory``.
        step: the method that was captured.
    """
    if not isinstance(module, str):
        module = class_reference(module if isinstance(module, type) else type(module))
    command = f"nanguard replay {shlex.quote(str(path))} --module {shlex.quote(module)}"
    return command if step == "training_step" else f"{command} --step {shlex.quote(step)}"


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Reads and checks the manifest of the capture at `path`.

    Raises:
        CaptureError: where there is no capture, or its manifest is damaged, incomplete or of another format version; the
            message names the file and the entry.
    """
    folder = Path(path)
    _expect_capture(folder)
    file = folder / MANIFEST
    manifest = _parse(file)
    version = manifest.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise CaptureError(
            f"{file}: found format_version {version!r}; this nanguard reads version {FORMAT_VERSION}. "
            f"Read the capture with the nanguard that wrote it ({_writer(manifest)}), or write it anew"
        )
    check_manifest(file, manifest)
    _check_files(folder, manifest["files"])
    return manifest


def _expect_capture(folder: Path) -> None:
    if (folder / MANIFEST).is_file():
        return
    if not folder.exists():
        raise CaptureError(f"{folder}: there is no such directory; expected a capture, a folder with a {MANIFEST}")
    if not folder.is_dir():
        raise CaptureError(f"{folder}: is a file; expected a capture, a folder with a {MANIFEST}")
    found = find_captures(folder)
    if found:
        shown = "".join(f"\n  {entry}" for entry in found[:20])
        more = f"\n  ... ({len(found)} in all)" if len(found) > 20 else ""
        raise CaptureError(f"{folder}: is not a capture but holds captures; name one of them:{shown}{more}")
    raise CaptureError(f"{folder}: has no {MANIFEST}; expected a capture, or a folder of captures")


def _parse(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise CaptureError(f"{file}: is nested too deeply to be a manifest; the file is damaged") from None
    except (OSError, ValueError) as error:
        raise CaptureError(f"{file}: cannot be read as JSON: {error}; the file is damaged") from None
    if not isinstance(data, dict):
        raise CaptureError(f"{file}: found {type(data).__name__}; expected a JSON object; the file is damaged")
    return data


def _check_files(folder: Path, files: dict[str, Any]) -> None:
    # Only names that a capture can have are looked at: what stands in the manifest never chooses a path.
    for name in (BATCH, RNG, MODULE, OPTIMIZER):
        if name not in files:
            continue
        file = folder / name
        if not file.is_file():
            raise CaptureError(f"{file}: is missing; the capture is incomplete, copy it again")
        if file.stat().st_size != files[name]:
            raise CaptureError(
                f"{file}: found {file.stat().st_size} bytes; expected {files[name]}; it is truncated or damaged, copy it again"
            )


def _writer(manifest: dict[str, Any]) -> str:
    versions = manifest.get("versions")
    found = versions.get("nanguard") if isinstance(versions, dict) else None
    return f"nanguard {found}" if found else "unknown"
