"""A second run of a failed step that leaves no trace: from the state before it, and back to the state after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nanguard.diagnosis.trace import Trace
from nanguard.sentinel import all_finite, finite_flags
from nanguard.transaction import Savepoint, Transaction

__all__ = ["MicroBatch", "Outcome", "Rerun"]


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """One call of the training step, as it can be made again.

    Attributes:
        batch_idx: index of the batch in the epoch.
        args: what the training step was given, the batch first.
        before: the state before the call.
        indices: the samples as indices into the dataset, where the loader tells.
        stabilized: whether it ran under the stabiliser.
    """

    batch_idx: int
    args: tuple[Any, ...]
    before: Savepoint
    indices: tuple[int, ...] | None = None
    stabilized: bool = False


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a second run gave: the loss (`None` where it raised `error`) and the non-finite tensors among loss and
    gradients.
    """

    loss: Tensor | None = None
    bad: tuple[Tensor, ...] = ()
    loss_finite: bool = True
    error: Exception | None = None

    @property
    def fails(self) -> bool | None:
        """Whether something was non-finite; `None` where the step could not be run."""
        return None if self.error is not None else bool(self.bad)


@dataclass(frozen=True, eq=False)
class Rerun:
    """Runs a step again. Final.

    Attributes:
        module: whose parameters the gradients are taken of.
        transaction: makes the savepoints that put everything back.
        step: called with the arguments of the training step; returns the loss, or `None`.
        surroundings: what the step runs in (autocast, stabiliser, no logging), made anew for each run.
    """

    module: nn.Module
    transaction: Transaction
    step: Callable[..., Any]
    surroundings: Callable[[MicroBatch], AbstractContextManager[Any]] = nullcontext

    def __call__(self, micro: MicroBatch, args: Sequence[Any] | None = None, trace: Trace | None = None) -> Outcome:
        """Runs `micro`, with other arguments if `args` are given, recorded by `trace` if there is one."""
        after = self.transaction.savepoint()
        micro.before.restore()
        try:
            return self._run(micro, tuple(micro.args if args is None else args), trace)
        except Exception as error:  # a sub-batch may well be too small for the model
            return Outcome(error=error)
        finally:
            after.restore()
            after.release()

    def _run(self, micro: MicroBatch, args: tuple[Any, ...], trace: Trace | None) -> Outcome:
        parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(self.surroundings(micro))
            if trace is not None:
                stack.enter_context(trace.recording())
            loss = self.step(*args)
            if not isinstance(loss, Tensor):
                return Outcome(bad=tuple(micro.before.spoiled_statistics()))
            gradients: tuple[Tensor | None, ...] = ()
            if loss.requires_grad:
                gradients = torch.autograd.grad(loss.sum(), parameters, allow_unused=True)
        loss = loss.detach()
        present = [gradient for gradient in gradients if gradient is not None]
        spoiled = micro.before.spoiled_statistics()
        if not spoiled and all_finite([loss, *present]):
            return Outcome(loss)
        loss_finite = all_finite([loss])
        flags = finite_flags(present)
        bad = [gradient for gradient, finite in zip(present, flags, strict=True) if not finite]
        return Outcome(loss, (*([] if loss_finite else [loss]), *bad, *spoiled), loss_finite)
