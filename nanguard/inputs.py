"""The batch as it was before the step, although some steps write into it.

Copying every batch would cost more than all the rest. So the first batch is copied, the version counters of its tensors tell
which of them the step writes into, and from then on only those are copied. Containers are always copied: steps pop entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

from torch import Tensor

from nanguard.trees import map_tensors
from nanguard.values import clone_of

__all__ = ["InputKeeper", "copy_of", "copy_tensor"]


def copy_tensor(tensor: Tensor) -> Tensor:
    """A tensor of its own with the same values, strides and need of a gradient, whatever its layout."""
    return clone_of(tensor).requires_grad_(tensor.requires_grad)


def copy_of(args: Any) -> Any:
    """The same structure with tensors of their own; what was one tensor in two places stays one."""
    copies: dict[int, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            copies[id(tensor)] = copy_tensor(tensor)
        return copies[id(tensor)]

    return map_tensors(copy, args)


@final
class InputKeeper:
    """Keeps the arguments of a step as they were before it."""

    def __init__(self) -> None:
        self._written: set[int] | None = None
        self._seen: list[tuple[Tensor, int | None]] = []

    def keep(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """Arguments equal to these, which the step that is about to run will not change."""
        if self._seen:
            self.learn()

        def kept(tensor: Tensor) -> Tensor:
            position = len(self._seen)
            self._seen.append((tensor, None if tensor.is_inference() else tensor._version))
            return copy_tensor(tensor) if self._written is None or position in self._written else tensor

        result: tuple[Any, ...] = map_tensors(kept, tuple(args))
        return result

    def keep_anew(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """The same for arguments that were kept too early: what has been written into them since was no step."""
        self._seen.clear()
        return self.keep(args)

    def learn(self) -> bool:
        """Takes note of what the step has written into; whether anything of it had not been copied."""
        seen, self._seen = self._seen, []
        if self._written is not None and not any(version is not None and t._version != version for t, version in seen):
            return False
        written = {
            position
            for position, (tensor, version) in enumerate(seen)
            if version is not None and tensor._version != version
        }
        surprising = self._written is not None and not written <= self._written
        if written or self._written is None:
            self._written = (self._written or set()) | written
        return surprising
