"""Where in the user's code something happened: the deepest frame outside torch, lightning and nanguard."""

from __future__ import annotations

import functools
import importlib.util
import linecache
import os
import sys
from dataclasses import dataclass
from types import FrameType
from typing import Any

__all__ = ["Frame", "is_blamed_file", "is_user_file", "is_users_hook", "source_line", "user_frame"]

_LIBRARIES = ("torch", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "torchmetrics")


@dataclass(frozen=True)
class Frame:
    """A line of source: the file, its 1-based number and its text."""

    file: str
    line: int
    code: str


def user_frame(frame: FrameType | None = None) -> Frame | None:
    """The deepest frame of the user's code at or above `frame` (by default the caller's), or `None` where there is
    none.
    """
    frame = frame or sys._getframe(1)
    while frame is not None and not is_user_file(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return None
    file, line = frame.f_code.co_filename, frame.f_lineno
    return Frame(file, line, linecache.getline(file, line, frame.f_globals).strip())


def source_line(file: str, line: int) -> str:
    """The text of a line of source, without the blanks around it; empty where the file cannot be read."""
    return linecache.getline(file, line).strip()


@functools.cache
def is_blamed_file(file: str) -> bool:
    """Whether a line of this file may be called the origin of a failure: the user's, or a library's that computes losses."""
    if is_user_file(file):
        return True
    folders = _library_folders(("torchmetrics",))
    return os.path.abspath(file).startswith(folders[1:])


@functools.cache
def is_user_file(file: str) -> bool:
    """Whether a code object's file is neither torch's, lightning's nor nanguard's own (nor the interpreter's)."""
    # Code that torch.compile or torch.fx has generated is nobody's source.
    if file.startswith(("<frozen", "<eval_with_key>")) or file.endswith(
        ("contextlib.py", "functools.py", "threading.py")
    ):
        return False
    return not os.path.abspath(file).startswith(_library_folders())


@functools.cache
def _library_folders(names: tuple[str, ...] = _LIBRARIES) -> tuple[str, ...]:
    """The folders of nanguard and of these packages."""
    own = os.path.dirname(os.path.abspath(__file__))
    folders = [own]
    for name in names:
        spec = importlib.util.find_spec(name)
        folders.extend(spec.submodule_search_locations or () if spec else ())
    return tuple(os.path.join(os.path.abspath(folder), "") for folder in folders)


def is_users_hook(owner: Any, name: str) -> bool:
    """Whether a module overrides a hook of LightningModule, or a callback one of Callback, in the user's own code."""
    home = getattr(getattr(type(owner), name, None), "__module__", "")
    return not home.startswith(("lightning.", "pytorch_lightning.", "nanguard."))
