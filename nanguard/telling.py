"""What the user is told while the run goes on: warnings at the line of their own code, one for each thing that happened."""

from __future__ import annotations

import warnings
from typing import Any

from nanguard.errors import NanGuardWarning, NumericalAdvice
from nanguard.incident import Advice, Incident, Swap

__all__ = ["tell_advice", "tell_incident", "tell_swap"]


def tell_incident(incident: Incident) -> None:
    """An incident after which the run goes on."""
    place = incident.origin
    file, line = (place.file, place.line) if place is not None else (None, None)
    warnings.warn_explicit(str(incident), NanGuardWarning, file or "nanguard", line or 0)


def tell_swap(swap: Swap) -> None:
    """A computation that has been replaced for the first time."""
    message = (
        f"{swap.rule}: replaced the unstable `{swap.original}` by its stable form while it runs. "
        f"Write instead: {swap.replacement}"
    )
    warnings.warn_explicit(message, NanGuardWarning, swap.file, swap.line)


def tell_advice(advice: Advice, registry: dict[Any, Any] | None = None) -> None:
    """A computation that should be written otherwise.

    Arguments:
        advice: what to tell.
        registry: the ``__warningregistry__`` of the user's module, by which Python knows what it has told already.
    """
    message = f"{advice.rule}: `{advice.original}`: {advice.advice}"
    warnings.warn_explicit(message, NumericalAdvice, advice.file, advice.line, registry=registry)
