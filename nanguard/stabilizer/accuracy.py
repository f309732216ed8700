"""Where the numbers of the user's code are as good as any: there they are kept.

A softmax, a sigmoid and the exponential of moderate numbers have all their digits, and so has a sum of them. So have
multiples and powers of them, and any numbers divided by them. While 2^-24 <= q <= 2^24, neither log q nor its derivative 1 /
q, nor the derivative of e / q, overflows or underflows, even if it is multiplied by 1e31. The logarithm of what is close to 1
loses digits all the same, as log(1 + e) becomes 0; only that of a softmax is no better in its stable form.

To look costs less than to compute anew, unless the tensors are large, or the device would have to be waited for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from nanguard.algebra import Apply, Law, Leaf, Term
from nanguard.algebra import operators as ops
from nanguard.algebra.pattern import is_bounded, is_sigmoid_multiple
from nanguard.stabilizer import environment

__all__ = ["Digits", "digits_of", "digits_of_fraction", "digits_of_power", "divisor_of", "is_small", "keeps_digits"]

Digits = Literal["all", "if parents", "if divisor", "unknown"]

# What comes from anything larger is faster computed anew, in one go; and to look at more numbers takes as long as that.
SMALL = 1 << 20
FEW = 1 << 16
_BOUND = 2.0**24
_DTYPES = (torch.float32, torch.float64)
_SOURCES = frozenset({"exp", "softmax", "sigmoid"})
_DIVISORS = {"div": "other", "reciprocal": "input", "sqrt": "input", "rsqrt": "input", "pow": "input"}
_POWERS = frozenset({"sqrt", "rsqrt", "pow", "square"})
# Of what has their shape already, they are the thing itself.
_VIEWS = frozenset({"broadcast_tensors", "expand", "reshape"})
# Where a multiple is moderate, so is what it is a multiple of, nearly.
_FEW_TIMES = math.log(_BOUND)


def digits_of(law: Law, outline: Term) -> Digits:
    """Whether a result has all its digits: always, if what it was computed from has, or if its divisor or root is moderate."""
    if law.name in _POWERS and isinstance(outline, Apply) and outline.operator in (ops.SCALE, ops.NEGATE):
        return "if divisor"
    if law.role == "source":
        return "all" if law.name in _SOURCES else "unknown"
    if isinstance(outline, Leaf):
        return "if parents" if law.name in _VIEWS else "unknown"
    if outline.signed:
        return "unknown"
    if law.name in _DIVISORS and (outline.operator is ops.LOG_SOFTMAX or is_sigmoid_multiple(outline)):
        return "if divisor"
    if law.name == "mul" and outline.operator is ops.ADD and is_bounded(outline):
        return "if parents"  # what has underflowed in a factor has done so in the product
    if law.name == "mul" and outline.operator is ops.SHIFT and abs(outline.params["other"]) <= _FEW_TIMES:
        return "if parents"
    return "if parents" if law.name in ("sum", "add", "detach") or _is_complete(outline) else "unknown"


def digits_of_power(outline: Term) -> Digits:
    """The same of a power whose base nobody looks at: where p^2 is moderate, so is p, but not where its root is."""
    power = isinstance(outline, Apply) and outline.operator is ops.SCALE and outline.params["other"] >= 1
    return "if parents" if power else "unknown"


def digits_of_fraction(law: Law, bound: Mapping[str, Any], known: Sequence[Tensor | None]) -> Digits:
    """The same of numbers as they are, divided by the only tensor that something is `known` of: they can have lost none."""
    divisor = divisor_of(law, bound) if law.name in ("div", "reciprocal") else None
    return "if divisor" if divisor is not None and len(known) == 1 and known[0] is divisor else "unknown"


def _is_complete(outline: Apply) -> bool:
    """Whether all elements of what it was moved from are there, or those that are missing can be no infinities.

    What is missing has a derivative of 0, which an infinite exponential further up would turn into NaN.
    """
    if outline.operator is ops.LOGSUMEXP:
        return isinstance(outline.args[0], Leaf)  # dims of size 1 came or went
    term: Term = outline
    complete = outline.operator.move
    while isinstance(term, Apply) and term.operator.move and len(term.args) == 1:
        complete = complete and (term.operator in (ops.RESHAPE, ops.PERMUTE, ops.EXPAND) or _is_whole(term))
        term = term.args[0]
    probability = isinstance(term, Apply) and term.operator in (ops.LOG_SOFTMAX, ops.LOG_SIGMOID)
    return complete or (probability and outline.operator.move)


def _is_whole(term: Apply) -> bool:
    """Whether it is `x[:, None]` or the like, which leaves nothing out."""
    key = term.params.get("key")
    entries = key if isinstance(key, tuple) else (key,)
    simple = all(entry is None or entry is Ellipsis or type(entry) is slice for entry in entries)
    return term.operator is ops.INDEX and simple and math.prod(term.shape) == math.prod(term.args[0].shape)


def divisor_of(law: Law, bound: Mapping[str, Any]) -> Tensor | None:
    """What a quotient is divided by, where that is a tensor."""
    found = bound.get(_DIVISORS.get(law.name, ""))
    return found if isinstance(found, Tensor) else None


def is_small(term: Term) -> bool:
    """Whether a term is computed from small tensors only."""
    return all(math.prod(leaf.shape) < SMALL for leaf in term.leaves if isinstance(leaf, Leaf))


def is_picked(term: Term) -> bool:
    """Whether it is all or part of the logarithm of a softmax."""
    while isinstance(term, Apply) and term.operator.move and len(term.args) == 1:
        term = term.args[0]
    return isinstance(term, Apply) and term.operator is ops.LOG_SOFTMAX


def keeps_digits(tensor: Tensor, near_one: bool = True) -> bool:
    """Whether its reciprocal, its logarithm and their derivatives are as good as the tensor itself.

    Arguments:
        tensor: of positive numbers.
        near_one: whether some may be close to 1, or on both sides of it.
    """
    if tensor.dtype not in _DTYPES or not tensor.is_cpu or not 0 < tensor.numel() < FEW:
        return False
    if torch._C._len_torch_dispatch_stack() or environment.in_transform():
        return False
    low, high = tensor.detach().aminmax()
    least, most = low.item(), high.item()
    return least >= 1 / _BOUND and most <= _BOUND and (near_one or least >= 2.0 or most <= 0.5)
