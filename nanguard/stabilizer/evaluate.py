"""The value of a term as a tensor."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from nanguard.algebra import Leaf, Term
from nanguard.algebra.build import LOG_SOFTMAX, SOFTMAX
from nanguard.stabilizer.resolve import function

__all__ = ["compute_dtype", "evaluate"]


def compute_dtype(term: Term, result: torch.dtype) -> torch.dtype:
    """The dtype to compute in: the widest of the leaves and the result, and float32 at least."""
    return _widest(result, (leaf.value.dtype for leaf in term.leaves if leaf.value.is_floating_point()))


def evaluate(term: Term, dtype: torch.dtype, *, private: bool = False) -> Tensor:
    """The value of a term, differentiable in its tracked leaves.

    Arguments:
        term: the term; its leaves are tensors.
        dtype: what to compute in.
        private: whether leaves are copied before they are used, so that no derivative saves the user's own tensor, which he may
            go on to edit. Derivatives of softmaxes save their output, so their argument needs none.
    """
    if isinstance(term, Leaf):
        value: Tensor = term.value if term.tracked else term.value.detach()
        return value.to(dtype, copy=private)
    saves_input = term.operator not in (LOG_SOFTMAX, SOFTMAX)
    args = [evaluate(arg, dtype, private=saves_input) for arg in term.args]
    params = {name: _value(value) for name, value in term.params.items()}
    result: Tensor = function(term.operator.function)(*args, **params)
    return result


def is_fresh(term: Term) -> bool:
    """Whether the value, if private, is memory of its own that no derivative has saved."""
    return isinstance(term, Leaf) or term.operator.fresh


def _value(value: Any) -> Any:
    if isinstance(value, Leaf):
        return value.value
    if isinstance(value, (tuple, list)):
        return type(value)(map(_value, value))
    if isinstance(value, slice):
        return slice(_value(value.start), _value(value.stop), _value(value.step))
    return value


def _widest(start: torch.dtype, others: Iterable[torch.dtype]) -> torch.dtype:
    return functools.reduce(torch.promote_types, others, torch.promote_types(start, torch.float32))
