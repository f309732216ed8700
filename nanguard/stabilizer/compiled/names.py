"""Where in the user's code a node comes from, what it says there, and by which names it knows its tensors."""

from __future__ import annotations

import ast
import functools
import linecache
import operator
import re
from collections.abc import Iterator
from typing import Any, final

import torch
from torch import fx

from nanguard.algebra import Leaf, Unrecognised
from nanguard.algebra.render import replacement as written
from nanguard.algebra.render import write
from nanguard.incident import Swap
from nanguard.source import is_user_file
from nanguard.stabilizer.compiled.frames import Frame, frames_of, indent
from nanguard.stabilizer.compiled.plan import Replacement
from nanguard.stabilizer.compiled.reading import Kept, counts_up
from nanguard.stabilizer.locate import Placeholders

__all__ = ["swap_of"]

_OPERATORS = {"Add": ("add",), "Sub": ("sub",), "Mult": ("mul",), "Div": ("truediv", "div"), "Pow": ("pow",)}
_NEGATIVES = (operator.neg, torch.neg, "neg")
_PRODUCTS = (operator.mul, torch.mul, "mul")
_RATIOS = (operator.truediv, torch.div, "div")
_LOCAL = re.compile(r"^L\['(\w+)'\]((?:\.[A-Za-z_]\w*)*)$")
_STATE = re.compile(r"\._(?:parameters|buffers|modules)\['(\w+)'\]")


def swap_of(replacement: Replacement) -> Swap:
    """The record of a replacement."""
    frames = _user_frames(replacement.node)
    file, line, carets = frames[-1] if frames else ("", 0, None)
    target = replacement.node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    start, original = _expression(file, line, carets, name)
    names = _NodeNames(frames)
    try:
        text = written(replacement.rule, replacement.told, names)
    except Unrecognised:  # the rule's own wording depends on sizes that are not known
        text = write(replacement.told, names)
    return Swap(replacement.rule.code, file, start, original, text)


def _user_frames(node: fx.Node) -> list[Frame]:
    """The frames of the user's code (all frames, if there is none)."""
    frames = frames_of(node)
    return [frame for frame in frames if is_user_file(frame[0])] or frames


def _expression(file: str, line: int, columns: tuple[int, int] | None, name: str) -> tuple[int, str]:
    """Line and source of the expression that calls `name` there."""
    text = linecache.getline(file, line).rstrip()
    first, last = columns if columns is not None else (indent(file, line), len(text))
    # What is marked may end beyond the call, with the methods of its result, or before it, with the line.
    found = [node for node in _expressions(file, line) if _calls(node, name)]
    found = [node for node in found if columns is None or len(text.encode()[: node.col_offset].decode()) == first]
    if not found:
        return line, text[first:last].strip()
    node = min(found, key=lambda node: (node.end_lineno, node.end_col_offset))
    lines = [linecache.getline(file, number) for number in range(line, node.end_lineno + 1)]
    lines[-1] = lines[-1].encode()[: node.end_col_offset].decode()
    lines[0] = lines[0].encode()[node.col_offset :].decode()
    return line, " ".join(part.strip() for part in lines)


def _calls(node: Any, name: str) -> bool:
    """Whether an expression calls a function or method of that name, or uses an operator."""
    if isinstance(node, ast.Call):
        return name in (getattr(node.func, "attr", None), getattr(node.func, "id", None))
    return isinstance(node, ast.BinOp) and name in _OPERATORS.get(type(node.op).__name__, ())


@functools.lru_cache(maxsize=64)
def _parsed(file: str) -> ast.Module | None:
    try:
        return ast.parse("".join(linecache.getlines(file)))
    except (SyntaxError, ValueError):
        return None


def _expressions(file: str, line: int) -> Iterator[Any]:
    tree = _parsed(file)
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, ast.expr) and node.lineno == line:
            yield node


def _names_in_function(file: str, line: int) -> tuple[set[str], set[str]]:
    """The variables of the function around a line, and all names that it uses."""
    tree, around = _parsed(file), None
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            inside = node.lineno <= line <= (node.end_lineno or node.lineno)
            if inside and (around is None or node.lineno >= around.lineno):
                around = node
    if around is None:
        return set(), set()
    spec = around.args
    taken = {arg.arg for arg in (*spec.posonlyargs, *spec.args, *spec.kwonlyargs)}
    names = [node for node in ast.walk(around) if isinstance(node, ast.Name)]
    return taken | {name.id for name in names if isinstance(name.ctx, ast.Store)}, taken | {name.id for name in names}


@final
class _NodeNames:
    """The names that the user's functions have for nodes: dynamo names a node after the variable that holds it."""

    def __init__(self, frames: list[Frame]) -> None:
        self._variables: set[str] = set()
        self._placeholders = Placeholders(set())
        # Never beyond the second caller: names would stand for something else there.
        for place, (file, line, _) in enumerate(reversed(frames[-3:])):
            variables, used = _names_in_function(file, line)
            self._variables |= variables
            if place == 0:
                self._placeholders = Placeholders(used)

    def of(self, leaf: Leaf, default: str) -> str:
        """The variable that holds this tensor, or how it was made of one; else `default`, or a name like it that is free."""
        value = leaf.value.node if isinstance(leaf.value, Kept) else leaf.value
        if not isinstance(value, fx.Node):
            return self._placeholders.name(id(value), default)
        return self._name(value) or self._derived(value, default) or self._placeholders.name(value, default)

    def _derived(self, node: fx.Node, default: str) -> str | None:
        """The negative of a tensor, or a multiple by a number of one that is named already."""
        written = _written_as(node)
        if written is None or not default:
            return None
        base = next(arg for arg in node.args if isinstance(arg, fx.Node))
        name = self._name(base) or self._placeholders.known(base, default, signed=written == "-{0}")
        return written.format(name) if name else None

    def counts_up(self, index: object, length: int) -> bool:
        """Whether an index is 0, 1, ..., length - 1."""
        if isinstance(index, (range, list)):
            return list(index) == list(range(length))
        return isinstance(index, fx.Node) and counts_up(index, length)

    def _name(self, node: fx.Node) -> str | None:
        if node.op == "placeholder":
            source = getattr(node.meta.get("grapharg"), "source", None)
            found = _LOCAL.match(_STATE.sub(r".\1", _source_name(source)))
            # A function compiled by itself: its own arguments, or attributes of its module.
            return None if found is None or found[1] not in self._variables | {"self"} else found[1] + found[2]
        for name in (node.name, node.name.rpartition("_")[0] if node.name.rpartition("_")[2].isdigit() else ""):
            if name in self._variables:
                return name
        return None


def _written_as(node: fx.Node) -> str | None:
    """How the user wrote a tensor that was computed from one other one."""
    if node.target in _NEGATIVES and len(node.args) == 1 and isinstance(node.args[0], fx.Node):
        return "-{0}"
    if len(node.args) != 2 or node.kwargs:
        return None
    left, right = node.args
    if node.target in _PRODUCTS and isinstance(left, fx.Node) and isinstance(right, (int, float)):
        return f"{right} * {{0}}"
    if node.target in _PRODUCTS and isinstance(right, fx.Node) and isinstance(left, (int, float)):
        return f"{left} * {{0}}"
    return f"{{0}} / {right}" if node.target in _RATIOS and isinstance(right, (int, float)) else None


def _source_name(source: Any) -> str:
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)
