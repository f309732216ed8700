"""Questions about the form of a term that rules share. No torch in here."""

from __future__ import annotations

from nanguard.algebra import build
from nanguard.algebra.term import Apply, Leaf, Operator, Term

__all__ = ["core", "is_selection", "operators"]

# What may stand around the computation that a rule names: constants, bounds, other shapes.
_WRAPPERS = frozenset(
    operator.name
    for operator in (
        build.SCALE,
        build.SHIFT,
        build.NEGATE,
        build.CLAMP_MIN,
        build.CLAMP_MAX,
        build.FLOOR_ZERO,
        build.RESHAPE,
        build.EXPAND,
    )
)

SELECTIONS = frozenset({"index", "gather", "take_along_dim", "index_select", "masked_select", "select"})
# Of several that are put together, the first stands for all.
MOVES = frozenset({"permute", "narrow", "diagonal", "cat", "stack"})


def core(term: Term) -> Term:
    """The computation inside constants, bounds, epsilons, selections and other shapes."""
    while isinstance(term, Apply) and (_is_wrapper(term) or term.operator.name in SELECTIONS | MOVES):
        term = term.args[0]
    return term


def core_is(term: Term, *names: Operator) -> bool:
    """Whether the core is one of these operators."""
    found = core(term)
    return isinstance(found, Apply) and found.operator in names


def is_selection(term: Term) -> bool:
    """Whether elements were picked anywhere between the core and the result."""
    while isinstance(term, Apply) and (_is_wrapper(term) or term.operator.name in SELECTIONS | MOVES):
        if term.operator.name in SELECTIONS:
            return True
        term = term.args[0]
    return False


def is_bare(term: Term) -> bool:
    """Whether the core is a leaf: log exp(x)."""
    return isinstance(core(term), Leaf)


def is_probability_or_total(term: Term) -> bool:
    """Whether an epsilon on it guards a probability or a sum of exponentials, and not a mixture or a ratio."""
    while isinstance(term, Apply):
        if term.operator.name not in SELECTIONS | MOVES | {"reshape", "expand"}:
            kinds = (build.LOG_SOFTMAX, build.LOG_SIGMOID, build.LOGSUMEXP, build.LOGMEANEXP, build.LOGADDEXP)
            return term.operator in kinds
        term = term.args[0]
    return False


def operators(term: Term) -> set[str]:
    """Names of all operators in a term."""
    if isinstance(term, Leaf):
        return set()
    return {term.operator.name}.union(*map(operators, term.args))


def is_softplus(term: Term) -> bool:
    """Whether it is log(1 + e^x)."""
    return isinstance(term, Apply) and term.operator is build.PLUS_CONSTANT and term.params["constant"] == 1.0


def _is_wrapper(term: Apply) -> bool:
    small = term.operator is build.PLUS_CONSTANT and term.params["constant"] != 1.0
    return small or term.operator.name in _WRAPPERS
