"""A second run of a failed step that leaves no trace: from the state before it, and back to the state after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nanguard.diagnosis.ends import Ends
from nanguard.diagnosis.recording import Trace
from nanguard.diagnosis.records import Mark
from nanguard.iterators import untouched
from nanguard.sentinel import all_finite, finite_flags
from nanguard.surroundings import unchanged
from nanguard.transaction import Savepoint, Transaction

__all__ = ["MicroBatch", "Outcome", "Rerun", "apart"]


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
    gradients, or else the `marks` of other results that had to be good.
    """

    loss: Tensor | None = None
    bad: tuple[Tensor, ...] = ()
    loss_finite: bool = True
    error: Exception | None = None
    marks: tuple[Mark, ...] = ()

    @property
    def fails(self) -> bool | None:
        """Whether something was non-finite; `None` where the step could not be run."""
        return None if self.error is not None else bool(self.bad or self.marks)

    @property
    def forward(self) -> bool:
        """Whether it failed in the forward pass already."""
        return bool(self.marks) or not self.loss_finite

    @property
    def blamed(self) -> tuple[Tensor | Mark, ...]:
        """Where to walk back from: the loss, and only where that is finite what came after it."""
        if self.marks:
            return self.marks
        return self.bad if self.loss_finite else self.bad[:1]


