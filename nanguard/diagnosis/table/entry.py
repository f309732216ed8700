"""One piece of advice, and texts that several entries share."""

from __future__ import annotations

from typing import NamedTuple

from nanguard.incident import Cause, Phase

__all__ = ["LOST", "SATURATED", "Entry", "ops"]


class Entry(NamedTuple):
    """One piece of advice.

    Attributes:
        cause: the kind of failure.
        ops: the operations that it is for; none for every operation.
        text: what to do, in one or two sentences.
        phase: the phase that it is for; `None` for every phase.
        facts: facts of which one has to be there; none where it does not matter.
    """

    cause: Cause
    ops: tuple[str, ...]
    text: str
    phase: Phase | None = None
    facts: tuple[str, ...] = ()


def ops(text: str) -> tuple[str, ...]:
    """The dispatcher's names of operations."""
    return tuple(f"aten.{name}" for name in text.split())


LOST = "{lost}: it does nothing for `{line}`. Use a larger number there, or compute this part in a wider dtype."
SATURATED = (
    "tanh has saturated in the argument of {op} in `{line}`. Write the logarithm of 1 - tanh(x)**2 as "
    "2 * (math.log(2) - x - F.softplus(-2 * x)), or clamp the argument."
)
