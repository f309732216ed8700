"""Sizes and numbers of a graph that are only known when it runs."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, final

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from nanguard.algebra import Unrecognised

__all__ = ["Opaque", "Size", "size_of"]


@final
class Opaque:
    """A number, or whatever else is no tensor, that a node computes; nothing is known about it.

    Attributes:
        node: the node.
    """

    def __init__(self, node: fx.Node) -> None:
        self.node = node

    def write(self, graph: fx.Graph) -> fx.Node:
        """The node whose value it is."""
        return self.node


@final
class Size:
    """A size that differs from call to call.

    Sizes are equal where they are so in every call, and differ where they do so in every call. Any other question raises
    `Unrecognised`: to answer it, the graph would have to be specialised, and compiled anew for other sizes.
    """

    def __init__(self, value: torch.SymInt, recipe: Callable[[fx.Graph], fx.Node]) -> None:
        self._value = value
        self._recipe = recipe

    @property
    def expression(self) -> Any:
        """What it is in terms of the sizes that the graph was traced with."""
        return self._value.node.expr

    def write(self, graph: fx.Graph) -> fx.Node:
        """A node, at the place where the graph is being written, whose value it is."""
        node = self._recipe(graph)
        node.meta.setdefault("example_value", self._value)
        return node

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (int, Size)):
            return NotImplemented
        value = other._value if isinstance(other, Size) else other
        return self._decide(self._value == value, self._value != value)

    def __hash__(self) -> int:
        return hash(self.expression)

    def __lt__(self, other: Any) -> bool:
        return self._decide(self._value < _raw(other), self._value >= _raw(other))

    def __le__(self, other: Any) -> bool:
        return self._decide(self._value <= _raw(other), self._value > _raw(other))

    def __gt__(self, other: Any) -> bool:
        return not self <= other

    def __ge__(self, other: Any) -> bool:
        return not self < other

    def __add__(self, other: Any) -> Any:
        return self._combined(operator.add, other)

    def __mul__(self, other: Any) -> Any:
        return self._combined(operator.mul, other)

    __radd__ = __add__
    __rmul__ = __mul__

    def __repr__(self) -> str:
        return str(self._value)

    def __index__(self) -> int:
        raise Unrecognised

    def _combined(self, combine: Callable[[Any, Any], Any], other: Any) -> Any:
        if not isinstance(other, (int, Size)):
            raise Unrecognised

        def recipe(graph: fx.Graph) -> fx.Node:
            second = other.write(graph) if isinstance(other, Size) else other
            return graph.call_function(combine, (self.write(graph), second))

        return Size(combine(self._value, _raw(other)), recipe)

    def _decide(self, yes: Any, no: Any) -> bool:
        if statically_known_true(yes):
            return True
        if statically_known_true(no):
            return False
        raise Unrecognised


def size_of(value: Any, recipe: Callable[[fx.Graph], fx.Node]) -> Any:
    """A size as laws may see it: an integer, or a `Size` that `recipe` writes down."""
    if isinstance(value, torch.SymInt):
        return value.node.maybe_as_int() if value.node.maybe_as_int() is not None else Size(value, recipe)
    return value


def _raw(other: Any) -> Any:
    if isinstance(other, Size):
        return other._value
    if isinstance(other, (int, float)):
        return other
    raise Unrecognised
