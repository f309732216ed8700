"""What the recording has to know about the dispatcher's operations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "COPIES",
    "EMPTY",
    "JUDGED",
    "ROWS",
    "STATISTICS",
    "Operation",
    "arguments",
    "broadcast_to",
    "family",
    "operation",
    "reduced_to",
    "row_masked",
]

# One call of torch becomes one or another of these, by the shapes, strides and masks of what it is given.
_MATRIX_PRODUCTS = frozenset(
    f"aten.{name}" for name in ("mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot")
)
_ATTENTION = "aten._scaled_dot_product"

# Memory that nobody has written yet may hold anything; it is judged when it has been written.
EMPTY = frozenset(
    f"aten.{name}"
    for name in ("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided", "resize")
)
# Element-wise operations whose failure is judged by what they were given, also where they overwrite it.
JUDGED = frozenset(
    f"aten.{name}"
    for name in (
        *(
            "log",
            "log2",
            "log10",
            "log1p",
            "xlogy",
            "logit",
            "div",
            "reciprocal",
            "remainder",
            "fmod",
            "floor_divide",
            "pow",
        ),
        *(
            "sqrt",
            "rsqrt",
            "addcdiv",
            "acos",
            "asin",
            "acosh",
            "atanh",
            "erfinv",
            "lgamma",
            "digamma",
            "polygamma",
            "tan",
            "exp",
            "mul",
            "add",
            "sub",
        ),
    )
)
# Operations that give one number (or one distribution) for a row, and have no answer where the whole row is masked.
ROWS = frozenset(
    f"aten.{name}"
    for name in (
        *("_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax", "logsumexp", "logcumsumexp"),
        *("amax", "amin", "max", "min", "aminmax", "topk", "sort"),
    )
)
# Operations that write running statistics, which they do not read while training.
STATISTICS = frozenset(
    f"aten.{name}"
    for name in ("native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm", "miopen_batch_norm")
)
# Operations that hand on what they are given.
COPIES = frozenset(
    f"aten.{name}" for name in ("clone", "_to_copy", "copy", "contiguous", "_unsafe_view", "_reshape_copy")
)
_SAME_SHAPE = frozenset(f"aten.{name}" for name in ("_to_copy", "copy", "clone", "native_dropout", "cumsum_none"))


def family(op: str | None) -> str | None:
    """What an operation is called whatever the size of the batch: which kernel serves it may depend on that."""
    if op in _MATRIX_PRODUCTS:
        return "matrix product"
    return "attention" if op is not None and op.startswith(_ATTENTION) else op


@dataclass(frozen=True)
class Operation:
    """One overload of the dispatcher.

    Attributes:
        name: ``aten.log``, without overload and without the in-place underscore.
        pointwise: whether each element of the result depends on the same element of the (broadcast) inputs.
        view: whether the result is the input's own memory.
        written: positions and names of the arguments that it writes into.
        empty: whether its result is memory that nobody has written yet.
        collective: whether it needs other processes.
    """

    name: str
    pointwise: bool
    view: bool
    written: tuple[tuple[int, str], ...]
    empty: bool
    collective: bool


_KNOWN: dict[Any, Operation] = {}


def operation(func: Any) -> Operation:
    """What is known about an overload."""
    found = _KNOWN.get(func)
    if found is None:
        name = str(func.overloadpacket).removesuffix("_")
        written = tuple(
            (position, argument.name)
            for position, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        )
        if name in STATISTICS:  # the schema of some of them does not say so
            written = ((3, "running_mean"), (4, "running_var"))
        pointwise = torch.Tag.pointwise in func.tags or name in _SAME_SHAPE
        collective = name.startswith(("c10d.", "_c10d_functional."))
        view = bool(func.is_view) and not written
        found = _KNOWN[func] = Operation(name, pointwise, view, written, name in EMPTY, collective)
    return found


def arguments(values: Iterable[Any], found: list[Any] | None = None) -> list[Any]:
    """Tensors and numbers among arguments, in order, also those in lists."""
    found = [] if found is None else found
    for value in values:
        if isinstance(value, (Tensor, float, int)) and not isinstance(value, bool):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            arguments(value, found)
    return found


def broadcast_to(mask: Tensor, shape: torch.Size) -> Tensor | None:
    """A mask in a larger shape, or `None` where it does not fit."""
    try:
        return mask.expand(shape)
    except RuntimeError:
        return None


def reduced_to(mask: Tensor, shape: torch.Size) -> Tensor | None:
    """Which elements of an input of that shape a mask of the broadcast result reaches, or `None` where it does not fit."""
    if mask.shape == shape:
        return mask
    if len(shape) > mask.ndim:
        return None
    extra = mask.ndim - len(shape)
    if any(size not in (1, mask.shape[extra + position]) for position, size in enumerate(shape)):
        return None
    kept = [extra + position for position, size in enumerate(shape) if size == 1 and mask.shape[extra + position] != 1]
    for dim in (*range(extra), *kept):
        mask = mask.any(dim, keepdim=True)
    return mask.reshape(shape)


def row_masked(name: str, args: Any, kwargs: Any) -> Tensor | None:
    """Whether rows that `ROWS` operations reduce hold nothing but infinities of one sign: a mask, `None` if there are none."""
    tensor = args[0]
    dims = kwargs.get("dim", args[1] if len(args) > 1 and not isinstance(args[1], Tensor) else None)
    if name == "aten.topk":
        dims = args[2] if len(args) > 2 else -1
    if name == "aten.sort":
        dims = next((entry for entry in args[1:] if isinstance(entry, int) and not isinstance(entry, bool)), -1)
    found = None
    for value in (float("-inf"), float("inf")):
        same = tensor == value
        if dims is None or dims == []:
            rows = same.all()
        else:
            rows = same
            for dim in dims if isinstance(dims, (list, tuple)) else [dims]:
                rows = rows.all(dim, keepdim=True)
        if tensor.numel() and bool(rows.any()):
            found = rows if found is None else found | rows
    return found
