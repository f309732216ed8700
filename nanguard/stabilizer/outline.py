"""Terms with numbers in the place of their tensors: what was decided about one call holds for all that look the same."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nanguard.algebra import Apply, Leaf, Term

__all__ = ["counts_up", "filled", "filled_value", "looks", "may_count_up", "outlined", "outlined_together"]

# Longer ones are not looked into.
LONGEST_INDEX = 1 << 14
# No tensor has that version.
_NEVER = -1


class _Thread(threading.local):
    looks = 0


_THREAD = _Thread()


def looks() -> int:
    """How often numbers were looked at: what was decided by them does not hold for all calls that look the same."""
    return _THREAD.looks


def outlined(term: Term) -> tuple[Term, list[Tensor], list[int]]:
    """The outline of a term, the tensors that its numbers stand for, and the versions that they had."""
    (outline,), values, versions = _outlined([term])
    return outline, values, versions


def outlined_together(terms: Sequence[Term]) -> tuple[list[Term], list[Tensor]]:
    """The outlines of several terms, and the tensors that their numbers stand for. What they share stays one and the same."""
    return _outlined(terms)[:2]


def _outlined(terms: Sequence[Term]) -> tuple[list[Term], list[Tensor], list[int]]:
    values: list[Tensor] = []
    versions: list[int] = []
    numbers: dict[int, int] = {}
    blanks: dict[tuple[int, bool], Leaf] = {}

    def number(leaf: Leaf) -> Leaf:
        place = numbers.setdefault(id(leaf.value), len(values))
        if place == len(values):
            values.append(leaf.value)
            versions.append(leaf.version)
        elif versions[place] != leaf.version:
            versions[place] = _NEVER  # it was edited in between
        blank = blanks.get((place, leaf.tracked))
        if blank is None:
            blank = blanks[place, leaf.tracked] = Leaf(place, leaf.shape, 0, leaf.tracked)
        return blank

    done: dict[int, Term] = {}
    return [_replaced(term, number, done) for term in terms], values, versions


def filled(outline: Term, values: Sequence[Tensor], versions: Sequence[int]) -> Term:
    """A term again, with these tensors as they were in these versions."""

    def fill(blank: Leaf) -> Leaf:
        value = values[blank.value]
        if may_count_up(value):
            return Leaf(value, blank.shape, versions[blank.value], blank.tracked, partial(counts_up, value))
        return Leaf(value, blank.shape, versions[blank.value], blank.tracked)

    return _replaced(outline, fill, {})


def filled_value(value: Any, tensors: Sequence[Tensor] | None) -> Any:
    """A parameter of an operator with tensors in the place of leaves; of an outline's, those with their numbers."""
    kind = type(value)
    if kind is Leaf:
        return value.value if tensors is None else tensors[value.value]
    if kind is tuple or kind is list:
        return kind([filled_value(entry, tensors) for entry in value])
    if kind is slice:
        return slice(*(filled_value(entry, tensors) for entry in (value.start, value.stop, value.step)))
    return value


def may_count_up(tensor: Tensor) -> bool:
    """Whether a tensor is an index whose elements can be looked at without waiting for them."""
    return tensor.dtype == torch.int64 and tensor.ndim == 1 and tensor.device.type == "cpu"


def counts_up(index: Tensor) -> bool:
    """Whether an index holds 0, 1, 2, ..."""
    _THREAD.looks += 1
    return index.numel() <= LONGEST_INDEX and torch.equal(index, torch.arange(index.numel()))


def _replaced(term: Term, change: Callable[[Leaf], Leaf], done: dict[int, Term]) -> Term:
    """The same term with other leaves, also among its parameters. What it contains twice stays one and the same."""
    found = done.get(id(term))
    if found is not None:
        return found
    if isinstance(term, Leaf):
        result: Term = change(term)
    else:
        args = tuple([_replaced(arg, change, done) for arg in term.args])
        result = Apply(term.operator, args, term.shape, **_parameters(term.params, change))
    done[id(term)] = result
    return result


def _parameters(params: dict[str, Any], change: Callable[[Leaf], Leaf]) -> dict[str, Any]:
    return {name: _parameter(value, change) for name, value in params.items()}


def _parameter(value: Any, change: Callable[[Leaf], Leaf]) -> Any:
    kind = type(value)
    if kind is Leaf:
        return change(value)
    if kind is tuple or kind is list:
        return kind([_parameter(entry, change) for entry in value])
    if kind is slice:
        return slice(*(_parameter(entry, change) for entry in (value.start, value.stop, value.step)))
    return value
