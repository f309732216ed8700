"""The stabiliser in a training run: on where a policy has it and the last steps showed something to improve; its finds told."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, final

from torch import Tensor

from nanguard.incident import Advice, Swap
from nanguard.policy import Stabilize
from nanguard.telling import tell_advice, tell_swap

__all__ = ["StepStabilizer", "UnstableOpsWatch"]

_OFTEN = 8


@final
class UnstableOpsWatch:
    """Reads the graph of each loss and says whether the next step needs the stabiliser.

    It begins switched on. A model whose first losses hold nothing to improve runs without a function mode from then on; its
    graph is looked at again, because losses change during a run (warm-ups, curricula, alternating objectives): its root at
    every step, the nodes next to it where the root is a new one and at every eighth step, the whole of it now and then. Once
    something was found, it stays on.

    Args:
        trial: number of losses that are looked at before it may switch off.
        every: the whole graph is walked at every so many steps.
        near: number of nodes next to the loss that are walked in between.
    """

    def __init__(self, *, trial: int = 3, every: int = 50, near: int = 64) -> None:
        self._trial = trial
        self._every = every
        self._near = near
        self._seen = 0
        self._found = False
        self._roots: set[tuple[type, ...]] = set()

    @property
    def needed(self) -> bool:
        """Whether the next step should run under the stabiliser."""
        return self._found or self._seen < self._trial

    def stay_on(self) -> None:
        """Something was replaced, which the graph of the loss need not show: a target that no derivative flows into."""
        self._found = True

    def look(self, loss: Tensor) -> None:
        """Reads the graph of a loss before it is freed by the backward pass."""
        if self._found or loss.grad_fn is None:
            return
        from nanguard.stabilizer.unstable_ops import has_unstable_ops

        root = (type(loss.grad_fn), *[type(node) for node, _ in loss.grad_fn.next_functions])
        whole = self._seen < self._trial or self._seen % self._every == 0
        if whole or root not in self._roots or self._seen % _OFTEN == 0:
            self._roots.add(root)
            self._found = has_unstable_ops(loss, None if whole else self._near)
        self._seen += 1


@final
class StepStabilizer:
    """Runs forward passes under the stabiliser while they need it.

    Args:
        options: whether it may be on at all, and how.
        swaps: filled with what was swapped, which is told once.
        advice: the same for what was only seen.
    """

    def __init__(self, options: Stabilize, swaps: list[Swap], advice: list[Advice]) -> None:
        self._around = _stabilizer(options, swaps, advice)
        self._watch = UnstableOpsWatch()
        self._swaps, self._told, self._counted = swaps, len(swaps), 0
        self._advice, self._advised = advice, len(advice)

    @property
    def needed(self) -> bool:
        """Whether the next step should run under the stabiliser."""
        return self._around is not None and self._watch.needed

    @property
    def around(self) -> AbstractContextManager[Any] | None:
        """What a forward pass runs in; `None` where the policy has none."""
        return self._around

    def saw_loss(self, loss: Tensor) -> None:
        """Looks at the graph of a loss, and tells what was found since."""
        if self._around is None:
            return
        counted = sum(swap.count for swap in self._swaps)
        if counted > self._counted:
            self._counted = counted
            self._watch.stay_on()
        self._watch.look(loss)
        for swap in self._swaps[self._told :]:
            self._told += 1
            tell_swap(swap)
        for advice in self._advice[self._advised :]:
            self._advised += 1
            tell_advice(advice)


def _stabilizer(options: Stabilize, swaps: list[Swap], advice: list[Advice]) -> AbstractContextManager[Any] | None:
    if not options.enabled:
        return None
    from nanguard.stabilizer import stabilize

    return stabilize(options.epsilon, saturated=options.saturated, swaps=swaps, advice=advice)
