"""Where a tensor came from, in so far as somebody may watch derivatives there."""

from __future__ import annotations

from typing import final

__all__ = ["Lineage"]


@final
class Lineage:
    """One known tensor, and those that it came from. It keeps no tensor alive.

    Attributes:
        pinned: whether somebody watches derivatives at this tensor (a hook, `retain_grad`), which a swap would bypass.
        parents: the same of the known tensors that it was computed from.
    """

    __slots__ = ("parents", "pinned")

    def __init__(self, parents: tuple[Lineage, ...]) -> None:
        self.parents = parents
        self.pinned = False

    def is_pinned(self) -> bool:
        """Whether it, or anything known that it came from, is pinned."""
        stack, seen = [self], {id(self)}
        while stack:
            lineage = stack.pop()
            if lineage.pinned:
                return True
            for parent in lineage.parents:
                if id(parent) not in seen:
                    seen.add(id(parent))
                    stack.append(parent)
        return False
