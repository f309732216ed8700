"""Where something is known: in one run of a function under `torch.utils.checkpoint`."""

from __future__ import annotations

from typing import final

__all__ = ["UNKNOWN", "Region"]


@final
class Region:
    """One run of a checkpointed function. It stands for it in what is known, and keeps nothing of it alive.

    Attributes:
        parent: the region around it.
    """

    __slots__ = ("parent",)

    def __init__(self, parent: Region | None) -> None:
        self.parent = parent

    def holds(self, other: Region | None) -> bool:
        """Whether the other is this one or lies in it; `None` is outside of all."""
        while other is not None and other is not self:
            other = other.parent
        return other is self


# What cannot be told. It is no region that anything could be swapped in.
UNKNOWN = Region(None)
