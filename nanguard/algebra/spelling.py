"""Spellings: the many names and signatures under which one operation is called. No torch in here."""

from __future__ import annotations

import ast
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

__all__ = ["Parameter", "Spelling", "spellings"]

# Torch accepts numpy's names for these, in every function that has them.
ALIASES = {
    "axis": "dim",
    "keepdims": "keepdim",
    "self": "input",
    "x": "input",
    "a": "input",
    "x1": "input",
    "x2": "other",
}

_OPERATORS = "add sub mul div truediv floordiv mod pow matmul and or xor lshift rshift"
_IN_PLACE = frozenset({"__setitem__", *(f"__i{name}__" for name in _OPERATORS.split())})

_REQUIRED = object()


@final
@dataclass(frozen=True)
class Parameter:
    """One parameter of a signature; `star` takes all further positional arguments as a tuple."""

    name: str
    default: Any = _REQUIRED
    keyword_only: bool = False
    star: bool = False


@final
@dataclass(frozen=True)
class Spelling:
    """One name of an operation and the signature it has there.

    Attributes:
        path: dotted name, such as ``torch.nn.functional.softmax``; a property is spelled ``torch.Tensor.T.__get__``.
        parameters: canonical parameter names in the order of this spelling.
        optional: whether older versions of torch may lack it.
    """

    path: str
    parameters: tuple[Parameter, ...]
    optional: bool = False

    @functools.cached_property
    def in_place(self) -> bool:
        """Whether it writes its result into its first argument."""
        name = self.path.rpartition(".")[2]
        return (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE

    @functools.cached_property
    def edits(self) -> bool:
        """Whether it writes into its first argument, or can be asked to."""
        return self.in_place or self._inplace >= 0

    def asks_to_edit(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call says `inplace`."""
        place = self._inplace
        return place >= 0 and bool(args[place] if place < len(args) else kwargs.get("inplace"))

    @functools.cached_property
    def _inplace(self) -> int:
        return next((place for place, known in enumerate(self.parameters) if known.name == "inplace"), -1)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        """Arguments by canonical name with defaults filled in, or `None` where the call does not fit the signature."""
        bound: dict[str, Any] = {}
        rest = list(args)
        for parameter in self.parameters:
            if parameter.star:
                bound[parameter.name] = tuple(rest)
                rest = []
            elif rest and not parameter.keyword_only:
                bound[parameter.name] = rest.pop(0)
        if rest:
            return None
        known = {parameter.name: parameter for parameter in self.parameters}
        for key, value in kwargs.items():
            name = key if key in known else ALIASES.get(key, key)
            parameter = known.get(name)  # type: ignore[assignment]
            if parameter is None or (name in bound and not (parameter.star and bound[name] == ())):
                return None
            bound[name] = (value,) if parameter.star else value
        for name, parameter in known.items():
            if name not in bound:
                if parameter.default is _REQUIRED:
                    return None
                bound[name] = parameter.default
        return bound


def spellings(text: str) -> tuple[Spelling, ...]:
    """Read spellings, one signature per line, in Python's notation; ``?`` in front marks an optional one.

    >>> spellings("torch.sum(input, dim=None, keepdim=False, *, dtype=None)")[0].path
    'torch.sum'
    """
    return tuple(_spelling(line) for line in map(str.strip, text.strip().splitlines()) if line)


def _spelling(line: str) -> Spelling:
    optional, line = line.startswith("?"), line.removeprefix("?").strip()
    path, _, signature = line.partition("(")
    function = ast.parse(f"def signature({signature}: ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    spec = function.args
    missing = len(spec.args) - len(spec.defaults)
    found = [
        Parameter(arg.arg, _REQUIRED if place < missing else ast.literal_eval(spec.defaults[place - missing]))
        for place, arg in enumerate(spec.args)
    ]
    if spec.vararg is not None:
        found.append(Parameter(spec.vararg.arg, star=True))
    for arg, default in zip(spec.kwonlyargs, spec.kw_defaults, strict=True):
        value = _REQUIRED if default is None else ast.literal_eval(default)
        found.append(Parameter(arg.arg, value, keyword_only=True))
    return Spelling(path, tuple(found), optional)
