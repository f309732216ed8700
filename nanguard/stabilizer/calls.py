"""What a call looks like: all that a law may go by. Calls that look the same are answered the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import Parameter

from nanguard.stabilizer.knowledge import Knowledge, Known
from nanguard.stabilizer.memory import is_plain, owns_memory

__all__ = ["Look", "look_at"]

# Of longer lists of numbers no two look the same.
_LONGEST = 8
_WORDS = frozenset({bool, int, str, type(None), type(Ellipsis), torch.dtype, torch.device})
_LISTS = frozenset({tuple, list, torch.Size})


@final
class Look:
    """What one call looks like.

    Attributes:
        key: equal for calls that look the same.
        values: the tensors among the arguments, and those that the known ones depend on, each once.
        parents: what is known of the arguments.
    """

    __slots__ = ("_places", "key", "parents", "values")

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self.key: Any = ()
        self.values: list[Tensor] = []
        self.parents: tuple[Known, ...] = ()

    def place(self, tensor: Tensor) -> int:
        """Which of the values a tensor is; it becomes the last of them where it was none."""
        places = self._places
        key = id(tensor)
        if key in places:
            return places[key]
        places[key] = place = len(places)
        self.values.append(tensor)
        return place

    def places(self, tensors: list[Tensor]) -> list[int] | None:
        """Which of the values these are, or `None` where one is none of them, such as a copy."""
        found = [self._places.get(id(tensor), -1) for tensor in tensors]
        return None if -1 in found else found

    def holds(self, tensor: Any) -> bool:
        """Whether a tensor is among the values."""
        return id(tensor) in self._places

    def add(self, knowledge: Knowledge, value: Any, parts: list[Any], nested: bool) -> bool:
        """Write down one argument; `False` where there is more to it than its looks."""
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            known = None if nested else knowledge.find(value)
            if known is None:
                return self._add_unknown(knowledge, value, parts)
            if known.lesson is None or (knowledge.has_escapes and not knowledge.is_unescaped(value)):
                return False
            self.parents += (known,)
            parts.append(known.lesson)
            values, places = self.values, self._places
            for tensor in (value, *known.values):
                place = places.setdefault(id(tensor), len(values))
                if place == len(values):
                    values.append(tensor)
                parts.append(place)
            return True
        if kind in _WORDS:
            parts += (kind, value)
            return True
        if kind is float:
            parts += (kind, value)
            return bool(value)  # there are two zeros
        return self._add_entries(knowledge, value, parts)

    def _add_unknown(self, knowledge: Knowledge, tensor: Tensor, parts: list[Any]) -> bool:
        if knowledge.has_escapes and not knowledge.is_unescaped(tensor):
            return False
        shape, tracked = tensor.shape, tensor.requires_grad
        # A number is what it is, and NumPy may write unseen into what it shares.
        if not ((shape or tracked) and is_plain(tensor) and owns_memory(tensor)):
            return False
        parts += (Tensor, self.place(tensor), shape, tensor.dtype, tracked, tensor.device)
        return True

    def _add_entries(self, knowledge: Knowledge, value: Any, parts: list[Any]) -> bool:
        kind = type(value)
        if kind in _LISTS:
            if len(value) > _LONGEST:
                return False
            parts += (kind, len(value))
            nested = not all(isinstance(entry, Tensor) for entry in value)
        elif kind is slice:
            parts.append(kind)
            value, nested = (value.start, value.stop, value.step), True
        else:
            return False
        return all(self.add(knowledge, entry, parts, nested) for entry in value)


def look_at(knowledge: Knowledge, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Look | None:
    """What a call looks like, or `None` where there is more to it than its looks."""
    look = Look()
    add = look.add
    parts: list[Any] = [function, len(args)]
    for value in args:
        if not add(knowledge, value, parts, False):
            return None
    for name, value in kwargs.items():
        parts.append(name)
        if not add(knowledge, value, parts, False):
            return None
    look.key = tuple(parts)
    return look
