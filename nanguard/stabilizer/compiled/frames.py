"""The frames that a node was traced in."""

from __future__ import annotations

import linecache
import re
from typing import TypeAlias

from torch import fx

__all__ = ["Frame", "frames_of", "indent", "is_of_subclass"]

# A file, a line, and the columns that are marked there.
Frame: TypeAlias = "tuple[str, int, tuple[int, int] | None]"

_FRAME = re.compile(r'^ *File "(.+)", line (\d+), in .+$')
_DISPATCH = re.compile(r'^ *File "(.+)", line (\d+), in __torch_function__$', re.MULTILINE)


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


def is_of_subclass(node: fx.Node) -> bool:
    """Whether a call was made by way of a subclass of tensors. Its results look plain in the graph, which puts it on later."""
    return any(_is_classmethod(file, int(line)) for file, line in _DISPATCH.findall(node.meta.get("stack_trace") or ""))


def _is_classmethod(file: str, line: int) -> bool:
    """Whether the `__torch_function__` around a line is that of a subclass; function modes have theirs as a plain method."""
    before = [text.strip() for text in linecache.getlines(file)[:line]]
    while before and not before[-1].startswith("def __torch_function__("):
        before.pop()
    for text in reversed(before[:-1]):
        if not text.startswith("@"):
            return False
        if text == "@classmethod":
            return True
    return not before


def indent(file: str, line: int) -> int:
    """How far a line is indented."""
    text = linecache.getline(file, line)
    return len(text) - len(text.lstrip())
