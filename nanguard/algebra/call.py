"""What a law gets to see of a call: canonical arguments, in which every tensor is an `Operand`. No torch in here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, final

from nanguard.algebra.operators import FULL, LOG_SOFTMAX, LOGARITHM, NORMALISED, UNFINISHED
from nanguard.algebra.term import Apply, Leaf, Shape, Term, Unrecognised

__all__ = ["Call", "Operand", "is_logarithm"]


@final
class Operand:
    """A tensor among the arguments.

    Attributes:
        leaf: the tensor as it is now.
        log: its logarithm, where that is known.
        trusted: whether a term may depend on it: a plain tensor that nothing edits unseen.
        real: whether it is of a real floating dtype.
        constant: the number that all its elements are, where that is known.
        mask: whether it is of bools.
        begun: a term that is no logarithm yet, such as that of memory that is being filled.
    """

    __slots__ = ("begun", "constant", "leaf", "log", "mask", "real", "trusted")

    def __init__(
        self,
        leaf: Leaf,
        log: Term | None = None,
        trusted: bool = True,
        real: bool = True,
        constant: float | None = None,
        mask: bool = False,
    ) -> None:
        unfinished = isinstance(log, Apply) and log.operator in UNFINISHED
        self.leaf = leaf
        self.log = None if unfinished else log
        self.begun = log if unfinished else None
        self.mask = mask
        self.trusted = trusted
        self.real = real
        self.constant = constant


@final
class Call:
    """One call of an operation, in canonical form.

    Attributes:
        arguments: by canonical name. Tensors are `Operand`s, also in a list of nothing else; inside other tuples, lists and
            slices they are `Leaf`s.
        shape: shape of the result (of the one at `position`, where there are several).
        position: which of several results is asked about.
        shapes: the shapes of all results.
        same_dtype: whether the result has the dtype of its first operand.

    Front ends ask laws only about results of a real floating dtype on the device of the operands.
    """

    __slots__ = ("arguments", "position", "same_dtype", "shape", "shapes")

    def __init__(
        self,
        arguments: Mapping[str, Any],
        shape: Shape = (),
        position: int = 0,
        shapes: tuple[Shape, ...] = (),
        same_dtype: bool = True,
    ) -> None:
        self.arguments = arguments
        self.shape = shape
        self.position = position
        self.shapes = shapes
        self.same_dtype = same_dtype

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def log(self, name: str = "input") -> Term:
        """The logarithm of an operand. Raises `Unrecognised` where it is not known."""
        value = self.arguments[name]
        if isinstance(value, Operand) and value.log is not None:
            return value.log
        raise Unrecognised

    def exponential(self, name: str = "input") -> Term | None:
        """The logarithm of the exponential of an operand, where more is known than that it is the operand."""
        found = self.begun(name)
        if isinstance(found, Apply) and found.operator is LOGARITHM:
            return found.args[0]
        if not isinstance(found, Apply) or found.operator is not NORMALISED:
            return None
        # It is its own softmax: one that keeps the digits where it rounds to 0.
        return Apply(LOG_SOFTMAX, (self.leaf(name),), found.shape, **found.params)

    def logs(self, name: str) -> tuple[Term, ...]:
        """The logarithms of a list of operands, constants among them. Raises `Unrecognised` where none or one is not known."""
        value = self.arguments[name]
        if not isinstance(value, tuple) or not any(isinstance(entry, Operand) and entry.log for entry in value):
            raise Unrecognised
        return tuple(map(_log_or_constant, value))

    def leaf(self, name: str = "input") -> Leaf:
        """An operand itself. Raises `Unrecognised` for anything that may change unseen."""
        value = self.arguments[name]
        if isinstance(value, Operand) and value.trusted and value.real:
            return value.leaf
        raise Unrecognised

    def index(self, name: str) -> Leaf:
        """A tensor of indices or a mask. Raises `Unrecognised` for anything else."""
        value = self.arguments[name]
        if isinstance(value, Operand) and value.trusted:
            return Leaf(value.leaf.value, value.leaf.shape, value.leaf.version, False)
        raise Unrecognised

    def weight(self, name: str) -> Leaf:
        """A tensor of either sign that nothing else is known about. Raises `Unrecognised` for anything else."""
        value = self.arguments[name]
        if not isinstance(value, Operand) or not value.trusted or value.log is not None:
            raise Unrecognised
        return value.leaf

    def known(self, name: str) -> bool:
        """Whether the logarithm of that argument is known."""
        value = self.arguments[name]
        return isinstance(value, Operand) and value.log is not None

    def begun(self, name: str = "input") -> Term | None:
        """What is known of an operand whose logarithm is not."""
        value = self.arguments[name]
        return value.begun if isinstance(value, Operand) else None

    def is_number(self, name: str) -> bool:
        """Whether that argument is a number, or a tensor of one number only."""
        value = self.arguments[name]
        return value.constant is not None if isinstance(value, Operand) else isinstance(value, (int, float))

    def number(self, name: str) -> float:
        """A finite number. Raises `Unrecognised` for tensors of several numbers, bools and whatever else."""
        value = self.arguments[name]
        if isinstance(value, Operand):
            value = value.constant
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise Unrecognised
        return float(value)

    def positive(self, name: str) -> float:
        """A finite Python number above zero. Raises `Unrecognised` otherwise."""
        value = self.number(name)
        if value <= 0:
            raise Unrecognised
        return value

    def dim(self, shape: Shape, name: str = "dim") -> int:
        """One dimension of `shape`, counted from the front. Raises `Unrecognised` for `None` and what is out of range."""
        return normal_dim(self.arguments[name], len(shape))

    def dims(self, shape: Shape, name: str = "dim") -> tuple[int, ...]:
        """Dimensions to reduce, counted from the front and sorted; all of them for `None` and ``()``."""
        value = self.arguments[name]
        if value is None or value == () or value == []:
            return tuple(range(len(shape)))
        entries = value if isinstance(value, (tuple, list)) else (value,)
        return tuple(sorted({normal_dim(entry, len(shape)) for entry in entries}))

    def absent(self, *names: str) -> None:
        """Raise `Unrecognised` unless these arguments were left out."""
        if any(self.arguments[name] is not None for name in names):
            raise Unrecognised


def is_logarithm(term: Term) -> bool:
    """Whether it tells that a tensor is a logarithm itself."""
    return isinstance(term, Apply) and term.operator in (LOGARITHM, NORMALISED)


def _log_or_constant(entry: Any) -> Term:
    if isinstance(entry, Operand) and entry.log is not None:
        return entry.log
    if isinstance(entry, Operand) and entry.constant is not None and entry.constant >= 0:
        return Apply(FULL, (), entry.leaf.shape, constant=entry.constant)
    raise Unrecognised


def normal_dim(dim: Any, rank: int) -> int:
    """`dim` counted from the front."""
    if isinstance(dim, bool) or not isinstance(dim, int) or not -rank <= dim < rank:
        raise Unrecognised
    return dim % rank
