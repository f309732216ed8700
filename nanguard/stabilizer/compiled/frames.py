"""The frames that a node was traced in."""

from __future__ import annotations

import linecache
import re
from typing import TypeAlias

from torch import fx

__all__ = ["Frame", "frames_of", "indent"]

# A file, a line, and the columns that are marked there.
Frame: TypeAlias = "tuple[str, int, tuple[int, int] | None]"

_FRAME = re.compile(r'^ *File "(.+)", line (\d+), in .+$')


def frames_of(node: fx.Node) -> list[Frame]:
    """The frames, from the outermost to the innermost."""
    found: list[Frame] = []
    for text in (node.meta.get("stack_trace") or "").splitlines():
        frame = _FRAME.match(text)
        if frame is not None:
            found.append((frame[1], int(frame[2]), None))
        elif found and text.strip() and not text.strip().strip("^~"):
            # The source is shown four columns in, and without its own indentation.
            file, line, _ = found[-1]
            shift = indent(file, line) - 4
            found[-1] = (file, line, (len(text) - len(text.lstrip()) + shift, len(text.rstrip()) + shift))
    return found


def indent(file: str, line: int) -> int:
    """How far a line is indented."""
    text = linecache.getline(file, line)
    return len(text) - len(text.lstrip())
