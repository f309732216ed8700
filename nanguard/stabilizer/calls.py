"""What a call looks like: all that a law may go by. Calls that look the same are answered the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import Parameter

from nanguard.stabilizer.knowledge import Knowledge, Known, is_plain, owns_memory

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
            return self._add_tensor(knowledge, value, parts, nested)
        if kind in _WORDS:
            parts += (kind, value)
            return True
        if kind is float:
            parts += (kind, value)
            return bool(value)  # there are two zeros
        if kind in _LISTS:
            if len(value) > _LONGEST:
                return False
            parts += (kind, len(value))
            nested = not all(isinstance(entry, Tensor) for entry in value)
            return all(self.add(knowledge, entry, parts, nested) for entry in value)
        if kind is slice:
            parts.append(kind)
            return all(self.add(knowledge, bound, parts, True) for bound in (value.start, value.stop, value.step))
        return False

    def _add_tensor(self, knowledge: Knowledge, tensor: Tensor, parts: list[Any], nested: bool) -> bool:
        if knowledge.has_escapes and not knowledge.is_unescaped(tensor):
            return False
        known = None if nested else knowledge.find(tensor)
        if known is not None:
            if known.lesson is None:
                return False
            self.parents += (known,)
            parts += (known.lesson, self.place(tensor))
            parts += [self.place(value) for value in known.values]
            return True
        shape, tracked = tensor.shape, tensor.requires_grad
        # A number is what it is, and NumPy may write unseen into what it shares.
        if not ((shape or tracked) and is_plain(tensor) and owns_memory(tensor)):
            return False
        parts += (Tensor, self.place(tensor), shape, tensor.dtype, tracked, tensor.device)
        return True


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
