"""Captures: a failed step on disk, and its replay.

Loaded on first use, so that listing and showing captures costs no import of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "Capture": "nanguard.capture.load",
    "CaptureLimitReached": "nanguard.capture.write",
    "ReplayResult": "nanguard.capture.result",
    "StepSnapshot": "nanguard.capture.write",
    "assert_finite_step": "nanguard.capture.replaying",
    "find_captures": "nanguard.capture.manifest",
    "load_capture": "nanguard.capture.load",
    "replay": "nanguard.capture.replaying",
    "replay_command": "nanguard.capture.manifest",
    "scalar_attributes": "nanguard.capture.attributes",
    "write_capture": "nanguard.capture.write",
}

if TYPE_CHECKING:
    from nanguard.capture.attributes import scalar_attributes
    from nanguard.capture.load import Capture, load_capture
    from nanguard.capture.manifest import find_captures, replay_command
    from nanguard.capture.replaying import assert_finite_step, replay
    from nanguard.capture.result import ReplayResult
    from nanguard.capture.write import CaptureLimitReached, StepSnapshot, write_capture

__all__ = [
    "Capture",
    "CaptureLimitReached",
    "ReplayResult",
    "StepSnapshot",
    "assert_finite_step",
    "find_captures",
    "load_capture",
    "replay",
    "replay_command",
    "scalar_attributes",
    "write_capture",
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
