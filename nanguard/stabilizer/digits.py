"""Positive numbers with all the digits that can be had, for differences: which terms are computed by which mantissas."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from nanguard.algebra import Apply, Leaf, Term
from nanguard.algebra import operators as ops
from nanguard.stabilizer import mantissas, scaled
from nanguard.stabilizer.mantissas import Mantissa
from nanguard.stabilizer.resolve import function
from nanguard.stabilizer.scaled import Scaled

__all__ = ["Digits"]

# From the numbers that it is made of, and from the parameters.
_OF_NUMBERS: dict[str, Callable[..., Mantissa]] = {
    "logsumexp": mantissas.total,
    "logmeanexp": mantissas.mean,
    "shift": mantissas.shift,
    "add": mantissas.product,
    "subtract": mantissas.quotient,
    "masked_fill": mantissas.masked,
    "logaddexp": mantissas.added,
    "plus_constant": mantissas.plus_constant,
}
# The same, from what is no logarithm.
_OF_VALUES: dict[str, Callable[..., Mantissa]] = {"log_softmax": mantissas.softmax, "logsigmoid": mantissas.sigmoid}

# Where those stand that are chosen by their size.
_CHOSEN: dict[str, Callable[[Tensor, dict[str, Any]], Tensor]] = {
    "topk": lambda log, params: torch.topk(log, params["k"], params["dim"], params["largest"]).indices,
    "sort": lambda log, params: torch.sort(log, **params).indices,
    "extreme": lambda log, params: (log.argmax if params["largest"] else log.argmin)(params["dim"], keepdim=True),
}


@final
class Digits:
    """The numbers of one evaluation; those that occur several times are computed once.

    Arguments:
        log: gives the logarithm of a term.
        parameters: gives those of an operator.
        contraction: gives a total of products in one go, where that can be had.
        known: what was computed already, by the terms' ids.
    """

    def __init__(
        self,
        log: Callable[[Term], Tensor],
        parameters: Callable[[Apply], dict[str, Any]],
        contraction: Callable[[Apply], Scaled | None],
        known: dict[int, Mantissa],
    ) -> None:
        self._log = log
        self._parameters = parameters
        self._contraction = contraction
        self._known = known

    def logarithm_of_difference(self, term: Apply) -> Tensor:
        """log(p - q)."""
        first, second = map(self._number, term.args)
        if first.is_exact and second.is_exact:
            return scaled.logarithm_of_difference(first.log, second.log)
        return mantissas.logarithm_of_difference(first, second, self._log(term.args[0]))

    def difference(self, term: Apply) -> Scaled:
        """P - q."""
        first, second = map(self._number, term.args)
        if first.is_exact and second.is_exact:
            return scaled.difference(first.whole, second.whole)
        one, other = torch.broadcast_tensors(*map(self._log, term.args))
        return mantissas.difference(first, second, (one, other))

    def _number(self, term: Term) -> Mantissa:
        if id(term) not in self._known:
            self._known[id(term)] = self._compute(term)
        return self._known[id(term)]

    def _compute(self, term: Term) -> Mantissa:
        if isinstance(term, Leaf) or term.operator is ops.FULL:
            return Mantissa(self._log(term))
        name, args = term.operator.name, term.args
        if not any(arg.signed for arg in args):
            total = self._contraction(term)
            if total is not None:
                return Mantissa(*total)
            if name in _OF_VALUES:
                return _OF_VALUES[name](self._log(args[0]), **self._parameters(term))
            if name in _OF_NUMBERS:
                return _OF_NUMBERS[name](*map(self._number, args), **self._parameters(term))
            if name in _CHOSEN:
                place = _CHOSEN[name](self._log(args[0]).detach(), self._parameters(term))
                pick = functools.partial(_picked, dim=term.params["dim"], place=place, shape=term.shape)
                return mantissas.moved(pick, [self._number(args[0])])
            if term.operator.move:
                move = functools.partial(function(term.operator.function), **self._parameters(term))
                return mantissas.moved(move, list(map(self._number, args)))
        log = self._log(term)
        return Mantissa(log, torch.ones_like(log.detach()))


def _picked(part: Tensor, dim: int, place: Tensor, shape: tuple[int, ...]) -> Tensor:
    return part.gather(dim, place).reshape(shape)
