"""Nodes that compute a term."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, fx

from nanguard.algebra import Apply, Term
from nanguard.stabilizer.compiled.memory import example
from nanguard.stabilizer.compiled.picks import one_of_each_row
from nanguard.stabilizer.compiled.plan import Loss, Plan, Replacement
from nanguard.stabilizer.compiled.reading import Kept, Part
from nanguard.stabilizer.compiled.remembered import Remembered
from nanguard.stabilizer.compiled.sizes import Opaque, Size
from nanguard.stabilizer.compiled.terms import rebuilt
from nanguard.stabilizer.evaluate import compute_dtype, evaluate, evaluate_stem, is_fresh
from nanguard.stabilizer.losses import BinaryCrossEntropy

__all__ = ["carry_out"]


# What stands for a node in a term.
_WRITABLE = (fx.Node, Kept, Opaque, Part, Remembered, Size)


@final
class _Slot:
    """The place of an argument."""

    def __init__(self, index: int) -> None:
        self.index = index


def carry_out(graph: fx.Graph, plan: Plan) -> None:
    """Put the replacements of a plan into the graph, and take out what nobody uses any more."""
    pure = plan.pure
    for remembered in plan.remembered:
        pure.add(_write(graph, remembered))
    for replacement in plan.replacements:
        node = replacement.node
        with graph.inserting_before(node):
            arguments = _Arguments(graph)
            template = arguments.template(one_of_each_row(replacement.term), {})
            edited = any(plan.memory.is_edited(example(source)) for source in arguments.nodes)
            function, loss = _function(replacement, template, edited), replacement.loss
            if loss is not None:
                function = _whole(function, loss, example(node).dtype)
                arguments.nodes += [] if loss.weight is None else [loss.weight]
        node.op, node.target, node.args, node.kwargs = "call_function", function, tuple(arguments.nodes), {}
        pure.add(node)
        for other in replacement.overwritten:
            for user in [user for user in other.users if plan.places.get(user, -1) > plan.places[node]]:
                user.replace_input_with(other, node)
    for node in reversed(graph.nodes):
        if node in pure and not node.users:
            graph.erase_node(node)


def _write(graph: fx.Graph, remembered: Remembered) -> fx.Node:
    """Compute a logarithm right behind what it is the logarithm of."""
    dtype, kind = remembered.example.dtype, remembered.example.device.type
    with graph.inserting_before(remembered.node.next):
        arguments = _Arguments(graph)
        template = arguments.template(one_of_each_row(remembered.term), {})

        def logarithm(*given: Any) -> Tensor:
            with torch._C.DisableTorchFunction(), torch.autocast(kind, enabled=False):
                number = evaluate_stem(_filled(template, given), dtype)
            value = number.factor if remembered.is_factor else number.log
            return torch.ones_like(number.log) if value is None else value.expand(remembered.example.shape)

        node = graph.call_function(logarithm, tuple(arguments.nodes))
    node.meta["example_value"] = remembered.example
    remembered.written = node
    return node


@final
class _Arguments:
    """Collects the nodes that a term depends on."""

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes: list[fx.Node] = []
        self._graph = graph
        self._sizes: dict[str, fx.Node] = {}

    def template(self, value: Any, known: dict[int, Any]) -> Any:
        """A term, or a parameter of one, in which every node is a slot. What occurs several times stays one."""
        return rebuilt(value, known, lambda found: self._slot(found) if isinstance(found, _WRITABLE) else found)

    def _slot(self, value: Any) -> _Slot:
        if isinstance(value, Size):
            node = self._sizes.get(repr(value)) or value.write(self._graph)
            self._sizes[repr(value)] = node
        else:
            node = value if isinstance(value, fx.Node) else value.write(self._graph)
        if node not in self.nodes:
            self.nodes.append(node)
        return _Slot(self.nodes.index(node))


def _filled(template: Term, given: tuple[Any, ...]) -> Term:
    """A template with the arguments in their slots."""
    term: Term = rebuilt(template, {}, lambda found: given[found.index] if isinstance(found, _Slot) else found)
    return term


def _function(replacement: Replacement, template: Term, edited: bool) -> Callable[..., Tensor]:
    """The function that a new node calls: it computes a term from the tensors in its slots.

    Some of them may be `edited` later on, and are copied if a derivative would save them.
    """
    result = example(replacement.node) if replacement.loss is None else replacement.loss.elements
    dtype, device, order = result.dtype, result.device.type, _order_of_dims(result)

    def stable(*given: Any) -> Tensor:
        term = _filled(template, given)
        # Where a backend runs the graph as it is, a derivative must not save the user's tensors. What traces it sees all edits.
        real = all(type(value) in (Tensor, torch.nn.Parameter) for value in given if isinstance(value, Tensor))
        private = edited or real
        with torch._C.DisableTorchFunction():
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    value = evaluate(term, compute_dtype(term, dtype), private=private)
            else:
                value = evaluate(term, compute_dtype(term, dtype), private=private)
            return _settled(value, dtype, order, is_fresh(term) and (private or isinstance(term, Apply)))

    stable.__name__ = stable.__qualname__ = f"stable_{replacement.rule.name.replace('-', '_')}"
    return stable


def _whole(elements: Callable[..., Tensor], loss: Loss, dtype: torch.dtype) -> Callable[..., Tensor]:
    """The function that weighs and reduces the elements of a loss."""
    weighed, options = loss.weight is not None, {**loss.options, "weight": None}

    def stable(*given: Any) -> Tensor:
        whole = BinaryCrossEntropy(elements, {**options, "weight": given[-1]} if weighed else options)
        return whole.whole(elements(*given[:-1] if weighed else given), dtype)

    stable.__name__ = stable.__qualname__ = elements.__name__
    return stable


def _settled(value: Tensor, dtype: torch.dtype, order: tuple[int, ...], fresh: bool) -> Tensor:
    """The value in the dtype and with the layout of the original, in memory of its own."""
    plain = order == tuple(range(value.dim()))
    permuted = value if plain else value.permute(order)
    laid_out = permuted.to(dtype).contiguous()
    if laid_out is permuted and not fresh:
        laid_out = laid_out.clone()
    return laid_out if plain else laid_out.permute(tuple(order.index(dim) for dim in range(value.dim())))


def _order_of_dims(value: Tensor) -> tuple[int, ...]:
    """The dims from the one with the widest stride to that with the narrowest."""
    strides = [_hint(stride) for stride in value.stride()]
    if value.is_contiguous():
        return tuple(range(value.dim()))
    return tuple(sorted(range(value.dim()), key=lambda dim: -strides[dim]))


def _hint(size: Any) -> int:
    """A size as it was when the graph was traced: enough for an order."""
    hint = size.node.hint if isinstance(size, torch.SymInt) else size
    return 0 if hint is None else int(hint)
