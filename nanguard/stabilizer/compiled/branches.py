"""The trap of `torch.where` in compiled code, where nobody can look whether it has been sprung: every branch is made harmless.

What `nanguard.stabilizer.branches` does for eager code is done here to the graph. Values, and gradients that were finite, are
the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, fx

from nanguard.algebra import Leaf, lookup
from nanguard.stabilizer.branches import BOUNDS, HARMLESS, LARGER, LONGEST, SMALLER
from nanguard.stabilizer.compiled.frames import is_of_subclass
from nanguard.stabilizer.compiled.memory import Memory, example, is_plain
from nanguard.stabilizer.compiled.plan import Plan, Replacement
from nanguard.stabilizer.compiled.reading import lawful

__all__ = ["Selections"]


@final
class Selections:
    """The selections of one graph whose branches may spoil a gradient.

    Arguments:
        graph: the graph, after its logarithms and quotients have been replaced.
        plan: by which they were.

    Attributes:
        replacements: the selections.
    """

    def __init__(self, graph: fx.Graph, plan: Plan) -> None:
        self._graph = graph
        self._plan = plan
        self._memory: Memory = plan.memory
        self._lengths: dict[fx.Node, int] = {}
        # What has been made stable is not computed anew, but what is multiplied by it is.
        self._stable = {found.node for found in plan.replacements if found.rule.kind == "logarithm"}
        self._bound: dict[fx.Node, tuple[str, dict[str, Any]]] = {}
        for node in graph.nodes:
            self._visit(node)
        rule = lookup("NG401")
        self.replacements = [Replacement(node, rule, Leaf(node, ()), Leaf(node, ())) for node in self._bound]

    def carry_out(self) -> None:
        """Have every selection take its elements from branches that were computed anew."""
        for node, (name, bound) in self._bound.items():
            if name in LARGER or name in SMALLER:
                bound = {**bound, "larger": name in LARGER}
            with self._graph.inserting_before(node):
                arguments = _SELECT[name](self, bound)
            node.op, node.target, node.args, node.kwargs = "call_function", torch.where, arguments, {}
        for node in reversed(self._graph.nodes):
            if node in self._lengths and node not in self._stable and not node.users:
                self._graph.erase_node(node)

    def _visit(self, node: fx.Node) -> None:
        if node in self._stable and self._is_followed(node):
            self._lengths[node] = 1
            return
        found = None if is_of_subclass(node) else lawful(node)
        if found is None or found[1].in_place or "out" in node.kwargs or not self._is_followed(node):
            return
        law, spelling, args, kwargs = found
        if law.branch == "selects":
            bound = spelling.bind(args, kwargs)
            if bound is not None and self._plan.settings(node) is not None and self._is_trap(law.name, bound):
                self._bound[node] = law.name, bound
        elif law.branch:
            before = [self._lengths[source] for source in node.all_input_nodes if source in self._lengths]
            length = 1 + sum(before)
            if (before or law.branch == "singular") and length <= LONGEST:
                self._lengths[node] = length

    def _is_followed(self, node: fx.Node) -> bool:
        """Whether derivatives flow through a plain result that nobody edits, and that nobody asks for the derivative at."""
        value = example(node)
        if not is_plain(value) or not value.requires_grad or self._memory.is_edited(value):
            return False
        return not self._plan.is_pinned(value) and not any(
            map(self._memory.is_edited, map(example, node.all_input_nodes))
        )

    def _is_trap(self, name: str, bound: dict[str, Any]) -> bool:
        if name in BOUNDS:
            ends = (bound.get("min"), bound.get("max"))
            return self._is_branch(bound["input"]) and all(end is None or type(end) in (int, float) for end in ends)
        if name in LARGER or name in SMALLER:
            pair = (bound["input"], bound.get("other", bound.get("dim")))
            return all(map(_is_node, pair)) and any(map(self._is_branch, pair))
        mask = bound.get("mask" if name == "masked_fill" else "condition", bound["input"])
        is_mask = isinstance(example(mask), Tensor) and (name == "nan_to_num" or example(mask).dtype == torch.bool)
        return is_mask and any(self._is_branch(bound.get(side)) for side in ("input", "other"))

    def _is_branch(self, value: Any) -> bool:
        """Whether it can be computed anew."""
        return _is_node(value) and value in self._lengths and value not in self._stable

    def where(self, bound: dict[str, Any]) -> tuple[Any, ...]:
        """The arguments of `torch.where` for one like it."""
        condition = bound["condition"]
        refused = self._graph.call_function(torch.logical_not, (condition,))
        shape = example(condition)
        return condition, self._anew(bound["input"], condition, shape), self._anew(bound["other"], refused, shape)

    def masked_fill(self, bound: dict[str, Any]) -> tuple[Any, ...]:
        """The arguments of `torch.where` for a mask."""
        mask, value = bound["mask"], bound["input"]
        taken = self._graph.call_function(torch.logical_not, (mask,))
        return taken, self._anew(value, taken, example(mask)), self._typed(bound["value"], value)

    def nan_to_num(self, bound: dict[str, Any]) -> tuple[Any, ...]:
        """The arguments of `torch.where` for what replaces all that is not finite."""
        value = bound["input"]
        options = {name: bound[name] for name in ("nan", "posinf", "neginf")}
        taken = self._graph.call_function(torch.isfinite, (value,))
        other = self._graph.call_function(torch.nan_to_num, (self._graph.call_method("detach", (value,)),), options)
        return taken, self._anew(value, taken, example(value)), other

    def clamp(self, bound: dict[str, Any]) -> tuple[Any, ...]:
        """The arguments of `torch.where` for bounds."""
        value, graph = bound["input"], self._graph
        bare = graph.call_method("detach", (value,))
        bounded = graph.call_function(torch.clamp, (bare, bound.get("min"), bound.get("max")))
        inside = graph.call_function(torch.eq, (bounded, bare))
        return inside, self._anew(value, inside, example(value)), bounded

    def extreme(self, bound: dict[str, Any]) -> tuple[Any, ...]:
        """The arguments of `torch.where` for the larger, or the smaller, of two."""
        graph, one, other = self._graph, bound["input"], bound.get("other", bound.get("dim"))
        pair = (one, other) if bound["larger"] else (other, one)
        first, second = (graph.call_method("detach", (node,)) for node in pair)
        below, above = graph.call_function(torch.lt, (first, second)), graph.call_function(torch.lt, (second, first))
        mask = torch.broadcast_tensors(example(one), example(other))[0]
        new = [
            self._anew(node, graph.call_function(torch.logical_not, (refused,)), mask)
            for node, refused in ((one, below), (other, above))
        ]
        both = graph.call_function(torch.maximum if bound["larger"] else torch.minimum, tuple(new))
        return above, new[0], graph.call_function(torch.where, (below, new[1], both))

    def _typed(self, value: Any, like: fx.Node) -> Any:
        """A filler in the dtype of what is filled; `torch.where` would promote a tensor."""
        return self._graph.call_method("to", (value, example(like).dtype)) if _is_node(value) else value

    def _anew(self, branch: Any, taken: fx.Node, mask: Tensor) -> Any:
        """A branch computed with harmless numbers where it is not taken."""
        if not self._is_branch(branch):
            return branch

        def argument(source: fx.Node) -> Any:
            if self._is_branch(source):
                return self._anew(source, taken, mask)
            value = example(source)
            if not isinstance(value, Tensor) or not value.requires_grad or not _covers(value, mask):
                return source
            harmless = self._graph.call_function(torch.where, (taken, source, HARMLESS))
            harmless.meta["example_value"] = value
            return harmless

        args, kwargs = fx.node.map_arg(branch.args, argument), fx.node.map_arg(branch.kwargs, argument)
        copy = self._graph.create_node(branch.op, branch.target, args, kwargs)
        copy.meta = dict(branch.meta)
        return copy


_SELECT: dict[str, Callable[[Selections, dict[str, Any]], tuple[Any, ...]]] = {
    "where": Selections.where,
    **dict.fromkeys(BOUNDS, Selections.clamp),
    **dict.fromkeys(LARGER | SMALLER, Selections.extreme),
    "masked_fill": Selections.masked_fill,
    "nan_to_num": Selections.nan_to_num,
}


def _is_node(value: Any) -> bool:
    return isinstance(value, fx.Node)


def _covers(value: Tensor, mask: Tensor) -> bool:
    """Whether a mask broadcasts to the shape of a value. Sizes that are not known yet are compared as they are written."""
    if mask.dim() > value.dim():
        return False
    sizes = zip(reversed(value.shape), reversed(mask.shape), strict=False)
    return all(_written(one) == 1 or _written(one) == _written(size) for size, one in sizes)


def _written(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size
