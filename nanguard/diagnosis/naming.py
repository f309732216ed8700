"""What things are called: operations, the modules they run in, and the lines that call them."""

from __future__ import annotations

import sys
import sysconfig
from types import CodeType, FrameType
from typing import Any

from torch import nn

from nanguard.diagnosis.records import Place
from nanguard.source import Frame, is_blamed_file, source_line

__all__ = ["clean_name", "function_of", "module_names", "place_here", "recomputing", "with_source"]

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")
_USER, _LIBRARY, _OTHER, _APPLY, _CHECKPOINT, _ENGINE, _START = range(7)
_KINDS: dict[CodeType, int] = {}
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("purelib", "platlib")})


def clean_name(name: str) -> str:
    """A qualified name as the user would write it: without what `torch.compile` and checkpoint wrappers put in between."""
    if not any(wrapper in name for wrapper in _WRAPPERS):
        return name
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def module_names(root: nn.Module) -> dict[int, str]:
    """The qualified name of each submodule, by identity."""
    return {id(module): clean_name(name) for name, module in root.named_modules()}


def function_of(node: Any) -> str | None:
    """The class of a custom `autograd.Function` whose backward pass is running."""
    function = getattr(type(node), "_forward_cls", None)
    return None if function is None or _is_torchs(function) else str(function.__name__)


def place_here(within: bool = False) -> Place:
    """Who has called the operation that is being dispatched.

    Args:
        within: whether to look no further than the autograd engine: only code that runs in the backward pass itself counts.
    """
    frame: FrameType | None = sys._getframe(2)
    engine = False
    user = caller = call = function = None
    while frame is not None:
        kind = _kind(frame.f_code)
        if kind == _START:
            break
        if kind == _ENGINE and user is None:
            engine = True
            if within:
                break
        if kind in (_USER, _LIBRARY):
            if user is None or (kind == _USER and caller is None) or (function is not None and call is None):
                here = Frame(frame.f_code.co_filename, frame.f_lineno, "")
                user = user or here
                caller = caller or (here if kind == _USER else None)
                call = call or (here if function is not None else None)
        elif kind == _APPLY and function is None:
            cls = frame.f_locals.get("cls")
            function = None if cls is None or _is_torchs(cls) else str(cls.__name__)
        frame = frame.f_back
    return Place(user, caller if caller is not user else None, function, call, engine)


def recomputing() -> bool:
    """Whether a forward pass is being computed again inside a backward pass, for a checkpoint."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        kind = _kind(frame.f_code)
        if kind == _CHECKPOINT:
            return True
        if kind in (_ENGINE, _START):
            return False
        frame = frame.f_back
    return False


def with_source(frame: Frame | None) -> Frame | None:
    """The frame with the text of its line."""
    return None if frame is None else Frame(frame.file, frame.line, source_line(frame.file, frame.line))


def _kind(code: CodeType) -> int:
    kind = _KINDS.get(code)
    if kind is None:
        kind = _KINDS[code] = _kind_of(code.co_filename.replace("\\", "/"), code.co_name)
    return kind


def _kind_of(file: str, name: str) -> int:
    if file.endswith("nanguard/diagnosis/rerun.py"):
        return _START
    if file.endswith("torch/utils/checkpoint.py"):
        return _CHECKPOINT
    if file.endswith("torch/autograd/graph.py") and name == "_engine_run_backward":
        return _ENGINE
    if file.endswith("torch/autograd/function.py") and name == "apply":
        return _APPLY
    if not is_blamed_file(file):
        return _OTHER
    return _LIBRARY if file.startswith(_INSTALLED) else _USER


def _is_torchs(function: type) -> bool:
    return function.__module__.split(".")[0] in ("torch", "lightning", "nanguard")
