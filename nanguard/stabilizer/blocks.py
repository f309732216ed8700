"""The blocks of `stabilize()` that are active in a thread."""

from __future__ import annotations

import threading
from typing import Any, Protocol

from torch import Tensor

from nanguard.algebra import Term
from nanguard.stabilizer.knowledge import Known
from nanguard.stabilizer.report import Report

__all__ = ["Block", "Exchanging", "active_blocks"]

_THREAD = threading.local()


class Exchanging(Protocol):
    """The side of a block that compiled code deals with."""

    def receive(self, tensor: Tensor, term: Term, parents: tuple[Known, ...] = ()) -> None:
        """Learn the logarithm of what compiled code has computed from what was known."""

    def known(self, tensor: Tensor) -> Known | None:
        """What is known about a tensor that compiled code is given."""

    def replaces(self, known: Known) -> bool:
        """Whether its logarithm is not computed as written."""

    def logarithm(self, tensor: Tensor, odds: bool) -> Tensor | None:
        """The logarithm of a tensor that is known, or that of its odds."""


class Block(Protocol):
    """The function mode of an active block.

    Attributes:
        report: where swaps and advice are noted.
    """

    report: Report

    @property
    def exchange(self) -> Exchanging:
        """The side that compiled code deals with."""

    def __enter__(self) -> Any:
        """Begin it."""

    def __exit__(self, *failure: Any) -> None:
        """End it."""

    def close(self) -> None:
        """Forget everything."""

    def is_renewed(self) -> bool:
        """Whether a backward pass that recomputes the code that runs now will do so in a mode like this one."""


def active_blocks() -> list[Block]:
    """The active blocks of this thread, which end in the opposite order."""
    if not hasattr(_THREAD, "blocks"):
        _THREAD.blocks = []
    blocks: list[Block] = _THREAD.blocks
    return blocks
