"""The guard without a change of code: Lightning calls `callbacks` for every Trainer, and ``NANGUARD`` decides."""

from __future__ import annotations

import os
import warnings
from typing import Any

from nanguard.errors import NanGuardWarning, PolicyError

__all__ = ["callbacks"]

_OFF = {"", "0", "false", "off", "no"}
_ON = {"1", "true", "on", "yes"}


def callbacks() -> list[Any]:
    """No callback, or the guard if the environment variable ``NANGUARD`` is ``1`` or the path of a policy.

    A factory that raises would break every Trainer on the machine, so a policy that cannot be used is reported and the default
    policy, which captures and raises, is used.
    """
    value = os.environ.get("NANGUARD", "").strip()
    if value.lower() in _OFF:
        return []
    from nanguard.lightning import NanGuard

    try:
        guard = NanGuard(None if value.lower() in _ON else value)
    except PolicyError as error:
        warnings.warn(f"NANGUARD={value}: {error}\nThe default policy is used instead.", NanGuardWarning, stacklevel=2)
        guard = NanGuard()
    guard.from_environment = True
    return [guard]
