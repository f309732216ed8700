"""How a block stabilises what is compiled."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Settings"]


class Settings(NamedTuple):
    """How a block stabilises.

    Attributes:
        drop: whether small epsilons inside logarithms are dropped.
        repair: whether bounds that libraries put on probabilities are dropped.
    """

    drop: bool
    repair: bool = False
