"""From the dotted names of the algebra to the functions of the installed torch."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from nanguard.algebra import Law, Spelling, laws, misuses

__all__ = ["function", "law_table", "misuse_table"]


@functools.cache
def law_table() -> dict[Any, tuple[Law, Spelling]]:
    """Every function that a law knows, as torch function modes report it.

    Raises `RuntimeError` where a name that is not marked optional does not exist, or two laws claim the same function: a law
    that silently never fires would be worse.
    """
    return _table(laws())


@functools.cache
def misuse_table() -> dict[Any, tuple[Law, Spelling]]:
    """Every function whose calls are only looked at, in the same way."""
    return _table(misuses())


def _table(known: tuple[Law, ...]) -> dict[Any, tuple[Law, Spelling]]:
    table: dict[Any, tuple[Law, Spelling]] = {}
    for law in known:
        for spelling in law.spellings:
            try:
                found = function(spelling.path)
            except AttributeError:
                if spelling.optional:
                    continue
                raise RuntimeError(
                    f"law {law.name!r}: torch {torch.__version__} has no {spelling.path!r}; "
                    "expected a function, or a spelling that is marked optional with '?'"
                ) from None
            other = table.setdefault(found, (law, spelling))[0]
            if other is not law:
                raise RuntimeError(f"{spelling.path!r} is claimed by two laws, {other.name!r} and {law.name!r}")
    return table


@functools.cache
def function(path: str) -> Callable[..., Any]:
    """The object that a dotted name stands for. Raises `AttributeError` where there is none."""
    head, *rest = path.split(".")
    found: Any = torch if head == "torch" else importlib.import_module(path.rpartition(".")[0])
    for name in rest if head == "torch" else rest[-1:]:
        found = getattr(found, name)
    return found  # type: ignore[no-any-return]
