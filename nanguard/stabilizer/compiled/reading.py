"""From a node of a graph to a `Call` of the algebra."""

from __future__ import annotations

import builtins
import operator
from collections.abc import Mapping
from typing import Any, Protocol, final

import torch
from torch import Tensor, fx

from nanguard.algebra import Apply, Call, Law, Leaf, Operand, Spelling, Term, Unrecognised, untracked
from nanguard.algebra.operators import FULL
from nanguard.stabilizer.compiled.memory import Memory, example, is_plain
from nanguard.stabilizer.compiled.sizes import Opaque, Size, size_of
from nanguard.stabilizer.memory import is_real
from nanguard.stabilizer.resolve import law_table

__all__ = ["Kept", "Known", "Part", "Reading", "lawful", "shape_of"]

_CONSTANTS = (bool, int, float, str, range, torch.dtype, torch.device, type(Ellipsis))
# Methods that answer an operator whose left side is a number.
_COMMUTATIVE = frozenset({"add", "mul"})


@final
class Kept:
    """A tensor as it was before a node wrote into it. The copy is made only if something depends on it.

    Attributes:
        node: what computes the tensor.
        before: the node that writes into it.
    """

    def __init__(self, node: fx.Node, before: fx.Node) -> None:
        self.node, self.before = node, before
        self._copy: fx.Node | None = None

    def write(self, graph: fx.Graph) -> fx.Node:
        """The node of the copy."""
        if self._copy is None:
            with graph.inserting_before(self.before):
                self._copy = graph.call_method("clone", (self.node,))
            self._copy.meta = dict(self.node.meta)
        return self._copy


@final
class Part:
    """One of several results of a node.

    Attributes:
        node: the node.
        position: which of them.
    """

    def __init__(self, node: fx.Node, position: int) -> None:
        self.node, self.position = node, position

    def write(self, graph: fx.Graph) -> fx.Node:
        """A node, at the place where the graph is being written, whose value it is."""
        part = graph.call_function(operator.getitem, (self.node, self.position))
        part.meta["example_value"] = example(self.node)[self.position]
        return part


def counts_up(node: fx.Node, length: Any) -> bool:
    """Whether a node is the range 0, 1, ..., length - 1, in every call."""
    if node.target is not torch.arange or node.kwargs.get("out") is not None:
        return False
    args = [*node.args, *(node.kwargs[name] for name in ("start", "end", "step") if name in node.kwargs)]
    if len(args) > 1 and (args[0] != 0 or args[2:] not in ([], [1])):
        return False
    end = args[1] if len(args) > 1 else args[0]
    try:
        return bool((size_of(example(end), lambda graph: end) if isinstance(end, fx.Node) else end) == length)
    except Unrecognised:
        return False


@final
class Known:
    """The logarithm of one value.

    Attributes:
        term: the logarithm.
        parents: what is known about the values that it was computed from.
        pinned: whether derivatives at this value are asked for, which a swap would bypass.
        keys: the memory that the value and its term depend on.
    """

    def __init__(self, term: Term, parents: tuple[Known, ...], pinned: bool, keys: frozenset[int | None]) -> None:
        self.term = term
        self.parents = parents
        self.pinned: bool = pinned or any(parent.pinned for parent in parents)
        self.keys = keys


class Knowledge(Protocol):
    """What a reading asks about values."""

    memory: Memory

    def find(self, value: Tensor) -> Known | None:
        """What is known about a value."""

    def node_of(self, node: fx.Node) -> fx.Node:
        """The first node that computed the very same tensor."""

    def version(self, value: Tensor) -> int:
        """How often the memory of a value has been written into so far."""


def lawful(node: fx.Node) -> tuple[Law, Spelling, tuple[Any, ...], Mapping[str, Any]] | None:
    """The law that knows what a node calls, and the arguments in the order of its spelling."""
    if node.op not in ("call_function", "call_method"):
        return None
    for candidate, args in _candidates(node):
        try:
            found = law_table().get(candidate)
        except TypeError:  # without a hash
            continue
        if found is not None:
            return *found, args, node.kwargs
    return None


def _candidates(node: fx.Node) -> list[tuple[Any, tuple[Any, ...]]]:
    """The functions that a node may stand for, as function modes report them."""
    target, args = node.target, node.args
    if node.op == "call_method":
        return [(getattr(Tensor, str(target), None), args)]
    if target is builtins.getattr and len(args) == 2 and isinstance(args[1], str):
        return [(getattr(getattr(Tensor, args[1], None), "__get__", None), args[:1])]
    module = getattr(target, "__module__", None)
    if module == "torch._C._nn":  # what functions of torch.nn.functional come down to
        return [(target, args), (getattr(torch.nn.functional, getattr(target, "__name__", ""), None), args)]
    if module != "_operator":
        return [(target, args)]
    name = getattr(target, "__name__", "").removesuffix("_")
    if args and isinstance(example(args[0]), Tensor):
        return [(getattr(Tensor, f"__{name}__", None), args), (getattr(Tensor, name, None), args)]
    if len(args) == 2 and isinstance(example(args[1]), Tensor) and not isinstance(example(args[0]), (tuple, list)):
        swapped = (args[1], args[0])
        plain = [(getattr(Tensor, name, None), swapped)] if name in _COMMUTATIVE else []
        return [(getattr(Tensor, f"__r{name}__", None), swapped), *plain]
    return []


