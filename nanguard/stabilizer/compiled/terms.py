"""Terms with other values in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nanguard.algebra import Apply, Leaf, Term

__all__ = ["rebuilt"]


def rebuilt(value: Any, known: dict[int, Any], change: Callable[[Any], Any]) -> Any:
    """A term with other values in its leaves and parameters. What occurs several times in it stays one."""
    if isinstance(value, (Apply, Leaf)):
        if id(value) not in known:
            known[id(value)] = _rebuilt_term(value, known, change)
        return known[id(value)]
    if isinstance(value, tuple):
        return tuple(rebuilt(entry, known, change) for entry in value)
    if isinstance(value, list):
        return [rebuilt(entry, known, change) for entry in value]
    if isinstance(value, slice):
        return slice(*(rebuilt(part, known, change) for part in (value.start, value.stop, value.step)))
    return change(value)


def _rebuilt_term(term: Term, known: dict[int, Any], change: Callable[[Any], Any]) -> Term:
    shape = rebuilt(term.shape, known, change)
    if isinstance(term, Leaf):
        return Leaf(change(term.value), shape, term.version, term.tracked, term.counts)
    params = {name: rebuilt(param, known, change) for name, param in term.params.items()}
    return Apply(term.operator, tuple(rebuilt(arg, known, change) for arg in term.args), shape, **params)
