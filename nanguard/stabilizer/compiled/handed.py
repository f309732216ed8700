"""What is known about the results of a compiled graph, for the eager code that goes on with them.

A term is handed over where its leaves are inputs or results of the graph themselves: the graph stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from nanguard.algebra import Leaf, Term, Unrecognised
from nanguard.stabilizer.blocks import active_blocks
from nanguard.stabilizer.compiled.emit import rebuilt
from nanguard.stabilizer.compiled.memory import example
from nanguard.stabilizer.compiled.plan import Plan
from nanguard.stabilizer.compiled.reading import Kept, Part
from nanguard.stabilizer.compiled.remembered import Remembered
from nanguard.stabilizer.compiled.sizes import Opaque, Size

__all__ = ["Handed", "handed_over", "handing"]


class _Input(NamedTuple):
    place: int


class _Result(NamedTuple):
    place: int


class Handed(NamedTuple):
    """The logarithm of one result of a graph.

    Attributes:
        place: which result.
        term: its logarithm, whose leaves are places of inputs and results.
    """

    place: int
    term: Term


def handed_over(graph: fx.Graph, plan: Plan) -> list[Handed]:
    """What a plan knows about the results of a graph."""
    results = next((node.args[0] for node in graph.nodes if node.op == "output"), ())
    if not isinstance(results, (tuple, list)):
        return []
    places: dict[fx.Node, _Input | _Result] = {
        plan.node_of(node): _Result(place) for place, node in enumerate(results) if isinstance(node, fx.Node)
    }
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    places.update({node: _Input(place) for place, node in enumerate(inputs)})
    found = []
    for place, node in enumerate(results):
        term = _portable(node, plan, places)
        if term is not None:
            found.append(Handed(place, term))
    return found


def _portable(node: Any, plan: Plan, places: dict[fx.Node, _Input | _Result]) -> Term | None:
    value = example(node)
    known = plan.find(value) if isinstance(value, Tensor) else None
    if known is None or known.pinned or not known.term.leaves or node.op == "placeholder":
        return None
    if plan.memory.is_edited(value):
        return None

    def place_of(entry: Any) -> Any:
        if isinstance(entry, fx.Node):
            if entry not in places or plan.memory.is_edited(example(entry)):
                raise Unrecognised
            return places[entry]
        if isinstance(entry, (Kept, Opaque, Part, Remembered, Size)):
            raise Unrecognised
        return entry

    try:
        term: Term = rebuilt(known.term, {}, place_of)
    except Unrecognised:
        return None
    return term


def handing(compiled: Callable[..., Any], handed: Sequence[Handed]) -> Callable[..., Any]:
    """A compiled graph that tells the block what is known about its results."""
    if not handed:
        return compiled

    def run(*args: Any, **kwargs: Any) -> Any:
        results = compiled(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            for place, term in handed:
                _tell(results[place], term, args, results)
        return results

    return run


def _tell(result: Any, term: Term, inputs: Sequence[Any], results: Sequence[Any]) -> None:
    def tensor_at(entry: Any) -> Any:
        if isinstance(entry, (_Input, _Result)):
            return (inputs if isinstance(entry, _Input) else results)[entry.place]
        return entry

    term = rebuilt(term, {}, tensor_at)
    if all(_is_the_same(leaf) for leaf in term.leaves) and tuple(result.shape) == term.shape:
        for block in active_blocks()[-1:]:
            block.receive(result, term)


def _is_the_same(leaf: Leaf) -> bool:
    """Whether a leaf is what it was when the graph was traced."""
    value = leaf.value
    if not isinstance(value, Tensor) or tuple(value.shape) != leaf.shape:
        return False
    leaf.version = value._version
    return True
