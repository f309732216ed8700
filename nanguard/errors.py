"""The exception family. Every error of nanguard is a `NanGuardError`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanguard.incident import Incident

__all__ = [
    "CaptureError",
    "DidNotReproduce",
    "NanGuardError",
    "NanGuardWarning",
    "NonFiniteError",
    "NumericalAdvice",
    "PolicyError",
]


class NanGuardError(Exception):
    """Base of all errors that nanguard raises."""


class NanGuardWarning(UserWarning):
    """What nanguard has to say while the run goes on: a replaced computation, a skipped step, a capture that failed."""


class NumericalAdvice(NanGuardWarning):
    """A computation that the stabiliser leaves as it is, but that should be written otherwise."""


class PolicyError(NanGuardError):
    """A policy is missing, malformed or asks for what is not there; the message names the key, the value and what is
    allowed.
    """


class CaptureError(NanGuardError):
    """A capture cannot be written, read or replayed; the message names the file and the entry."""


class DidNotReproduce(NanGuardError):
    """A replayed step came out finite, or failed elsewhere than the captured incident says."""


class NonFiniteError(NanGuardError, FloatingPointError):
    """A training step became non-finite, and the policy (or its spent budget) says to raise.

    Attributes:
        incident: the `Incident`: where, what, which samples. The message is its rendering, and where the batch was
            captured, the last line of it is the command that replays it.
    """

    def __init__(self, incident: Incident) -> None:
        super().__init__(incident)
        self.incident = incident

    def __str__(self) -> str:
        return self.incident.render()
