"""State outside a module that its code may change: globals, closures, attributes of classes, the environment.

A savepoint does not hold it, because a search through code before every step would cost too much, and a step that is left out
may well have counted. A step that is only run again for a diagnosis must not: whoever counts calls would count that run, too.
"""

from __future__ import annotations

import os
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from nanguard.values import ATOMIC, Undo, is_users, save_value

__all__ = ["unchanged"]

_CODE = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, type, property)


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """What code of the user's own reaches outside the module is afterwards as it was before the block."""
    undo = _save(module)
    try:
        yield
    finally:
        undo()


def _save(module: nn.Module) -> Undo:
    undos: list[Undo] = []
    search = _Search()
    for kind in {type(entry) for entry in module.modules()}:
        search.look_into_class(kind)
    for names, found in search.places:
        undos.append(_rebind(names, found))
        undos.extend(save_value(value) for value in found.values() if type(value) not in ATOMIC)
    for cell, value in search.cells:
        undos.append(lambda cell=cell, value=value: setattr(cell, "cell_contents", value))  # type: ignore[misc]
        undos.append(save_value(value))
    environment = dict(os.environ)

    def undo() -> None:
        for step in undos:
            step()
        if dict(os.environ) != environment:
            os.environ.clear()
            os.environ.update(environment)

    return undo


def _rebind(names: Any, found: dict[str, Any]) -> Undo:
    """Gives the names of a dictionary of globals, or of a class, the values that they had."""

    def undo() -> None:
        for name, value in found.items():
            if isinstance(names, dict):
                names[name] = value
            elif names.__dict__.get(name) is not value:
                setattr(names, name, value)

    return undo


class _Search:
    """Follows the user's own classes and functions to the data that they name."""

    def __init__(self) -> None:
        self.places: list[tuple[Any, dict[str, Any]]] = []
        self.cells: list[tuple[types.CellType, Any]] = []
        self._seen: set[int] = set()

    def look_into_class(self, kind: type) -> None:
        for base in kind.__mro__:
            if id(base) in self._seen or not is_users(base):
                continue
            self._seen.add(id(base))
            own = {name: value for name, value in vars(base).items() if not name.startswith("__")}
            self.places.append((base, {name: value for name, value in own.items() if _is_data(value)}))
            for value in own.values():
                self.look_into(value)

    def look_into(self, value: Any) -> None:
        """Looks into a function or class, if it is one of the user's own."""
        value = getattr(value, "__func__", getattr(value, "fget", value))
        value = getattr(value, "__wrapped__", value)
        if isinstance(value, type):
            self.look_into_class(value)
        if not isinstance(value, types.FunctionType) or id(value) in self._seen or not is_users(value):
            return
        self._seen.add(id(value))
        self._look_at_globals(value.__globals__, _names(value.__code__))
        for cell in value.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            if _is_data(content):
                self.cells.append((cell, content))
            else:
                self.look_into(content)

    def _look_at_globals(self, names: dict[str, Any], wanted: Iterable[str]) -> None:
        found = {name: names[name] for name in wanted if name in names}
        self.places.append((names, {name: value for name, value in found.items() if _is_data(value)}))
        for value in found.values():
            self.look_into(value)


def _names(code: types.CodeType) -> set[str]:
    """The names that a function and the functions in it use."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names(constant)
    return found


def _is_data(value: Any) -> bool:
    """Whether a value is somebody's state, rather than code, or a part of nanguard that has to go on."""
    if isinstance(value, (*_CODE, staticmethod, classmethod, types.MemberDescriptorType, types.GetSetDescriptorType)):
        return False
    if isinstance(value, (Dataset, nn.Module)):  # data, which a step only reads, and modules, which savepoints hold
        return False
    return not type(value).__module__.startswith(("nanguard.", "lightning.", "_abc"))