def shape_of(node: Any, value: Tensor) -> tuple[Any, ...]:
    """The shape of what a node (or a part of its results) computed, as laws may see it."""

    def recipe(dim: int) -> Any:
        return lambda graph: graph.call_method("size", (written_down(node, graph), dim))

    return tuple(size_of(size, recipe(dim)) for dim, size in enumerate(value.shape))


def written_down(value: Any, graph: fx.Graph) -> Any:
    """The node that stands for the value of a leaf."""
    return value if isinstance(value, fx.Node) else value.write(graph)


@final
class Reading:
    """One call as the algebra sees it, together with what was known about its operands at that moment.

    Attributes:
        node: the call.
        sound: whether everything among the arguments may be depended on.
        parents: what is known of the operands.
        operands: the nodes of the operands.
    """

    def __init__(self, knowledge: Knowledge, node: fx.Node, bound: Mapping[str, Any], keep_source: bool) -> None:
        self._knowledge = knowledge
        self._keep_source = keep_source
        self.node = node
        self.sound = True
        self.parents: tuple[Known, ...] = ()
        self.operands: list[fx.Node] = []
        self._arguments = {name: self._argument(value) for name, value in bound.items()}

    def term(self, law: Law, position: int, results: list[Tensor], tracked: bool) -> Term | None:
        """The logarithm of one of the results (for a query: the result itself), or `None` where nothing is known about it."""
        result = results[position]
        first = example(self.operands[0]) if self.operands else result
        if not is_plain(result) or not is_real(result) or result.device != first.device:
            return None
        if self._arguments.get("requires_grad"):
            return None
        if not self.operands and result.requires_grad and not self._knowledge.memory.is_edited(result):
            return None
        shapes = tuple(shape_of(part, value) for part, value in zip(self._parts(results), results, strict=True))
        same_dtype = result.dtype == first.dtype
        call = Call(self._arguments, shapes[position], position, shapes, same_dtype)
        try:
            term = law.derive(call)
            if term.shape != shapes[position]:
                return None
        except Unrecognised:
            return None
        except TypeError:
            if self._has_unknown_numbers():
                return None
            raise
        return term if tracked else untracked(term)

    def _parts(self, results: list[Tensor]) -> list[Any]:
        if isinstance(example(self.node), Tensor):
            return [self.node]
        if example(self.node) is None:  # an assignment
            return self.operands[:1]
        return [Part(self.node, place) for place in range(len(results))]

    def _has_unknown_numbers(self) -> bool:
        found = [*self._arguments.values(), *(size for node in self.operands for size in example(node).shape)]
        return any(isinstance(value, (Opaque, Size, torch.SymInt)) for value in _flat(found))

    def _argument(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self._operand(value) if isinstance(example(value), Tensor) else self._number(value)
        if isinstance(value, (tuple, list)) and value and all(isinstance(example(entry), Tensor) for entry in value):
            return tuple(map(self._operand, value))
        return self._nested(value) if isinstance(value, (tuple, list, slice)) else value

    def _operand(self, node: fx.Node) -> Operand:
        value = example(node)
        trusted = self._knowledge.memory.is_trusted(value)
        known = self._knowledge.find(value) if trusted else None
        full = (
            known.term if known is not None and isinstance(known.term, Apply) and known.term.operator is FULL else None
        )
        if known is not None and (full is None or value.dim()):
            self.parents = (*self.parents, known)
        self.operands.append(node)
        leaf = self._leaf(node)
        if not trusted:
            return Operand(leaf, None, trusted=False)
        if full is not None:
            return Operand(leaf, constant=full.params["constant"])
        term = known.term if known is not None else None
        return Operand(leaf, term, real=is_real(value), mask=value.dtype is torch.bool)

    def _leaf(self, node: fx.Node) -> Leaf:
        first = self._knowledge.node_of(node)
        source = Kept(first, self.node) if self._keep_source else first
        value = example(node)
        tracked = self._knowledge.memory.is_tracked(value)
        shape = shape_of(source, value)
        counts = value.ndim == 1 and counts_up(first, shape[0])
        return Leaf(source, shape, self._knowledge.version(value), tracked, lambda: counts)

    def _number(self, node: fx.Node) -> Any:
        value = example(node)
        return size_of(value, lambda graph: node) if isinstance(value, torch.SymInt) else Opaque(node)

    def _nested(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            if not isinstance(example(value), Tensor):
                return self._number(value)
            self.sound &= self._knowledge.memory.is_trusted(example(value))
            return self._leaf(value)
        if isinstance(value, tuple):
            return tuple(map(self._nested, value))
        if isinstance(value, list):
            return list(map(self._nested, value))
        if isinstance(value, slice):
            return slice(self._nested(value.start), self._nested(value.stop), self._nested(value.step))
        self.sound &= value is None or isinstance(value, _CONSTANTS)
        return value


def _flat(values: Any) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if isinstance(value, slice):
            found += [value.start, value.stop, value.step]
        elif isinstance(value, (tuple, list)):
            found += _flat(value)
        else:
            found.append(value)
    return found
