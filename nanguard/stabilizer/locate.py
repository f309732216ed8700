"""Where in the user's code a call stands, what it says there, and by which names it knows its tensors."""

from __future__ import annotations

import inspect
import itertools
import linecache
import sys
from collections.abc import Hashable
from types import CodeType, FrameType
from typing import Any, final

import torch
from torch import Tensor

from nanguard.algebra import Leaf
from nanguard.source import is_user_file
from nanguard.stabilizer import environment

__all__ = ["FrameNames", "Placeholders", "expression", "free_name", "named_callers", "user_frame"]


def user_frame() -> FrameType:
    """The deepest frame outside torch, Lightning, torchmetrics and nanguard itself (the outermost one, if there is none)."""
    frame = sys._getframe(1)
    while not is_user_file(frame.f_code.co_filename):
        outer = frame.f_back
        if outer is None:
            return frame
        frame = outer
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


@final
class Placeholders:
    """Names for tensors that the user's code has no name for: one for each, and none that means something else there."""

    def __init__(self, taken: set[str]) -> None:
        self._taken = taken
        self._given: dict[Hashable, str] = {}

    def name(self, key: Hashable, default: str) -> str:
        """`default`, or a name like it; the same for the same key."""
        if not default:
            return ""
        if key not in self._given:
            free, used = free_name(default, self._taken), set(self._given.values())
            numbered = (f"{free}_{number}" for number in itertools.count(2))
            self._given[key] = next(name for name in itertools.chain([free], numbered) if name not in used)
        return self._given[key]

    def known(self, key: Hashable, default: str, *, signed: bool) -> str | None:
        """The name of a tensor of which only the negative (`signed`) or a multiple is there, which needs none of its own."""
        return self.name(key, default) if signed or key in self._given else None


_LOOKED_AT = 1 << 16
_SYNONYMS = {"logits": ("scores", "inputs"), "target": ("labels", "targets"), "index": ("indices", "positions")}


def free_name(default: str, taken: set[str]) -> str:
    """`default`, or a name like it, that does not stand for something else in the user's code."""
    candidates = (default, *(_SYNONYMS.get(default, ())), f"the_{default}")
    return default and next((name for name in candidates if name not in taken), candidates[-1])


@final
class FrameNames:
    """The names that a frame, or else one of its callers, has for tensors: local variables, and attributes of `self`."""

    def __init__(self, frame: FrameType) -> None:
        self._placeholders = Placeholders({*frame.f_code.co_varnames, *frame.f_code.co_names})
        self._names: dict[Hashable, str] = {}
        self._known: list[tuple[str, Tensor]] = []
        self._alive: list[Any] = []
        for caller in named_callers(frame):
            self._known += _local_tensors(caller)
            for name, value in self._known:
                self._names.setdefault(id(value), name)
                self._names.setdefault(self._made_by(value), name)

    def of(self, leaf: Leaf, default: str) -> str:
        """The variable that holds this tensor, or how it was made of one; else `default`, or a name like it that is free.

        What it is the negative or a multiple of is found in the graph, so that `exp(-x)` is told from `exp(x)`.
        """
        value: Tensor = leaf.value
        name = self._names.get(id(value)) or self._names.get(self._made_by(value))
        if name is None and value._base is not None and _is_base(value, value._base, reshaped=default == "target"):
            name = self._names.get(id(value._base))
        return name or self._derived(value, default) or self._placeholders.name(self._made_by(value), default)

    def _made_by(self, value: Tensor) -> Hashable:
        """What tells a tensor from others, although it is held by another object: its place in the graph, if it has one."""
        return id(value) if value.grad_fn is None else self._key(value.grad_fn, value.output_nr)

    def _key(self, node: Any, number: int) -> Hashable:
        variable = getattr(node, "variable", None)
        self._alive.append(node)  # identities of what is gone are given away again
        return (id(node), number) if variable is None else id(variable)

    def _derived(self, value: Tensor, default: str) -> str | None:
        """The negative of a tensor, or a multiple by a number of one that is named already."""
        if value.grad_fn is None:
            return self._negative(value)
        written = _written_as(value)
        if written is None or not default:
            return None
        base = self._key(*value.grad_fn.next_functions[0])
        name = self._names.get(base) or self._placeholders.known(base, default, signed=written == "-{0}")
        return written.format(name) if name else None

    def _negative(self, value: Tensor) -> str | None:
        """The negative of a tensor that has a name; without a graph, only its numbers tell."""
        if not value.is_cpu or value.numel() > _LOOKED_AT or not value.is_floating_point():
            return None
        if environment.in_transform():  # there are no numbers yet
            return None
        same = [(name, found) for name, found in self._known if found.is_cpu and found.dtype == value.dtype]
        with torch.no_grad(), torch._C.DisableTorchFunction():
            return next((f"-{name}" for name, found in same if torch.equal(found, -value) and found.any()), None)

    def counts_up(self, index: object, length: int) -> bool:
        """Whether an index is 0, 1, ..., length - 1. Tensors are only looked into where that needs no synchronisation."""
        if isinstance(index, (range, list)):
            return list(index) == list(range(length))
        if isinstance(index, Tensor) and index.device.type == "cpu" and index.dtype == torch.int64:
            if environment.in_transform():  # there are no numbers yet
                return False
            return index.tolist() == list(range(length))
        return False


def _is_base(view: Tensor, base: Tensor, *, reshaped: bool) -> bool:
    """Whether a view may go by the name of its base; where dims do not matter, it may have been reshaped."""
    if reshaped:
        return view.numel() == base.numel() and view.is_contiguous() and base.is_contiguous()
    return (view.shape, view.stride()) == (base.shape, base.stride())


def _written_as(value: Tensor) -> str | None:
    """How the user wrote a tensor that was computed from one other one, as far as the graph tells."""
    node, kind = value.grad_fn, type(value.grad_fn).__name__
    if kind == "NegBackward0":
        return "-{0}"
    if kind not in ("MulBackward0", "DivBackward0") or environment.has_hooks_of_saved_tensors():
        return None
    assert node is not None
    try:
        factor = node._saved_other  # type: ignore[attr-defined]
    except RuntimeError:  # it was edited, or a backward pass has let go of it
        return None
    if factor is None or node.next_functions[0][0] is None or node.next_functions[1][0] is not None:
        return None
    # Numbers that stand in the code have dtypes of their own.
    if (
        factor.ndim
        or not factor.is_cpu
        or factor.dtype not in (torch.int64, torch.float64)
        or factor.dtype == value.dtype
    ):
        return None
    return f"{factor.item()} * {{0}}" if kind == "MulBackward0" else f"{{0}} / {factor.item()}"


def named_callers(frame: FrameType) -> list[FrameType]:
    """The frames whose names are used. Never beyond the second caller: names would stand for something else there."""
    found: list[FrameType] = []
    outer: FrameType | None = frame
    while outer is not None and len(found) < 3:
        if is_user_file(outer.f_code.co_filename):
            found.append(outer)
        outer = outer.f_back
    return found


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
