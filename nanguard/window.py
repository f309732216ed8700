"""The micro-batches of one optimizer step: what was seen of each, and which of them was the first to go bad."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from nanguard.diagnosis import MicroBatch
from nanguard.incident import Trigger
from nanguard.rng import RngState
from nanguard.sentinel import all_finite, nonfinite_names
from nanguard.transaction import Savepoint

__all__ = ["Attempt", "Moment", "figures", "first_suspect", "gradients_of"]


@dataclass(frozen=True)
class Moment:
    """Where in the run a batch is: optimizer steps taken, epoch, index of the batch in the epoch, rank of the process."""

    step: int
    epoch: int
    batch_idx: int
    rank: int = 0


@dataclass(eq=False)
class Attempt:
    """One micro-batch on its way.

    Attributes:
        moment: when.
        micro: how to run it again.
        undo: what a skip goes back to; the step itself may begin later.
        rewind: where random number streams go back to, if not to the beginning of the step.
        loss: the loss, of any shape and dtype.
        norms: of the gradients after it, as `nanguard.sentinel.norms` gives them, where more micro-batches follow.
    """

    moment: Moment
    micro: MicroBatch
    undo: Savepoint
    rewind: RngState | None = None
    loss: Tensor | None = None
    norms: Tensor | None = None


def first_suspect(window: Sequence[Attempt], gradients: list[Tensor]) -> tuple[Attempt, Trigger] | None:
    """After an alarm: the first micro-batch with a loss or gradients or running statistics that are non-finite, and which."""
    gradients_finite = all_finite(gradients)
    for attempt, following in zip(window, [*window[1:], None], strict=True):
        if not all_finite(_loss(attempt)):
            return attempt, "loss"
        if not gradients_finite and (attempt is window[-1] or not _finite(attempt.norms)):
            return attempt, "gradients"
        if attempt.micro.before.spoiled_statistics(following.micro.before if following is not None else None):
            return attempt, "parameters"
    return None


def _loss(attempt: Attempt) -> list[Tensor]:
    return [] if attempt.loss is None else [attempt.loss]


def _finite(row: Tensor | None) -> bool:
    return row is None or math.isfinite(sum(row.tolist()))


def figures(attempt: Attempt, parameters: Iterable[Tensor], module: nn.Module) -> str:
    """The loss, and which gradients are non-finite, in half a line."""
    parts = [] if attempt.loss is None else [f"loss {float(attempt.loss.double().sum()):.6g}"]
    named = {id(parameter): name for name, parameter in module.named_parameters()}
    gradients = [(named.get(id(p), "?"), p.grad) for p in parameters if p.grad is not None]
    bad = nonfinite_names(gradients)
    if bad:
        shown = ", ".join(bad[:3]) + (", ..." if len(bad) > 3 else "")
        parts.append(f"{len(bad)} of {len(gradients)} gradients non-finite ({shown})")
    if spoiled := attempt.micro.before.spoiled_statistics():
        buffers = {id(buffer): name for name, buffer in module.named_buffers()}
        parts.append(
            f"running statistics non-finite ({', '.join(buffers.get(id(entry), '?') for entry in spoiled[:3])})"
        )
    return ", ".join(parts)


def gradients_of(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The gradients that there are."""
    return [gradient for gradient in [parameter.grad for parameter in parameters] if gradient is not None]
