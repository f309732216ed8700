"""The one look at a step: whether all is finite, and the figures that come with it, for one synchronisation.

What the sentinel computes to see that nothing is non-finite says the loss and the norm of the gradients as well, so that
following them costs nothing. Whatever else waits on the device to be read comes along.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nanguard.sentinel import norms, norms_and, small_norms, values_of

__all__ = ["Reading", "Sight", "read"]


class Sight(Protocol):
    """What was seen of one micro-batch: its loss, and the `norms` of the gradients after it where more micro-batches follow."""

    loss: Tensor | None
    norms: Tensor | None


class Reading(NamedTuple):
    """What the look at a step gave.

    Attributes:
        suspicious: whether anything may be non-finite. A norm that overflows is a false alarm; nothing escapes.
        loss: the sum of the losses of the window, or `None` where none was seen.
        gradient_norm: L2 norm of all gradients together, or `None` where there are none.
        along: the numbers that came along, in their order.
    """

    suspicious: bool
    loss: float | None
    gradient_norm: float | None
    along: tuple[float, ...] = ()


def read(
    window: Sequence[Sight], gradients: list[Tensor], statistics: list[Tensor], along: Sequence[Tensor] = ()
) -> Reading:
    """Looks at a step: one fused check, one synchronisation.

    Args:
        window: the micro-batches in order.
        gradients: what the optimizer is about to use.
        statistics: running statistics, which a forward pass may spoil although its loss is finite.
        along: tensors of any shape and real dtype that have no part in the verdict, but are read at the same time.
    """
    losses = [loss for loss in [_scalar(sight.loss) for sight in window] if loss is not None]
    found = None
    if len(window) == 1 and not along:
        found = _small(losses, gradients, statistics)
    if found is None:
        earlier = [sight.norms for sight in window[:-1] if sight.norms is not None]
        found = _fetched(losses, gradients, statistics, earlier, along)
    gradient, running, loss, before, rest = found
    return Reading(
        suspicious=not math.isfinite(sum(gradient) + sum(running) + sum(loss) + sum(before)),
        loss=sum(loss) if loss else None,
        gradient_norm=math.hypot(*gradient) if gradient else None,
        along=tuple(rest),
    )


def _small(losses: list[Tensor], gradients: list[Tensor], statistics: list[Tensor]) -> list[list[float]] | None:
    values = small_norms([*gradients, *statistics])
    if values is None or any(not loss.is_cpu for loss in losses):
        return None
    return [values[: len(gradients)], values[len(gradients) :], [loss.item() for loss in losses], [], []]


def _fetched(
    losses: list[Tensor],
    gradients: list[Tensor],
    statistics: list[Tensor],
    earlier: Sequence[Tensor],
    along: Sequence[Tensor],
) -> list[list[float]]:
    together = norms_and([*gradients, *statistics], losses)
    if together is not None:
        rows, lengths = [together], [len(gradients), len(statistics), len(losses)]
    else:
        rows, lengths = [], []
        for row in (norms(gradients), norms(statistics), _stacked(losses)):
            lengths.append(0 if row is None else row.numel())
            rows += [] if row is None else [row]
    for more in (earlier, along):
        lengths.append(sum(entry.numel() for entry in more))
        rows += [entry.detach().reshape(-1) for entry in more]
    values, groups, start = _values(rows), [], 0
    for length in lengths:
        groups.append(values[start : start + length])
        start += length
    return groups


def _values(rows: list[Tensor]) -> list[float]:
    if not rows:
        return []
    if len(rows) > 1:
        rows = [torch.cat([row.to(rows[0].device, torch.float64) for row in rows])]
    values: list[float] = rows[0].tolist()  # the synchronisation
    return values


def _scalar(loss: Tensor | None) -> Tensor | None:
    """The loss as a tensor without dimensions; `None` where it cannot be non-finite."""
    if loss is None:
        return None
    if loss.ndim == 0 and type(loss) is Tensor and loss.is_floating_point():
        return loss
    values = values_of(loss)
    if values is None:
        return None
    total = values.detach().sum()
    return total.abs() if total.is_complex() else total


def _stacked(losses: list[Tensor]) -> Tensor | None:
    if not losses:
        return None
    return torch.stack([loss.detach().to(losses[0].device, torch.float64) for loss in losses])
