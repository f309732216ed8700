"""Terms as source code: the line to write instead. No torch in here."""

from __future__ import annotations

from typing import Any

from nanguard.algebra.operators import NEGATE
from nanguard.algebra.registry import Names, Rule
from nanguard.algebra.term import Leaf, Term

__all__ = ["replacement", "write"]

# Longer ones, such as totals that were accumulated in a loop, are no line to write: the rule's own example is.
LONGEST = 240


def replacement(rule: Rule, term: Term, names: Names) -> str:
    """The expression to write instead of what `rule` found."""
    text = rule.suggest(term, names) or write(term, names)
    return text if len(text) <= LONGEST else _documented(rule)


def _documented(rule: Rule) -> str:
    code = rule.documentation.partition("## Use instead")[2].partition("```python\n")[2].partition("```")[0]
    return code.strip().rpartition("result = ")[2]


def write(term: Term, names: Names) -> str:
    """A term as a Python expression, with the names of the user's own code."""
    if isinstance(term, Leaf):
        return names.of(term, "logits")
    args = [write(arg, names) for arg in term.args]
    if term.operator is NEGATE and isinstance(term.args[0], Leaf) and args[0].startswith("-"):
        return args[0].removeprefix("-")  # the user wrote the sign, which is negated again
    if len(args) == 1:
        args = [_guarded(args[0], term)]
    if term.operator.infix and len(args) == 2 and _is_infix(term.args[1], args[1]):
        args[1] = f"({args[1]})"
    params = {name: _written(value, names) for name, value in term.params.items()}
    return term.operator.source.format(*args, all=", ".join(args), **params)


def _is_infix(term: Term, text: str) -> bool:
    return text.startswith("-") or " " in text if isinstance(term, Leaf) else term.operator.infix


def _guarded(text: str, term: Term) -> str:
    """Parentheses where a method, an index or a sign is put to an expression that is not one name or call."""
    assert not isinstance(term, Leaf)
    bare = term.operator.source.startswith("{0}") or term.operator.infix
    return f"({text})" if bare and _is_infix(term.args[0], text) else text


def _written(value: Any, names: Names) -> str:
    if isinstance(value, Leaf):
        return names.of(value, "index")
    if isinstance(value, tuple):
        entries = ", ".join(_written(entry, names) for entry in value)
        return entries if any(isinstance(entry, (Leaf, slice, type(None))) for entry in value) else repr(value)
    if isinstance(value, slice):
        return ":".join("" if part is None else _written(part, names) for part in _slice_parts(value))
    if value is Ellipsis:
        return "..."
    return repr(value)


def _slice_parts(value: slice) -> tuple[Any, ...]:
    parts = (value.start, value.stop)
    return parts if value.step is None else (*parts, value.step)
