"""Attributes of single objects, replaced for a while and put back exactly as they were found."""

from __future__ import annotations

from typing import Any, final

__all__ = ["Patches"]

_ABSENT = object()


@final
class Patches:
    """Replaces attributes in the ``__dict__`` of objects, never on classes or modules."""

    def __init__(self) -> None:
        self._replaced: list[tuple[Any, str, Any]] = []

    def set(self, target: Any, name: str, value: Any) -> None:
        """Replaces ``target.name`` on the object itself, past any ``__setattr__`` that forbids it."""
        self._replaced.append((target, name, vars(target).get(name, _ABSENT)))
        object.__setattr__(target, name, value)

    def undo(self) -> None:
        """Puts everything back, the latest replacement first. Does nothing the second time."""
        while self._replaced:
            target, name, found = self._replaced.pop()
            if found is _ABSENT:
                vars(target).pop(name, None)
            else:
                object.__setattr__(target, name, found)
