"""What a recording consists of: operations, and the non-finite values that they were given and gave.

A non-finite element is *bad*, or it is *meant*: an infinity that the program put there on purpose, as
``masked_fill(mask, -inf)`` does, and what carries it on without turning it into NaN. A tensor may hold both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from nanguard.incident import TensorStats
from nanguard.source import Frame

__all__ = ["Descent", "Evidence", "Mark", "Place", "Record", "Source", "Value", "Write", "storage_of"]


def storage_of(tensor: Tensor) -> int:
    """What all views of one tensor have in common."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse, nested and wrapped tensors have none
        return id(tensor)


@dataclass(frozen=True)
class Place:
    """Where an operation was called.

    Attributes:
        frame: deepest frame of the user's code.
        caller: where that code is a library's, the deepest frame of the user's own project.
        function: class name of the custom `autograd.Function` inside which it was called.
        call: the frame that called that function.
        engine: whether the autograd engine stands between it and the operation, or between it and nobody.
    """

    frame: Frame | None = None
    caller: Frame | None = None
    function: str | None = None
    call: Frame | None = None
    engine: bool = False


@dataclass(eq=False)
class Value:
    """A tensor as it was at one moment; `bad` and `meant` are boolean masks of its shape, or `None` for nowhere."""

    tensor: Tensor
    bad: Tensor | None = None
    meant: Tensor | None = None


@dataclass(eq=False)
class Write:
    """A non-finite value that an operation wrote into memory."""

    record: Record
    value: Value


@dataclass(frozen=True, eq=False)
class Mark:
    """A result that had to be good and was not, as it was when it was seen.

    Attributes:
        tensor: the result.
        mask: where it is bad, of its shape; `None` where its elements cannot be looked at.
        writes: who wrote it, the newest last.
        name: what it is called.
    """

    tensor: Tensor
    mask: Tensor | None
    writes: list[Write]
    name: str = ""


@dataclass(eq=False)
class Source:
    """A non-finite input: who wrote it (the newest last), and whether part of it may come from outside the step."""

    value: Value
    writes: list[Write]
    external: bool
    saved: bool = False  # in a backward pass: made by the forward pass, so no gradient


@dataclass(frozen=True, eq=False)
class Descent:
    """Where one tensor comes from.

    Attributes:
        batch: whether it depends on the batch.
        weights: the parameters and buffers that it is made of, the first few, as ``the buffer norm.scale``.
        leaf: whether it is one of those itself.
        traits: by which functions it was made, each with a text for the advice.
        masked: where it is the exp of a -inf that was meant.
    """

    batch: bool = False
    weights: frozenset[str] = frozenset()
    leaf: bool = False
    traits: Mapping[str, str] = field(default_factory=dict)
    masked: Tensor | None = None


@dataclass(eq=False)
class Evidence:
    """An operation that made bad elements where its inputs had none.

    Attributes:
        new: where, in the shape of its result.
        stats: of all inputs.
        guilty: of element-wise operations, the inputs' values at those elements (the first few hundred), in order.
        nan: whether any of the new elements is NaN.
        zero: whether the gradient that was multiplied there was 0.
        masked: whether that 0 came from a mask of the program (`where`, `masked_fill`, an index).
        meant: whether an infinity that was meant met it there.
        row: whether it was given rows of only -inf.
        independent: positions of the inputs that cannot depend on the batch.
        pointwise: whether each element was made of the same element of the inputs.
    """

    new: Tensor
    stats: tuple[TensorStats, ...] = ()
    guilty: tuple[Tensor, ...] = ()
    nan: bool = False
    zero: bool = False
    masked: bool = False
    meant: bool = False
    row: bool = False
    independent: tuple[int, ...] = ()
    pointwise: bool = False


@dataclass(eq=False)
class Record:
    """One operation.

    Attributes:
        kernel: the dispatcher's name.
        sequence: number of the autograd node that it belongs to.
        function: class name of the custom `autograd.Function` whose backward pass it is part of.
        call: the overload with its arguments, where what it was given is not finite.
        values: what it made that is not finite. Not who wrote it: in a cycle, the memory of a whole step would not be given
            back before the next run needs as much.
        selector: for operations that choose elements (`where`, `masked_fill`), the condition.
        met: of backward operations, what a gradient was that met a value which the forward pass had made non-finite.
        row_masked: whether a row that it reduced held nothing but infinities that were meant.
        given: where each of the tensors comes from that it was given, and the numbers.
        informed: whether the program had numbers of the batch before it, as ``item`` gives them.
    """

    index: int
    kernel: str
    module: str
    place: Place
    backward: bool
    sequence: int | None
    function: str | None = None
    pointwise: bool = False
    selector: Tensor | None = None
    sources: list[Source] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)
    call: tuple[Any, Any, Any] | None = None
    evidence: Evidence | None = None
    met: Evidence | None = None
    mask_like: bool = False
    row_masked: bool = False
    given: tuple[Descent | float, ...] = ()
    informed: bool = False
