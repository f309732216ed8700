"""nanguard: a numerical guard for PyTorch training runs.

Public names are loaded on first use, so that importing the package, its command line or its pytest plugin costs no
import of torch or lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Advice": "nanguard.incident",
    "Capture": "nanguard.capture",
    "CaptureError": "nanguard.errors",
    "DidNotReproduce": "nanguard.errors",
    "Incident": "nanguard.incident",
    "NanGuard": "nanguard.lightning",
    "NanGuardError": "nanguard.errors",
    "NanGuardWarning": "nanguard.errors",
    "NonFiniteError": "nanguard.errors",
    "NumericalAdvice": "nanguard.errors",
    "Origin": "nanguard.incident",
    "Policy": "nanguard.policy",
    "PolicyError": "nanguard.errors",
    "ReplayResult": "nanguard.capture",
    "Swap": "nanguard.incident",
    "TensorStats": "nanguard.incident",
    "assert_finite_step": "nanguard.capture",
    "compile_backend": "nanguard.stabilizer",
    "load_capture": "nanguard.capture",
    "load_policy": "nanguard.policy",
    "replay": "nanguard.capture",
    "stabilize": "nanguard.stabilizer",
}

if TYPE_CHECKING:
    from nanguard.capture import Capture, ReplayResult, assert_finite_step, load_capture, replay
    from nanguard.errors import (
        CaptureError,
        DidNotReproduce,
        NanGuardError,
        NanGuardWarning,
        NonFiniteError,
        NumericalAdvice,
        PolicyError,
    )
    from nanguard.incident import Advice, Incident, Origin, Swap, TensorStats
    from nanguard.lightning import NanGuard
    from nanguard.policy import Policy, load_policy
    from nanguard.stabilizer import compile_backend, stabilize

__all__ = [
    "Advice",
    "Capture",
    "CaptureError",
    "DidNotReproduce",
    "Incident",
    "NanGuard",
    "NanGuardError",
    "NanGuardWarning",
    "NonFiniteError",
    "NumericalAdvice",
    "Origin",
    "Policy",
    "PolicyError",
    "ReplayResult",
    "Swap",
    "TensorStats",
    "__version__",
    "assert_finite_step",
    "compile_backend",
    "load_capture",
    "load_policy",
    "replay",
    "stabilize",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
