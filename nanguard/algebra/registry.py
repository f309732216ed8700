"""Where laws, queries and rules are declared and found. No torch in here.

A *law* says what is known about the logarithm of a result; a *query* is an operation that asks for a logarithm; a *misuse* is a
call that expects something else than what is known of its argument; a *rule* names and documents a pattern that is replaced, or
told. All of them are declared in a file of their family, one short function each.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, final

from nanguard.algebra.call import Call
from nanguard.algebra.spelling import Spelling, spellings
from nanguard.algebra.term import Leaf, Term

__all__ = ["Law", "Names", "Rule", "laws", "lookup", "match", "misuses", "rules"]

Kind = Literal["logarithm", "quotient", "advice", "branch"]
Branch = Literal["", "singular", "follows", "selects"]


class Names(Protocol):
    """What the text of a replacement needs to know about the user's code."""

    def of(self, leaf: Leaf, default: str) -> str:
        """The name by which the user's code knows a tensor."""

    def counts_up(self, index: object, length: int) -> bool:
        """Whether an index is 0, 1, ..., length - 1."""


def _always(args: tuple[Any, ...]) -> bool:
    return True


@final
@dataclass(frozen=True)
class Law:
    """What an operation means for logarithms.

    Attributes:
        name: canonical name of the operation.
        spellings: where it is found.
        derive: the term of the result's logarithm (for a query: of the result itself).
        role: ``source`` creates knowledge from any tensor, ``step`` carries it on, ``query`` asks for it, ``misuse`` is only
            looked at.
        quotient: whether the result itself may overflow although it is known, and is then replaced too.
        begins: for a source, whether a call with these arguments is one.
        advice: for a misuse, and for what can be one, the code of its rule.
        branch: ``singular`` where a derivative may be infinite although the element is not selected later, ``follows`` where
            one is carried on, ``selects`` where it comes to light.
    """

    name: str
    spellings: tuple[Spelling, ...]
    derive: Callable[[Call], Term]
    role: Literal["source", "step", "query", "misuse"]
    quotient: bool = False
    begins: Callable[[tuple[Any, ...]], bool] = _always
    advice: str = ""
    branch: Branch = ""


@final
@dataclass(frozen=True)
class Rule:
    """A pattern that is replaced by its stable form, or told.

    Attributes:
        code: such as ``NG101``. NG1xx are logarithms, NG2xx quotients, NG3xx advice, NG4xx branches.
        name: the field's term for it.
        documentation: under the headings What it does, Why is this bad, Example, Use instead, Fix safety, References.
        kind: what is replaced; ``advice`` is told, and replaced only where the user asks for it.
        matches: whether a term is an instance of it.
        suggest: the expression to write instead, where that is more than the term written out.
        advice: what is told, in a sentence or two, with fields in braces.
    """

    code: str
    name: str
    documentation: str
    kind: Kind
    matches: Callable[[Term], bool]
    suggest: Callable[[Term, Names], str | None]
    advice: str = ""


_LAWS: dict[str, Law] = {}
_MISUSES: dict[str, Law] = {}
_RULES: dict[str, Rule] = {}


def law(
    spelled: str,
    *,
    source: bool | Callable[[tuple[Any, ...]], bool] = False,
    query: bool = False,
    quotient: bool = False,
    branch: Branch = "",
) -> Callable[[Callable[[Call], Term]], Law]:
    """Declare a law (or a query) under the name of the function, with one spelling per line of `spelled`."""

    def declare(derive: Callable[[Call], Term]) -> Law:
        name = derive.__name__.strip("_")
        if name in _LAWS:
            raise ValueError(f"law {name!r} is declared twice")
        role: Literal["source", "step", "query", "misuse"] = "query" if query else "source" if source else "step"
        begins = source if callable(source) else _always
        _LAWS[name] = Law(name, spellings(spelled), derive, role, quotient, begins, branch=branch)
        return _LAWS[name]

    return declare


def misuse(code: str, spelled: str) -> Callable[[Callable[[Call], Term]], Law]:
    """Declare what calls the rule with that code looks at: the function gives the term in question."""

    def declare(derive: Callable[[Call], Term]) -> Law:
        name = derive.__name__
        if name in _MISUSES:
            raise ValueError(f"misuse {name!r} is declared twice")
        _MISUSES[name] = Law(name, spellings(spelled), derive, "misuse", advice=code)
        return _MISUSES[name]

    return declare


def rule(
    code: str,
    name: str,
    kind: Kind = "logarithm",
    suggest: Callable[[Term, Names], str | None] = lambda term, names: None,
    advice: str = "",
) -> Callable[[Callable[[Term], bool]], Rule]:
    """Declare a rule; the function says whether a term is an instance, its docstring is the documentation."""

    def declare(matches: Callable[[Term], bool]) -> Rule:
        if code in _RULES or any(known.name == name for known in _RULES.values()):
            raise ValueError(f"rule {code} ({name}) is declared twice")
        text = matches.__doc__ or ""
        _RULES[code] = Rule(code, name, _dedent(text), kind, matches, suggest, advice)
        return _RULES[code]

    return declare


def laws() -> tuple[Law, ...]:
    """All laws and queries of all families."""
    _load()
    return tuple(_LAWS.values())


def misuses() -> tuple[Law, ...]:
    """All calls that are only looked at."""
    _load()
    return tuple(_MISUSES.values())


def rules() -> tuple[Rule, ...]:
    """All rules, in order of their codes."""
    _load()
    return tuple(sorted(_RULES.values(), key=lambda known: known.code))


def lookup(code: str) -> Rule:
    """The rule with that code, in either case. Raises `KeyError` whose message lists the codes there are."""
    _load()
    found = _RULES.get(code.upper())
    if found is None:
        raise KeyError(f"no rule {code!r}; there are {', '.join(sorted(_RULES))}")
    return found


def match(term: Term, kind: Kind) -> Rule | None:
    """The rule that a term is an instance of. At most one is (a test holds the rules to that)."""
    return next((known for known in _of_kind(kind) if known.matches(term)), None)


@functools.cache
def _of_kind(kind: Kind) -> tuple[Rule, ...]:
    return tuple(known for known in rules() if known.kind == kind)


@functools.cache
def _load() -> None:
    families = importlib.import_module("nanguard.algebra.families")
    for module in pkgutil.iter_modules(families.__path__):
        importlib.import_module(f"{families.__name__}.{module.name}")


def _dedent(text: str) -> str:
    first, _, rest = text.partition("\n")
    lines = [line[4:] if line.startswith("    ") else line for line in rest.splitlines()]
    return "\n".join([first.strip(), *lines]).strip() + "\n"
