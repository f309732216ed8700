"""The blocks of `stabilize()` that are active in a thread."""

from __future__ import annotations

import threading
from typing import Any, Protocol

from torch import Tensor

from nanguard.algebra import Term
from nanguard.stabilizer.report import Report

__all__ = ["Block", "active_blocks"]

_THREAD = threading.local()


class Block(Protocol):
    """The function mode of an active block.

    Attributes:
        report: where swaps and advice are noted.
    """

    report: Report

    def __enter__(self) -> Any:
        """Begin it."""

    def __exit__(self, *failure: Any) -> None:
        """End it."""

    def close(self) -> None:
        """Forget everything."""

    def receive(self, tensor: Tensor, term: Term) -> None:
        """Learn the logarithm of what compiled code has computed."""

    def is_renewed(self) -> bool:
        """Whether a backward pass that recomputes the code that runs now will do so in a mode like this one."""


def active_blocks() -> list[Block]:
    """The active blocks of this thread, which end in the opposite order."""
    if not hasattr(_THREAD, "blocks"):
        _THREAD.blocks = []
    blocks: list[Block] = _THREAD.blocks
    return blocks