@dataclass(frozen=True, eq=False)
class Rerun:
    """Runs a step again. Final.

    Attributes:
        module: whose parameters the gradients are taken of.
        transaction: makes the savepoints that put everything back.
        step: called with the arguments of the training step; returns the loss, or `None`.
        surroundings: what the step runs in (autocast, stabiliser), made anew for each run. The backward pass is outside.
        quietly: what the step and its backward pass run in (no logging), made anew for each run.
        optimizers: gives the optimizers that step the module's parameters.
        ends: where other results than loss and gradients have to be good: what the step runs in to show them. It is called
            anew for each run, and gives a function that is called with what the step returned. There is no backward pass then.
        graph: whether autograd is on.
        backward: how the module runs the backward pass of a loss, where it does that in a way of its own.
        after_backward: what the module does with its gradients after the backward pass.
        aside: what all runs of one diagnosis happen in.
    """

    module: nn.Module
    transaction: Transaction
    step: Callable[..., Any]
    surroundings: Callable[[MicroBatch], AbstractContextManager[Any]] = nullcontext
    quietly: Callable[[], AbstractContextManager[Any]] = nullcontext
    optimizers: Callable[[], Sequence[torch.optim.Optimizer]] = tuple
    ends: Callable[[Ends], AbstractContextManager[Callable[[Any], None]]] | None = None
    graph: bool = True
    backward: Callable[[Tensor], Any] | None = None
    after_backward: Callable[[], Any] | None = None
    aside: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __call__(
        self,
        micro: MicroBatch,
        args: Sequence[Any] | None = None,
        trace: Trace | None = None,
        *,
        backward: bool = True,
        compiled: bool = False,
        within: Callable[[], AbstractContextManager[Any]] = nullcontext,
        throughout: bool = False,
    ) -> Outcome:
        """Runs `micro` again.

        Args:
            micro: the call to be made again.
            args: other arguments.
            trace: records the run.
            backward: whether to compute the gradients, too.
            compiled: whether compiled code runs compiled; otherwise all runs eagerly.
            within: something more for it to run in, entered last.
            throughout: whether the backward pass runs in there, too, and so in the surroundings.
        """
        after = self.transaction.savepoint()
        micro.before.restore()
        arguments = tuple(micro.args if args is None else args)
        try:
            with unchanged(self.module), untouched(self.module), _spare_gradients(self.module):
                return self._run(micro, arguments, trace, backward, compiled, within, throughout)
        except Exception as error:  # a sub-batch may well be too small for the model
            return Outcome(error=error)
        finally:
            after.restore()
            after.release()

    def _run(
        self,
        micro: MicroBatch,
        args: tuple[Any, ...],
        trace: Trace | None,
        backward: bool,
        compiled: bool,
        within: Callable[[], AbstractContextManager[Any]],
        throughout: bool,
    ) -> Outcome:
        parameters: list[Tensor] = [p for p in self.module.parameters() if p.requires_grad and not is_lazy(p)]
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self.graph))
            if not compiled:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(self.quietly())
            around = stack.enter_context(ExitStack())
            around.enter_context(self.surroundings(micro))
            around.enter_context(within())
            if trace is not None:
                stack.enter_context(trace.recording())
            if self.ends is not None:
                return self._shown(stack, self.ends, Ends(trace), args)
            loss = self.step(*args)
            if not isinstance(loss, Tensor):
                return Outcome(bad=tuple(micro.before.spoiled_statistics()))
            if not throughout:
                around.close()
            gradients: list[Tensor] = []
            # Where the loss is not finite it says all there is to say, and costs a third of the whole.
            if backward and loss.requires_grad and all_finite([loss.detach()]):
                gradients = self._gradients(loss, parameters, trace)
        loss = loss.detach()
        spoiled = micro.before.spoiled_statistics()
        if not spoiled and all_finite([loss, *gradients]):
            return Outcome(loss)
        loss_finite = all_finite([loss])
        flags = finite_flags(gradients)
        bad = [gradient for gradient, finite in zip(gradients, flags, strict=True) if not finite]
        return Outcome(loss, (*([] if loss_finite else [loss]), *bad, *spoiled), loss_finite)

    def _shown(
        self,
        stack: ExitStack,
        around: Callable[[Ends], AbstractContextManager[Callable[[Any], None]]],
        ends: Ends,
        args: tuple[Any, ...],
    ) -> Outcome:
        returned = stack.enter_context(around(ends))
        output = self.step(*args)
        returned(output)
        return Outcome(output.detach() if isinstance(output, Tensor) else None, marks=tuple(ends.bad))

    def _gradients(self, loss: Tensor, parameters: list[Tensor], trace: Trace | None) -> list[Tensor]:
        total = loss if loss.ndim == 0 else loss.sum()
        plain = self.backward is None and self.after_backward is None
        if plain and not _hooked(parameters) and not _reentrant(total):
            found = torch.autograd.grad(total, parameters, allow_unused=True)
            return [gradient for gradient in found if gradient is not None]
        with _own_gradients(parameters), trace.users_backward() if trace is not None else nullcontext():
            if self.backward is None:
                total.backward()
            else:
                self.backward(total)
            if self.after_backward is not None:
                self.after_backward()
            return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _hooked(parameters: list[Tensor]) -> bool:
    """Whether hooks wait for gradients to be accumulated."""
    return any(getattr(parameter, "_post_accumulate_grad_hooks", None) for parameter in parameters)


def _reentrant(total: Tensor) -> bool:
    """Whether the graph holds a reentrant checkpoint, which only works with `backward`."""
    seen, queue = set(), [total.grad_fn]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "CheckpointFunctionBackward":
            return True
        queue.extend(following for following, _ in node.next_functions)
    return False


@contextmanager
def _own_gradients(parameters: list[Tensor]) -> Iterator[None]:
    """Inside the block the parameters have no gradients; afterwards they have those again that they had before."""
    kept = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = gradient


@contextmanager
def _spare_gradients(module: nn.Module) -> Iterator[None]:
    """Inside the block gradients are copies, which a step may read, clear and add to. What was non-finite in them is 0.

    Those that the step has found the first time are gone; they were finite.
    """
    kept = [(parameter, parameter.grad) for parameter in module.parameters()]
    for parameter, gradient in kept:
        if gradient is not None:
            strided = gradient.layout is torch.strided
            parameter.grad = gradient.detach().nan_to_num(0.0, 0.0, 0.0) if strided else torch.zeros_like(gradient)
    try:
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient


def apart(run: Callable[[], Any]) -> Any:
    """Calls a function so that lines outside it are not taken for its own."""
    return run()
