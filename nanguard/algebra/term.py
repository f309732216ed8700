"""Terms: small symbolic expressions for the logarithm of a tensor. Leaves are opaque; no torch in here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final

__all__ = ["Apply", "Leaf", "Operator", "Shape", "Term", "Unrecognised", "map_leaves", "untracked"]

Shape: TypeAlias = "tuple[int, ...]"


class Unrecognised(Exception):
    """What a law raises where it does not apply: nothing is known about the result. It never leaves the front ends."""


@final
@dataclass(frozen=True, eq=False)  # there is one of each, and comparing them is what rules do all the time
class Operator:
    """One operation that a term may consist of.

    Attributes:
        name: the field's name for it.
        function: dotted name of the function that computes it from its arguments and, by keyword, its parameters; empty for
            numbers of either sign, which are computed otherwise.
        source: how to write it: ``{0}`` is the first argument, ``{dim}`` a parameter.
        fresh: whether its result is memory of its own that no derivative has saved.
        infix: whether `source` needs parentheses inside another expression.
        move: whether it only moves, picks or repeats elements, and so applies to any tensor, not to logarithms alone.
        sign: whether the number that it stands for may be negative.
    """

    name: str
    function: str
    source: str
    fresh: bool = True
    infix: bool = False
    move: bool = False
    sign: Literal["any", "positive", "as arguments", "as first"] = "as arguments"


def _never() -> bool:
    return False


@final
class Leaf:
    """A tensor as it was when it was recorded.

    Attributes:
        value: the tensor; the algebra never looks into it.
        shape: its shape.
        version: its version counter at that time, so that later edits show.
        tracked: whether derivatives flow into it from here.
        counts: tells whether it is known to hold 0, 1, 2, ...
    """

    __slots__ = ("counts", "shape", "tracked", "value", "version")

    size = 1
    signed = False

    def __init__(
        self,
        value: Any,
        shape: Shape,
        version: int = 0,
        tracked: bool = True,
        counts: Callable[[], bool] = _never,
    ) -> None:
        self.value = value
        self.shape = shape
        self.version = version
        self.tracked = tracked
        self.counts = counts

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """The leaf itself."""
        return (self,)

    def __repr__(self) -> str:
        return f"Leaf{self.shape}"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Leaf):
            return NotImplemented
        return self.value is other.value and self.version == other.version and self.tracked == other.tracked

    def __hash__(self) -> int:
        return hash((id(self.value), self.version, self.tracked))


@final
class Apply:
    """An operator applied to terms.

    Attributes:
        operator: which one.
        args: the terms it is applied to.
        params: its parameters by name: numbers, dims, index keys (in which tensors are leaves).
        shape: the shape of the result.
        size: number of nodes, counted as a tree.
        leaves: all tensors that the value depends on, index tensors included.
        signed: whether the number that the term stands for may be negative; it is computed as a factor times an exponential.
    """

    __slots__ = ("args", "leaves", "operator", "params", "shape", "signed", "size")

    def __init__(self, operator: Operator, args: tuple[Term, ...], shape: Shape, **params: Any) -> None:
        self.operator = operator
        self.args = args
        self.shape = shape
        self.params = params
        size, signed = 1, operator.sign == "any"
        leaves = tuple(_parameter_leaves(params.values())) if params else ()
        for arg in args:
            size += arg.size
            leaves = leaves + arg.leaves
            signed = signed or (arg.signed and operator.sign == "as arguments")
        if operator.sign == "as first":
            signed = args[0].signed
        self.size: int = size
        self.leaves: tuple[Leaf, ...] = leaves
        self.signed: bool = signed

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Apply):
            return NotImplemented
        mine = (self.operator, self.shape, self.size, self.args, self.params)
        return mine == (other.operator, other.shape, other.size, other.args, other.params)

    __hash__ = None  # type: ignore[assignment] # index keys hold slices, which have no hash before Python 3.12

    def __repr__(self) -> str:
        parts = [*map(repr, self.args), *(f"{name}={value!r}" for name, value in self.params.items())]
        return f"{self.operator.name}({', '.join(parts)})"


Term: TypeAlias = "Leaf | Apply"


def map_leaves(change: Callable[[Leaf], Leaf], term: Term) -> Term:
    """The same term with other leaves. Parameters (index tensors carry no derivative) stay."""
    if isinstance(term, Leaf):
        return change(term)
    args = tuple(map_leaves(change, arg) for arg in term.args)
    if all(new is old for new, old in zip(args, term.args, strict=True)):
        return term
    return Apply(term.operator, args, term.shape, **term.params)


def untracked(term: Term) -> Term:
    """The same value without derivatives: detaching commutes with everything, so it happens at the leaves."""
    if not any(leaf.tracked for leaf in term.leaves):
        return term
    return map_leaves(lambda leaf: Leaf(leaf.value, leaf.shape, leaf.version, False) if leaf.tracked else leaf, term)


def _parameter_leaves(values: Iterable[Any]) -> Iterator[Leaf]:
    for value in values:
        kind = type(value)
        if kind is Leaf:
            yield value
        elif kind is tuple or kind is list:
            yield from _parameter_leaves(value)
        elif kind is slice:
            yield from _parameter_leaves((value.start, value.stop, value.step))
