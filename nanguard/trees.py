"""Batches as trees of tensors: dictionaries of any kind, sequences, named tuples, dataclasses, and plain objects.

torch's own pytree stops at dataclasses, at dictionaries that are no `dict`, and at objects.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from nanguard.values import slots_of

__all__ = ["attributes_of", "holds_only_tensors", "map_tensors", "named_tensors"]

_DEEPEST = 32


def named_tensors(value: Any, path: str, depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """All tensors in a tree with the expression that leads to them, such as ``batch["image"][0].mask``."""
    if isinstance(value, Tensor):
        yield path, value
    elif depth < _DEEPEST:
        for step, child in _children(value):
            yield from named_tensors(child, path + step, depth + 1)


def holds_only_tensors(value: Any, depth: int = 0) -> bool:
    """Whether a tree has no leaves but tensors: no numbers, texts or objects."""
    if isinstance(value, Tensor) or value is None:
        return True
    if depth >= _DEEPEST or not (isinstance(value, (dict, UserDict, list, tuple)) or _has_attributes(value)):
        return False
    return all(holds_only_tensors(child, depth + 1) for _, child in _children(value))


def map_tensors(
    change: Callable[[Tensor], Tensor], value: Any, depth: int = 0, *, whole: Callable[[Any], Any] | None = None
) -> Any:
    """The same tree with other tensors, in containers of its own; what is neither tensor nor container is shared.

    Args:
        change: gives the other tensor.
        value: the tree.
        depth: how far above it its root is.
        whole: called with each list and tuple; what it returns stands in its place, unless that is `None`.
    """
    kind = type(value)
    if isinstance(value, Tensor):
        return change(value)
    if depth >= _DEEPEST or kind in (int, float, str, bytes, bool, type(None)):
        return value
    if kind in (list, tuple):
        other = whole(value) if whole is not None else None
        return kind([map_tensors(change, child, depth + 1, whole=whole) for child in value]) if other is None else other
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return kind._make(map_tensors(change, child, depth + 1, whole=whole) for child in value)
    if isinstance(value, dict):
        mapped = copy.copy(value)
        for key, child in value.items():
            mapped[key] = map_tensors(change, child, depth + 1, whole=whole)
        return mapped
    if _has_attributes(value) and any(True for _ in named_tensors(value, "", depth)):
        try:
            mapped = copy.copy(value)
        except Exception:  # it does not let itself be copied
            return value
        for name, child in attributes_of(value):
            object.__setattr__(mapped, name, map_tensors(change, child, depth + 1, whole=whole))
        return mapped
    return value


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (dict, UserDict)):
        for key, child in value.items():
            yield f'["{key}"]' if isinstance(key, str) else f"[{key!r}]", child
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        yield from ((f".{name}", child) for name, child in zip(value._fields, value, strict=True))
    elif isinstance(value, (list, tuple)):
        yield from ((f"[{position}]", child) for position, child in enumerate(value))
    elif _has_attributes(value):
        yield from ((f".{name}", child) for name, child in attributes_of(value))


def attributes_of(value: Any) -> list[tuple[str, Any]]:
    """What an object holds, in its dictionary or in slots."""
    slots = [(name, getattr(value, name)) for name in slots_of(type(value)) if hasattr(value, name)]
    return [*getattr(value, "__dict__", {}).items(), *slots]


def _has_attributes(value: Any) -> bool:
    """Whether it is an object whose attributes are worth looking at: a container of somebody's own, not machinery."""
    if isinstance(value, (type, nn.Module)) or callable(value):
        return False
    if not hasattr(value, "__dict__") and not slots_of(type(value)):
        return False
    return dataclasses.is_dataclass(value) or isinstance(value, UserDict) or _holds_tensors(value)


def _holds_tensors(value: Any) -> bool:
    return any(isinstance(child, (Tensor, dict, list, tuple, UserDict)) for _, child in attributes_of(value))
