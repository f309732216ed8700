"""Iterators that a module holds, such as that of a second loader: what a step takes out of one cannot be put back.

A step that is only run again takes from a copy instead, where there is one. Of a generator or a loader's iterator there is
none, and the step fails that asks it.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from nanguard.values import is_users

__all__ = ["NotRewound", "untouched"]

_DEEPEST = 3


class NotRewound(RuntimeError):
    """A step that was run again has asked an iterator for something new."""


class _Closed:
    """Stands in for an iterator that cannot be copied."""

    def __iter__(self) -> _Closed:
        return self

    def __next__(self) -> Any:
        raise NotRewound("what an iterator has given cannot be asked for again")


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Inside the block nothing is taken out of the iterators that the module holds."""
    found: list[tuple[dict[Any, Any], Any, Any]] = []
    seen: set[int] = set()
    for entry in module.modules():
        _search(entry.__dict__, found, seen, 0)
    for holder, name, value in found:
        holder[name] = _copied(value)
    try:
        yield
    finally:
        for holder, name, value in found:
            holder[name] = value


def _search(holder: dict[Any, Any], found: list[tuple[dict[Any, Any], Any, Any]], seen: set[int], depth: int) -> None:
    if id(holder) in seen or depth > _DEEPEST:
        return
    seen.add(id(holder))
    for name, value in holder.items():
        if isinstance(value, (Tensor, nn.Module, io.IOBase, int, float, str)):
            continue
        if hasattr(type(value), "__next__"):
            found.append((holder, name, value))
        elif isinstance(value, dict):
            _search(value, found, seen, depth + 1)
        elif is_users(type(value)) and isinstance(getattr(value, "__dict__", None), dict):
            _search(value.__dict__, found, seen, depth + 1)


def _copied(value: Any) -> Any:
    if type(value).__module__ not in ("builtins", "itertools"):
        return _Closed()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return copy.deepcopy(value)  # a copy would share what it iterates over
    except Exception:  # a generator, or what iterates over one
        return _Closed()
