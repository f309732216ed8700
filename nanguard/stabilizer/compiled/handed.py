"""What is known about the results of a compiled graph, for the eager code that goes on with them.

A term is handed over together with its leaves. Where these are neither inputs nor results of the graph they become further
results, which the user's code does not see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, fx

from nanguard.algebra import Apply, Leaf, Term, Unrecognised, untracked
from nanguard.algebra import operators as ops
from nanguard.stabilizer.blocks import Block, active_blocks
from nanguard.stabilizer.compiled.boundary import Boundary, Handed
from nanguard.stabilizer.compiled.memory import example
from nanguard.stabilizer.compiled.plan import Plan
from nanguard.stabilizer.compiled.reading import Kept, Part
from nanguard.stabilizer.compiled.remembered import Remembered
from nanguard.stabilizer.compiled.sizes import Opaque, Size
from nanguard.stabilizer.compiled.terms import rebuilt
from nanguard.stabilizer.knowledge import Known

__all__ = ["hand_over", "handing"]

# More of them are no loss.
_MOST = 8


# No tuples: terms have tuples of their own.
@final
@dataclass(frozen=True)
class _Input:
    place: int


@final
@dataclass(frozen=True)
class _Result:
    place: int


@final
@dataclass(frozen=True)
class _Dim:
    """A size that differs from call to call, as that of a tensor there."""

    tensor: _Input | _Result
    dim: int


def hand_over(graph: fx.Graph, plan: Plan, boundary: Boundary) -> None:
    """Put down what a plan knows about the results of a graph. The graph gets further results for what that depends on."""
    output = next((node for node in graph.nodes if node.op == "output"), None)
    results = None if output is None else output.args[0]
    if output is None or not isinstance(results, (tuple, list)):
        return
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    places = _Places(plan, inputs, results)
    for place, node in enumerate(results):
        term = places.portable(node)
        if term is not None:
            boundary.handed.append(Handed(place, term))
    boundary.further = len(places.further)
    if places.further:
        output.args = ((*results, *places.further),)


@final
class _Places:
    """Where what a term depends on can be had, once the graph has run.

    Arguments:
        plan: what is known in the graph.
        inputs: of the graph.
        results: of the graph.

    Attributes:
        further: what has to become a result, too.
    """

    def __init__(self, plan: Plan, inputs: Sequence[fx.Node], results: Sequence[Any]) -> None:
        self.further: list[fx.Node] = []
        self._plan = plan
        self._results = len(results)
        self._places: dict[fx.Node, _Input | _Result] = {
            plan.node_of(node): _Result(place) for place, node in enumerate(results) if isinstance(node, fx.Node)
        }
        self._places.update({node: _Input(place) for place, node in enumerate(inputs)})
        self._dims: dict[Any, _Dim] = {}
        for node in self._places:
            self._note_dims(node)

    def portable(self, node: Any) -> Term | None:
        """The logarithm of a result, with places for what it depends on; `None` where there is none."""
        value = example(node)
        known = self._plan.find(value) if isinstance(value, Tensor) else None
        if known is None or known.pinned or not known.term.leaves or node.op == "placeholder":
            return None
        if self._plan.memory.is_edited(value):
            return None
        before = len(self.further)
        try:
            term: Term = rebuilt(known.term, {}, self._at)
        except Unrecognised:
            for added in self.further[before:]:
                del self._places[added]
            del self.further[before:]
            return None
        return term

    def _at(self, entry: Any) -> Any:
        if isinstance(entry, fx.Node):
            if self._plan.memory.is_edited(example(entry)):
                raise Unrecognised
            if entry not in self._places:
                self._add(entry)
            return self._places[entry]
        if isinstance(entry, Size) and entry.expression in self._dims:
            return self._dims[entry.expression]
        if isinstance(entry, (Kept, Opaque, Part, Remembered, Size)):
            raise Unrecognised
        return entry

    def _add(self, node: fx.Node) -> None:
        if len(self.further) >= _MOST or node.op not in ("call_function", "call_method"):
            raise Unrecognised
        if not self._plan.memory.is_trusted(example(node)):
            raise Unrecognised
        self._places[node] = _Result(self._results + len(self.further))
        self.further.append(node)
        self._note_dims(node)

    def _note_dims(self, node: fx.Node) -> None:
        """Where sizes that differ from call to call can be seen."""
        value = example(node)
        for dim, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
            if isinstance(size, torch.SymInt):
                self._dims.setdefault(size.node.expr, _Dim(self._places[node], dim))


def handing(
    compiled: Callable[..., Any], boundary: Boundary, known: Sequence[int] = (), odds: Sequence[bool] = ()
) -> Callable[..., Any]:
    """A compiled graph that tells the block what is known about its results.

    Arguments:
        compiled: the graph.
        boundary: what crosses its boundaries.
        known: places of the inputs whose logarithms it has as further inputs.
        odds: whether these are logarithms of odds.
    """
    if not boundary.handed:
        return compiled
    handed, further = tuple(boundary.handed), boundary.further

    def run(*args: Any) -> Any:
        block = next(iter(active_blocks()[-1:]), None)
        found = [] if block is None else [block.exchange.known(args[place]) for place in known]
        results = compiled(*args)
        if block is not None and None not in found:
            parents = tuple(entry for entry in found if entry is not None)
            values = _Values(args, results, parents, odds)
            with torch._C.DisableTorchFunction():
                for place, term in handed:
                    _tell(block, results[place], term, values)
        return results[: len(results) - further] if further else results

    return run


class _Values(NamedTuple):
    """What a graph was given, what it gave, and what is known of those of its inputs that the last ones are logarithms of."""

    inputs: Sequence[Any]
    results: Sequence[Any]
    parents: tuple[Known, ...]
    odds: Sequence[bool]

    def at(self, entry: Any) -> Any:
        """The value that stands there."""
        if isinstance(entry, (_Input, _Result)):
            return (self.inputs if isinstance(entry, _Input) else self.results)[entry.place]
        return self.at(entry.tensor).shape[entry.dim] if isinstance(entry, _Dim) else entry

    def shape(self, entries: Sequence[Any]) -> tuple[int, ...]:
        """A shape in this call."""
        return tuple(map(self.at, entries))

    def outside(self, part: Term) -> Term | None:
        """A logarithm that the graph was given as it is known outside; `None` for anything else."""
        leaf = part
        if isinstance(part, Apply) and part.operator is ops.LOG_SIGMOID:
            leaf = part.args[0]
        place = leaf.value.place if isinstance(leaf, Leaf) and isinstance(leaf.value, _Input) else -1
        further = place - (len(self.inputs) - len(self.parents))
        if further < 0 or self.odds[further] != (leaf is not part):
            return None
        term = self.parents[further].term
        return term if all(found.tracked for found in leaf.leaves) else untracked(term)


def _find(term: Term, values: _Values, whole: dict[int, Any]) -> None:
    found = values.outside(term)
    if found is not None:
        whole[id(term)] = found
    elif isinstance(term, Apply):
        for arg in term.args:
            _find(arg, values, whole)


def _tell(block: Block, result: Any, term: Term, values: _Values) -> None:
    whole: dict[int, Any] = {}
    _find(term, values, whole)
    for leaf in term.leaves:
        if id(leaf) in whole:
            continue
        value, shape = values.at(leaf.value), values.shape(leaf.shape)
        if not isinstance(value, Tensor) or tuple(value.shape) != shape:
            return  # it is not what it was when the graph was traced
        whole[id(leaf)] = Leaf(value, shape, value._version, leaf.tracked, leaf.counts)
    if tuple(result.shape) == values.shape(term.shape):
        block.exchange.receive(result, rebuilt(term, whole, values.at), values.parents)
