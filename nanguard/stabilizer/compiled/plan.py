"""The walk over a graph: what is known about its values, and which nodes are replaced."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, fx
from torch.distributions import utils as distributions

from nanguard.algebra import Law, Rule, Spelling, Term, lookup
from nanguard.algebra.decisions import for_logarithm, for_quotient, is_remembered
from nanguard.algebra.families.epsilon import drop_epsilons
from nanguard.algebra.families.saturation import without_floor
from nanguard.stabilizer.compiled.boundary import Boundary
from nanguard.stabilizer.compiled.constants import constant_in
from nanguard.stabilizer.compiled.frames import frames_of, is_of_subclass
from nanguard.stabilizer.compiled.memory import Memory, example, storage_key, tensors_in
from nanguard.stabilizer.compiled.reading import Kept, Known, Part, Reading, lawful
from nanguard.stabilizer.compiled.remembered import Remembered, begun_anew
from nanguard.stabilizer.compiled.settings import Settings
from nanguard.stabilizer.resolve import misuse_table

__all__ = ["Loss", "Plan", "Policy", "Replacement"]

# How a node is stabilised, if at all.
Policy = Callable[[fx.Node], "Settings | None"]

LARGEST_TERM = 256
_OWN = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep

# What watches derivatives at a value: a swap would bypass it.
_PINS = frozenset({"grad", "register_hook", "register_post_accumulate_grad_hook", "retain_grad"})
_GRAD_MODES = frozenset({"_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode"})


class Loss(NamedTuple):
    """A call of `F.binary_cross_entropy`.

    Attributes:
        elements: an example of what it computes before it reduces.
        options: its arguments by name.
    """

    elements: Tensor
    options: Mapping[str, Any]

    @property
    def weight(self) -> fx.Node | None:
        """The node of the weight."""
        found = self.options["weight"]
        return found if isinstance(found, fx.Node) else None


@final
@dataclass(frozen=True)
class Replacement:
    """A node that is to be computed from a term.

    Attributes:
        node: the node.
        rule: what it is an instance of.
        term: what it is computed from.
        told: the same as it is known outside of the graph, for the record.
        overwritten: the nodes before it whose tensor it writes the result into; from there on, it stands for them.
        loss: what is made of the elements, where they are those of a loss.
    """

    node: fx.Node
    rule: Rule
    term: Term
    told: Term
    overwritten: tuple[fx.Node, ...] = ()
    loss: Loss | None = None


@final
class Plan:
    """What is to be replaced in one graph.

    Arguments:
        graph: the graph.
        policy: how its nodes are stabilised.
        boundary: what is known about its inputs.

    Attributes:
        memory: what shares memory in it.
        replacements: in the order of the graph.
        remembered: logarithms with a long history, in the order of the graph.
        pure: nodes whose only effect is their result, so that they can go once nobody uses it.
        places: where each node stands.
    """

    def __init__(self, graph: fx.Graph, policy: Policy, boundary: Boundary) -> None:
        self.memory = Memory(graph)
        self.replacements: list[Replacement] = []
        self.remembered: list[Remembered] = []
        self.pure: set[fx.Node] = set()
        self.places = {node: place for place, node in enumerate(graph.nodes)}
        self._policy = policy
        self._boundary = boundary
        self._known: dict[int, Known] = {}
        self._nodes: dict[int, fx.Node] = {}
        self._versions: dict[int | None, int] = {}
        self._pinned = {id(value) for node in graph.nodes for value in _watched(node)}
        self._grad = torch.is_grad_enabled()
        for value, term in boundary.given:
            if self.memory.is_trusted(value):
                self._record(value, term, ())
        for node in graph.nodes:
            self._visit(node)

    def find(self, value: Tensor) -> Known | None:
        """What is known about a value."""
        return self._known.get(id(value))

    def node_of(self, node: fx.Node) -> fx.Node:
        """The first node that computed the very same tensor."""
        return self._nodes.get(id(example(node)), node)

    def version(self, value: Tensor) -> int:
        """How often the memory of a value has been written into so far."""
        return self._versions.get(storage_key(value), 0)

    def settings(self, node: fx.Node) -> Settings | None:
        """How a node is stabilised, if at all."""
        return self._policy(node)

    def is_pinned(self, value: Tensor) -> bool:
        """Whether derivatives at a value are asked for."""
        return id(value) in self._pinned

    def _visit(self, node: fx.Node) -> None:
        name = getattr(node.target, "__name__", "")
        if name in _GRAD_MODES:
            self._grad = bool(node.args[0]) if name == "_set_grad_enabled" else name.startswith("_exit")
        found = None if is_of_subclass(node) else lawful(node)
        bound = None if found is None else found[1].bind(found[2], found[3])
        if found is not None and bound is not None:
            self._lawful(node, found[0], found[1], bound)
        else:
            self._repair(node)
            self._forget(node)
        self._note_constant(node)
        if isinstance(example(node), Tensor):
            self._nodes.setdefault(id(example(node)), node)

    def _note_constant(self, node: fx.Node) -> None:
        source = example(node.args[0]) if node.args else None
        known = self.find(source) if isinstance(source, Tensor) else None
        term = constant_in(node, None if known is None else known.term)
        if term is not None and self.memory.is_trusted(example(node)):
            self._record(example(node), term, ())

    def _lawful(self, node: fx.Node, law: Law, spelling: Spelling, bound: dict[str, Any]) -> None:
        in_place = spelling.in_place
        # The result of an assignment is what was edited.
        value = example(node.args[0]) if in_place and example(node) is None and node.args else example(node)
        results = list(tensors_in(value))
        reading = Reading(self, node, bound, in_place and law.role == "source")
        known_before = {id(result) for result in results}  # handed on as they are: nothing new is learnt about them
        known_before &= {id(example(operand)) for operand in reading.operands}
        if law.role == "query":
            if len(results) == 1 and reading.sound:
                self._answer(node, law, reading, results[0], in_place)
            self._forget(node)
            return
        terms = [self._term(reading, law, place, results) for place in range(len(results))] if reading.sound else []
        self._forget(node)
        if not in_place and "out" not in node.kwargs:
            self.pure.add(node)
        for result, term in zip(results, terms, strict=False):
            if term is None or (id(result) in known_before and not in_place):
                continue
            if law.quotient and isinstance(value, Tensor):
                self._quotient(node, reading, term, in_place)
            if not in_place and isinstance(value, Tensor):
                term = self._anew(node, term)
            self._record(result, term, reading.parents)

    def _term(self, reading: Reading, law: Law, place: int, results: list[Tensor]) -> Term | None:
        result = results[place]
        # In memory that is edited somewhere, the example tells what it became in the end.
        edited = self.memory.is_edited(result)
        tracked = self._grad and law.name != "detach" if edited else result.requires_grad
        return reading.term(law, place, results, tracked)

    def _answer(self, node: fx.Node, law: Law, reading: Reading, result: Tensor, in_place: bool) -> None:
        settings = self._policy(node)
        if settings is None or not self._may_swap(reading):
            return
        term = self._term(reading, law, 0, [result])
        if term is None:
            return
        floored = without_floor(term) if _is_asked_by_distributions(node) else None
        floor = torch.finfo(example(reading.operands[0]).dtype).eps if settings.repair else None
        found = for_logarithm(term, drop=settings.drop, floored=floored, floor=floor)
        outside = self._boundary.outside(term)
        told = found if outside is term else for_logarithm(outside, drop=settings.drop)
        if found is not None and told is not None:
            self._replace(node, found[1], told, result, in_place)

    def _quotient(self, node: fx.Node, reading: Reading, term: Term, in_place: bool) -> None:
        if self._policy(node) is None or not self._may_swap(reading):
            return
        result = example(node)
        differentiable = result.requires_grad or self.memory.is_edited(result)
        operands = [known.term for known in reading.parents]
        found = for_quotient(term, operands, in_place=in_place, differentiable=differentiable)
        outside = self._boundary.outside(term)
        told = found
        if outside is not term:
            operands = list(map(self._boundary.outside, operands))
            told = for_quotient(outside, operands, in_place=in_place, differentiable=differentiable)
        if found is not None and told is not None:
            self._replace(node, found[1], told, result, in_place)

    def _repair(self, node: fx.Node) -> None:
        """Replace a binary cross-entropy of probabilities, where the user asks for it."""
        settings = self._policy(node)
        if settings is None or not settings.repair or node.target is not torch.nn.functional.binary_cross_entropy:
            return
        law, spelling = misuse_table()[node.target]
        bound = spelling.bind(node.args, node.kwargs)
        subject = None if bound is None else example(bound["input"])
        weight = None if bound is None else example(bound["weight"])
        if bound is None or subject is None or (weight is not None and weight.requires_grad):
            return
        reading = Reading(self, node, bound, keep_source=False)
        term = reading.term(law, 0, [subject], example(node).requires_grad) if reading.sound else None
        rule = lookup(law.advice)
        if term is None or not rule.matches(term) or not self._may_swap(reading):
            return
        term = drop_epsilons(term) if settings.drop else term
        if self._fits(term, subject):
            told = self._boundary.outside(term)
            self.replacements.append(Replacement(node, rule, term, told, loss=Loss(subject, bound)))

    def _replace(self, node: fx.Node, term: Term, told: tuple[Rule, Term], result: Tensor, in_place: bool) -> None:
        overwritten = self._overwritten(node) if in_place else ()
        if overwritten is None or not self._fits(term, result):
            return
        self.replacements.append(Replacement(node, told[0], term, told[1], overwritten))
        if in_place:
            self._nodes[id(result)] = node

    def _overwritten(self, node: fx.Node) -> tuple[fx.Node, ...] | None:
        """The nodes before this one that stand for the tensor that it writes into.

        `None` where it has to be written into: others share the memory. The derivative at what was there before would be 0,
        but 0 times infinity further back.
        """
        value, found = example(node), []
        key = storage_key(value)
        for other, place in self.places.items():
            if place >= self.places[node]:
                break
            if key not in map(storage_key, tensors_in(example(other))):
                continue
            if example(other) is value:
                found.append(other)
            if other.op in ("placeholder", "get_attr"):
                return None
            if example(other) is not value and any(self.places[user] > self.places[node] for user in other.users):
                return None
        return tuple(found) if found else None

    def _may_swap(self, reading: Reading) -> bool:
        return bool(reading.parents) and not any(known.pinned for known in reading.parents)

    def _fits(self, term: Term, result: Tensor) -> bool:
        """Whether the leaves are where the result is, and derivatives flow if they did."""
        values = [_example_of(leaf.value) for leaf in term.leaves]
        if not values or any(value.device != result.device for value in values):
            return False
        if self.memory.is_edited(result) or not result.requires_grad:
            return True
        return any(leaf.tracked and value.is_floating_point() for leaf, value in zip(term.leaves, values, strict=True))

    def _record(self, value: Tensor, term: Term, parents: tuple[Known, ...]) -> None:
        if term.size > LARGEST_TERM:
            return
        leaves = (leaf.value for leaf in term.leaves if not isinstance(leaf.value, Kept))
        keys = frozenset(storage_key(part) for part in (value, *map(_example_of, leaves)))
        if None not in keys:
            self._known[id(value)] = Known(term, parents, id(value) in self._pinned, keys)

    def _anew(self, node: fx.Node, term: Term) -> Term:
        """The term itself, or, where it is long, one of a logarithm that is computed from it."""
        value = example(node)
        if not is_remembered(term) or self._policy(node) is None or self.memory.is_edited(value):
            return term
        values = [_example_of(leaf.value) for leaf in term.leaves]
        if any(map(self.memory.is_edited, values)):
            return term
        term, remembered = begun_anew(node, term, values)
        self.remembered += remembered
        return term

    def _forget(self, node: fx.Node) -> None:
        """Forget all that depends on memory that a node writes into."""
        touched = self.memory.touched(node)
        if touched is None:
            self._known.clear()
        elif touched:
            self._known = {key: known for key, known in self._known.items() if not known.keys & touched}
        for key in touched or ():
            self._versions[key] = self._versions.get(key, 0) + 1


def _example_of(value: Any) -> Any:
    """What the value of a leaf was when the graph was traced."""
    if isinstance(value, Remembered):
        return value.example
    if isinstance(value, Part):
        return example(value.node)[value.position]
    return example(value.node if isinstance(value, Kept) else value)


def _is_asked_by_distributions(node: fx.Node) -> bool:
    """Whether `torch.distributions` bounds probabilities there, or asks for their logarithm."""
    files = [file for file, _, _ in frames_of(node) if not file.startswith(_OWN)]
    return bool(files) and files[-1] == distributions.__file__


def _watched(node: fx.Node) -> list[Tensor]:
    """The values at which a node asks for derivatives."""
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    if name not in _PINS or node.target is operator.getitem:
        return []
    return [value for source in node.all_input_nodes for value in tensors_in(example(source))]
