"""How a value is replaced: decided once for all calls that look the same, and done for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor

from nanguard.algebra import Rule, Term
from nanguard.stabilizer import environment
from nanguard.stabilizer.accuracy import is_picked, is_small
from nanguard.stabilizer.evaluate import Program, compute_dtype, is_fresh, program
from nanguard.stabilizer.graft import Derivative, Function, graft
from nanguard.stabilizer.outline import filled, outlined
from nanguard.stabilizer.picked import Picking, picking
from nanguard.stabilizer.restarts import Beginning, Restart

__all__ = ["Answer", "answer_by", "grafted"]


@final
class Answer:
    """What takes the place of a value.

    Arguments:
        rule: by which.
        outline: the value, with numbers in the place of tensors.
        dtype: of the result.
        inner: what to compute in.

    Attributes:
        fresh: whether its value is memory of its own that no derivative has saved.
        picking: what it picks from a softmax, where it does.
        watched: whether the advisor looks at its numbers.
        as_written: whether it is what the code says, computed otherwise.
        may_stay: whether the value as written costs no more, where it has all its digits.
        near_one: whether the logarithm of what is close to 1 has them.
        differentiable: whether derivatives flow through it although none flow through what is asked about.
        restart: how it is computed, if what was computed is what is remembered of it.
    """

    __slots__ = (
        "_program",
        "as_written",
        "differentiable",
        "dtype",
        "fresh",
        "may_stay",
        "near_one",
        "outline",
        "picking",
        "restart",
        "rule",
        "watched",
    )

    def __init__(self, rule: Rule, outline: Term, dtype: torch.dtype, inner: torch.dtype) -> None:
        self.rule = rule
        self.outline = outline
        self.dtype = dtype
        self.fresh = is_fresh(outline)
        self.picking: Picking | None = picking(outline)
        self.watched = False
        self.as_written = False
        self.may_stay = is_small(outline)
        self.near_one = is_picked(outline)
        self.differentiable = False
        self.restart: Restart | None = None
        self._program: Program = program(outline, inner)

    def written(self, values: Sequence[Tensor]) -> Callable[[], Term]:
        """Gives the term of these tensors."""
        return lambda: filled(self.outline, values, [value._version for value in values])

    def computed(self, values: Sequence[Tensor], naive: Tensor) -> Tensor | None:
        """The stable value from these tensors, or `None` where it cannot take the place of the naive one."""
        return self._checked(self._program, values, naive)

    def computed_with_beginnings(
        self, values: Sequence[Tensor], naive: Tensor
    ) -> tuple[Tensor | None, list[Beginning]]:
        """The same, and what is remembered in the place of where it came from."""
        restart, found = self.restart, []
        if restart is None or environment.in_transform():
            return self.computed(values, naive), []

        def run(values: Sequence[Tensor]) -> Tensor:
            result, beginnings = restart.computed(values)
            found.extend(beginnings)
            return result

        return self._checked(run, values, naive), found

    def _checked(self, run: Program, values: Sequence[Tensor], naive: Tensor) -> Tensor | None:
        if any(value.device != naive.device for value in values):
            return None
        if any(name is not None for name in getattr(naive, "names", ())):
            return None
        if not torch.is_autocast_enabled(naive.device.type):
            stable = run(values)
        else:
            with torch.autocast(naive.device.type, enabled=False):
                stable = run(values)
        differentiable = torch.is_grad_enabled() and (naive.requires_grad or self.differentiable)
        if stable.shape != naive.shape or (stable.requires_grad != differentiable and not environment.in_transform()):
            return None
        return stable


def answer_by(rule: Rule, term: Term, dtype: torch.dtype) -> tuple[Answer, list[Tensor]]:
    """The answer that a term is, and the tensors that it is computed from."""
    outline, values, _ = outlined(term)
    return Answer(rule, outline, dtype, compute_dtype(term, dtype)), values


def grafted(
    naive: Tensor, stable: Tensor, fresh: bool, dtype: torch.dtype, slope: Derivative | None, plain: Function
) -> Tensor:
    """The stable value in the place of the naive one; the arguments are those of `graft`."""
    if environment.in_transform():
        # Transforms differentiate what was computed, and know no intermediates that could be asked for.
        return stable.to(dtype, copy=True)
    return graft(naive, stable, dtype, fresh, slope, plain)
