"""The micro-batches of one optimizer step: what was seen of each, and which of them was the first to go bad."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanguard.diagnosis import MicroBatch
from nanguard.incident import Trigger
from nanguard.rng import RngState
from nanguard.sentinel import all_finite, nonfinite_names

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
        rewind: where random number streams go back to, if not to the beginning of the step.
        loss: the loss, of any shape and dtype.
        norms: one number per gradient, as `nanguard.sentinel.norms` gives them, after this micro-batch.
    """

    moment: Moment
    micro: MicroBatch
    rewind: RngState | None = None
    loss: Tensor | None = None
    norms: Tensor | None = None


def first_suspect(window: Sequence[Attempt], gradients: list[Tensor]) -> tuple[Attempt, Trigger] | None:
    """The first micro-batch with a non-finite loss or gradient, and which of the two it was. One synchronisation.

    Args:
        window: the micro-batches in order.
        gradients: what the optimizer is about to use; asked again where only a norm overflowed.
    """
    entries: list[tuple[Attempt, Trigger, Tensor]] = []
    for attempt in window:
        if attempt.loss is not None:
            entries.append((attempt, "loss", _row(attempt.loss)))
        if attempt.norms is not None:
            entries.append((attempt, "gradients", attempt.norms))
    if not entries:
        return None
    device = entries[-1][2].device
    numbers = torch.cat([row.to(device) for _, _, row in entries]).tolist()  # the synchronisation
    if all(map(math.isfinite, numbers)):
        return None
    suspects: list[tuple[Attempt, Trigger]] = []
    for attempt, trigger, row in entries:
        mine, numbers = numbers[: row.numel()], numbers[row.numel() :]
        if not all(map(math.isfinite, mine)):
            suspects.append((attempt, trigger))
    if all(trigger == "gradients" for _, trigger in suspects) and all_finite(gradients):
        return None  # only a norm overflowed
    return suspects[0]


def figures(attempt: Attempt, parameters: Iterable[Tensor], module: nn.Module) -> str:
    """The loss, and which gradients are non-finite, in half a line."""
    parts = [] if attempt.loss is None else [f"loss {float(_row(attempt.loss).sum()):.6g}"]
    named = {id(parameter): name for name, parameter in module.named_parameters()}
    gradients = [(named.get(id(p), "?"), p.grad) for p in parameters if p.grad is not None]
    bad = nonfinite_names(gradients)
    if bad:
        shown = ", ".join(bad[:3]) + (", ..." if len(bad) > 3 else "")
        parts.append(f"{len(bad)} of {len(gradients)} gradients non-finite ({shown})")
    return ", ".join(parts)


def gradients_of(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The gradients that there are."""
    return [gradient for gradient in [parameter.grad for parameter in parameters] if gradient is not None]


def _row(value: Tensor) -> Tensor:
    # A loss may be of any shape (backward takes what has one element) and of half precision.
    return value.reshape(-1).to(torch.promote_types(value.dtype, torch.float32))
