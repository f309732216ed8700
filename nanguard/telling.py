"""What the user is told while the run goes on: warnings at the line of their own code, one for each thing that happened."""

from __future__ import annotations

import warnings

from nanguard.errors import NanGuardWarning
from nanguard.incident import Incident, Swap

__all__ = ["tell_incident", "tell_swap"]


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
