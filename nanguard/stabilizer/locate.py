"""Where in the user's code a call stands, what it says there, and by which names it knows its tensors."""

from __future__ import annotations

import inspect
import itertools
import linecache
import sys
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any, final

import torch
from torch import Tensor

from nanguard.algebra import Leaf
from nanguard.source import is_user_file

__all__ = ["FrameNames", "expression", "free_name", "named_callers", "user_frame"]


def user_frame() -> FrameType:
    """The deepest frame outside torch, Lightning, torchmetrics and nanguard itself (the outermost one, if there is none)."""
    frame = sys._getframe(1)
    while not is_user_file(frame.f_code.co_filename) and frame.f_back is not None:
        frame = frame.f_back
    return frame


def expression(frame: FrameType) -> tuple[int, str]:
    """Line and source of the expression that the frame is evaluating: of the whole line, before Python 3.11."""
    start, end, first, last = _position(frame.f_code, frame.f_lasti)
    if start is None or end is None:
        return frame.f_lineno, linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    lines = [linecache.getline(frame.f_code.co_filename, line) for line in range(start, end + 1)]
    if first is None or last is None or not any(lines):
        return start, "".join(lines).strip()
    # Columns count bytes.
    encoded = [line.encode() for line in lines]
    encoded[-1] = encoded[-1][:last]
    encoded[0] = encoded[0][first:]
    return start, " ".join(line.decode(errors="replace").strip() for line in encoded)


_SYNONYMS = {"logits": ("scores", "inputs"), "target": ("labels", "targets"), "index": ("indices", "positions")}


def free_name(default: str, taken: set[str]) -> str:
    """`default`, or a name like it, that does not stand for something else in the user's code."""
    candidates = (default, *(_SYNONYMS.get(default, ())), f"the_{default}")
    return default and next((name for name in candidates if name not in taken), candidates[-1])


@final
class FrameNames:
    """The names that a frame, or else one of its callers, has for tensors: local variables, and attributes of `self`."""

    def __init__(self, frame: FrameType) -> None:
        self._taken = {*frame.f_code.co_varnames, *frame.f_code.co_names}
        self._names: dict[int, str] = {}
        self._bases: dict[int, str] = {}
        for caller in named_callers(frame):
            for name, value in _local_tensors(caller):
                self._names.setdefault(id(value), name)

    def of(self, leaf: Leaf, default: str) -> str:
        """The variable that holds this tensor, or one that it is a view of; else `default`, or a name like it that is free."""
        value: Tensor = leaf.value
        name = self._names.get(id(value))
        if name is None and value._base is not None and value.numel() == value._base.numel():
            name = self._names.get(id(value._base))
        return name or free_name(default, self._taken)

    def counts_up(self, index: object, length: int) -> bool:
        """Whether an index is 0, 1, ..., length - 1. Tensors are only looked into where that needs no synchronisation."""
        if isinstance(index, (range, list)):
            return list(index) == list(range(length))
        if isinstance(index, Tensor) and index.device.type == "cpu" and index.dtype == torch.int64:
            return index.tolist() == list(range(length))
        return False


def named_callers(frame: FrameType) -> Iterator[FrameType]:
    """The frames whose names are used. Never beyond the second caller: names would stand for something else there."""
    return itertools.islice(_callers(frame), 3)


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        if is_user_file(frame.f_code.co_filename):
            yield frame
        frame = frame.f_back


def _local_tensors(frame: FrameType) -> list[tuple[str, Tensor]]:
    variables = frame.f_locals
    found = [(name, value) for name, value in variables.items() if isinstance(value, Tensor)]
    # Before Python 3.13 a function's f_locals is a snapshot that lives as long as the call, and would keep tensors alive.
    if sys.version_info < (3, 13) and frame.f_code.co_flags & inspect.CO_OPTIMIZED:
        variables.clear()
    return found


def _position(code: CodeType, instruction: int) -> tuple[int | None, int | None, int | None, int | None]:
    positions: Any = getattr(code, "co_positions", None)
    if positions is None or instruction < 0:
        return None, None, None, None
    return next(itertools.islice(positions(), instruction // 2, None), (None, None, None, None))
