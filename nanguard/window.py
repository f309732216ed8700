"""The micro-batches of one optimizer step: what was seen of each, and which of them was the first to go bad."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from nanguard.diagnosis import MicroBatch
from nanguard.incident import Trigger
from nanguard.moving import ParameterSnapshot
from nanguard.rng import RngState
from nanguard.sentinel import all_finite, nonfinite_names
from nanguard.transaction import OptimizerSnapshot, Savepoint, Transaction

__all__ = ["Attempt", "Moment", "Window", "figures", "first_suspect", "gradients_of"]


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
        moved: whether the optimizer had moved the parameters already when the step was called for the last time.
    """

    moment: Moment
    micro: MicroBatch
    undo: Savepoint
    rewind: RngState | None = None
    loss: Tensor | None = None
    norms: Tensor | None = None
    moved: bool = False


@final
class Window:
    """The micro-batches that wait for one step of an optimizer, and the way back to before them.

    Args:
        transaction: saves and restores what a step touches.

    Attributes:
        attempts: the micro-batches in order.
        incident: what noticed that something is wrong with them, once an incident tells of it.
    """

    def __init__(self, transaction: Transaction) -> None:
        self.attempts: list[Attempt] = []
        self.incident: Trigger | None = None
        self._transaction = transaction
        self._moved: OptimizerSnapshot | None = None
        self._held: ParameterSnapshot | None = None

    @property
    def told(self) -> bool:
        """Whether what later decisions find was told of already: an activation need not be why a loss is bad."""
        return self.incident not in (None, "activations")

    def follow(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """From now on these optimizers may move parameters, which a return undoes."""
        if optimizers and self._moved is None:
            self._moved = OptimizerSnapshot(optimizers)

    def hold(self, parameters: list[Tensor]) -> None:
        """The step is left out: what hooks and callbacks do to these parameters from now on must not stay, either."""
        self._held = ParameterSnapshot(parameters)

    def restore(self) -> None:
        """Puts everything back to before the first micro-batch. May be called again after more has happened."""
        first = self.attempts[0]
        first.undo.restore()
        if first.rewind is not None:
            first.rewind.restore()
        if self._moved is not None:
            self._moved.restore()
        if self._held is not None:
            self._held.restore()

    @contextmanager
    def before(self, attempt: Attempt) -> Iterator[None]:
        """All is as it was before that micro-batch inside, and afterwards as it is now."""
        after = self._transaction.savepoint()
        moves = None if attempt.moved else self._moved
        moved = OptimizerSnapshot(moves.optimizers) if moves is not None else None
        try:
            attempt.micro.before.restore()
            if moves is not None:
                moves.restore()
            yield
        finally:
            if moved is not None:
                moved.restore()
            after.restore()
            after.release()

    def close(self) -> None:
        """Forgets them all."""
        for attempt in self.attempts:
            attempt.undo.release()
            attempt.micro.before.release()
        self.attempts.clear()
        self.incident = None
        self._moved = None
        self._held = None


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
