"""What `torch.utils.checkpoint` leaves behind while it runs a function: frames, hooks, and who is to recompute it.

All of it is private to torch. Whatever looks different from what is known here counts as unknown.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import torch
from torch.utils import checkpoint

__all__ = ["hooks_of_saved_tensors", "recompute_attribute", "states", "target"]

_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def _code_of(function: Any) -> CodeType | None:
    return getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None


def _codes_within(code: CodeType | None) -> list[CodeType]:
    if code is None:
        return []
    return [code, *(inner for const in code.co_consts if isinstance(const, CodeType) for inner in _codes_within(const))]


_FILE = checkpoint.__file__
_CHECKPOINT = _code_of(checkpoint.checkpoint)
_FORWARD = _code_of(checkpoint.CheckpointFunction.forward)
_HARMLESS = frozenset(map(id, _codes_within(_code_of(checkpoint.checkpoint_sequential))))


def states(end: CodeType) -> list[Any] | None:
    """What torch keeps about each checkpoint that is running its function for the first time, from the innermost.

    The callers are asked, as hooks for saved tensors, which ordinary checkpoints leave too, show the innermost one only,
    and reentrant ones leave nothing else.

    Arguments:
        end: of what called this; callers further out do not count.

    Returns:
        `None` where that cannot be told, as in an ordinary recomputation.
    """
    try:
        return _states(sys._getframe(1), end)
    except (AttributeError, LookupError):
        return None


def _states(frame: FrameType | None, end: CodeType) -> list[Any]:
    found: list[Any] = []
    files = (_FILE, end.co_filename)
    reentrant = False
    while frame is not None:
        if frame.f_code.co_filename in files:
            code = frame.f_code
            if code is end:
                break
            if code is _FORWARD:
                found.append(frame.f_locals["ctx"])
                reentrant = True
            elif code is _CHECKPOINT:
                generator = frame.f_locals.get("gen")
                if generator is not None:
                    found.append(generator.gi_frame.f_locals["new_frame"])
                elif not reentrant:
                    raise LookupError
                reentrant = False
            elif code.co_filename == _FILE and id(code) not in _HARMLESS and not _is_called_by(frame, end):
                raise LookupError
        frame = frame.f_back
    return found


def _is_called_by(frame: FrameType, code: CodeType) -> bool:
    return frame.f_back is not None and frame.f_back.f_code is code


def recompute_attribute(state: Any) -> str | None:
    """Which attribute of such a state holds the function that recomputes it."""
    name = "recompute_fn" if type(state) is getattr(checkpoint, "_CheckpointFrame", None) else "run_function"
    return name if callable(getattr(state, name, None)) else None


def hooks_of_saved_tensors() -> list[Callable[..., Any]]:
    """What packs saved tensors, from the innermost. torch shows the top only, so each pair of hooks is lifted and put back."""
    found: list[Any] = []
    try:
        while (hooks := _top_hooks(True)) is not None:
            torch._C._autograd._pop_saved_tensors_default_hooks()
            found.append(hooks)
    finally:
        for pack, unpack in reversed(found):
            torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)
    return [pack for pack, _ in found]


def target(hook: Callable[..., Any]) -> tuple[bool, Any]:
    """Whether such a hook is part of a checkpoint, and if so, the state that it packs tensors for, if that can be told."""
    if getattr(hook, "__module__", None) != checkpoint.__name__:
        return False, None
    names = getattr(getattr(hook, "__code__", None), "co_freevars", ())
    closure = getattr(hook, "__closure__", None)
    return True, closure[names.index("frame")].cell_contents if closure and "frame" in names else None
