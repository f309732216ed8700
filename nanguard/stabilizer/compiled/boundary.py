"""What crosses the boundaries of one graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, final

from torch import Tensor, fx

from nanguard.algebra import Leaf, Term
from nanguard.algebra import operators as ops
from nanguard.stabilizer.compiled.terms import rebuilt

__all__ = ["Boundary", "Handed"]


class Handed(NamedTuple):
    """The logarithm of one result of a graph.

    Attributes:
        place: which result.
        term: its logarithm, whose leaves and sizes are those of inputs and results.
    """

    place: int
    term: Term


@final
@dataclass
class Boundary:
    """What crosses the boundaries of one graph.

    Attributes:
        given: values of inputs, each with its logarithm, which is made of a further input.
        logarithms: the logarithms as they are known outside, by the nodes of further inputs that are these.
        odds: the same, by the nodes of further inputs that are the logarithms of odds.
        handed: what is known about its results.
        further: how many results it has beside those that the user's code gets, as what is handed over depends on them.
        operators: the names of all operators of what was replaced in it.
    """

    given: Sequence[tuple[Tensor, Term]] = ()
    logarithms: Mapping[fx.Node, Term] = field(default_factory=dict)
    odds: Mapping[fx.Node, Term] = field(default_factory=dict)
    handed: list[Handed] = field(default_factory=list)
    further: int = 0
    operators: set[str] = field(default_factory=set)

    def tells_more_than(self, other: Boundary) -> bool:
        """Whether more of its results are known that could have a logarithm."""
        mine, others = (sum(not entry.term.signed for entry in side.handed) for side in (self, other))
        return mine > others

    def outside(self, term: Term) -> Term:
        """A term as it is known outside of the graph: what depends on what it is that is known, is decided by that."""
        whole: dict[int, Term] = {}
        self._find(term, whole)
        return rebuilt(term, whole, lambda value: value) if whole else term

    def _find(self, term: Term, whole: dict[int, Term]) -> None:
        if isinstance(term, Leaf):
            if isinstance(term.value, fx.Node) and term.value in self.logarithms:
                whole[id(term)] = self.logarithms[term.value]
            return
        inner = term.args[0] if term.operator is ops.LOG_SIGMOID else None
        if isinstance(inner, Leaf) and isinstance(inner.value, fx.Node) and inner.value in self.odds:
            whole[id(term)] = self.odds[inner.value]
            return
        for arg in term.args:
            self._find(arg, whole)
