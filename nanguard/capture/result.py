"""What a replay found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

from torch import Tensor

from nanguard.incident import Incident

__all__ = ["ReplayResult"]


@final
@dataclass(frozen=True, eq=False)
class ReplayResult:
    """A captured step that was run again.

    Attributes:
        loss: the loss as the step computed it, detached; `None` where it computed none.
        finite: whether the loss and all gradients are finite.
        reproduced: whether the step failed again, and in the same way.
        incident: what happened now; `None` where all was finite.
        gradients: parameter name -> gradient, with the loss scale taken out; parameters without one are left out.
        notes: what differs from when the step was captured, and may explain another outcome.
    """

    loss: Tensor | None
    finite: bool
    reproduced: bool
    incident: Incident | None
    gradients: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()
