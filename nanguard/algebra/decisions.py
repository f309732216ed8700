"""What takes the place of a logarithm or a quotient, decided from terms alone, for all front ends. No torch in here."""

from __future__ import annotations

from collections.abc import Iterable

from nanguard.algebra.families.epsilon import drop_epsilons
from nanguard.algebra.linear import exponential, fails_in_gradient_only
from nanguard.algebra.operators import (
    FLOOR_ZERO,
    LOG_SIGMOID,
    LOG_SOFTMAX,
    LOGMEANEXP,
    LOGSUMEXP,
    UNFINISHED,
    WRITTEN,
)
from nanguard.algebra.pattern import is_softmax_of_logits, unshifted, vanishes
from nanguard.algebra.registry import Rule, lookup, match
from nanguard.algebra.term import Apply, Term, Unrecognised, untracked

__all__ = ["for_logarithm", "for_quotient", "is_begun_anew", "is_long", "is_remembered", "stem"]

# Larger terms are long: what was computed of them is remembered in their place.
_LONG = 24
# What comes from a quotient that may have been replaced already is likely to be a step of a recursion.
_AGAIN = 8
# Single expressions are smaller, whatever they say.
_LONGEST = 64
_TOTALS = (LOGSUMEXP, LOGMEANEXP)


def for_logarithm(
    term: Term, *, drop: bool, floored: Term | None = None, floor: float | None = None
) -> tuple[Rule, Term] | None:
    """The rule that a logarithm is replaced by, and what takes its place; `None` where it stays.

    Arguments:
        term: the logarithm.
        drop: whether small epsilons are dropped.
        floored: what stands under the bounds of `torch.distributions`, where they ask.
        floor: the probability that what stands there is given where it is 0, if the bounds are to be dropped.
    """
    try:
        if floored is not None and floor is not None:
            return lookup("NG303"), Apply(FLOOR_ZERO, (floored,), term.shape, constant=floor)
        term = drop_epsilons(term) if drop and floored is None else term
        rule = None if vanishes(term) else match(term, "logarithm")
    except Unrecognised:
        return None
    return None if rule is None else (rule, term)


def for_quotient(
    term: Term, operands: Iterable[Term], *, in_place: bool, differentiable: bool
) -> tuple[Rule, Term] | None:
    """The rule that a result is replaced by, and what takes its place; `None` where it stays.

    Arguments:
        term: the logarithm of the result.
        operands: the logarithms that it was made of.
        in_place: whether it is written into one of its operands.
        differentiable: whether derivatives flow through it, or may do so.
    """
    # In place, only the softmax itself: iterations such as Sinkhorn's normalise what is normalised.
    if in_place and not is_softmax_of_logits(term):
        return None
    try:
        stable = exponential(term)
        if stable is None or any(_is_multiple(term, operand) for operand in operands):
            return None
        rule = None if vanishes(term) else match(term, "quotient")
        if rule is None or (not differentiable and fails_in_gradient_only(term)):
            return None
    except Unrecognised:
        return None
    return rule, stable


def _is_multiple(term: Term, operand: Term) -> bool:
    """Whether it is a constant times the operand, also where that is cut off."""
    one, other = unshifted(term), unshifted(operand)
    return one == other or untracked(one) == untracked(other)


def is_long(term: Term) -> bool:
    """Whether a term is so large that it is not computed time and again."""
    return term.size > _LONG


def is_begun_anew(term: Term, *, again: bool) -> bool:
    """Whether what was computed of a quotient is remembered in the place of where it came from.

    Arguments:
        term: its logarithm.
        again: whether it comes from a quotient itself.
    """
    return term.size > _LONG or (again and term.size > _AGAIN)


def is_remembered(term: Term) -> bool:
    """Whether a term is so large that it is computed once, and remembered in the place of where it came from.

    That is so of what is no quotient, too: products of many probabilities, forward probabilities. Totals are recognised by what
    they are totals of, and buffers by what was assigned to them.
    """
    while isinstance(term, Apply) and term.args and (term.operator.move or term.operator in _TOTALS):
        if len(term.args) > 1 or term.size <= _LONGEST:
            break
        term = term.args[0]
    if not isinstance(term, Apply) or term.size <= _LONGEST or term.operator is WRITTEN:
        return False
    return bool(term.leaves) and not _is_unfinished(term)


def _is_unfinished(term: Term) -> bool:
    return isinstance(term, Apply) and (term.operator in UNFINISHED or any(map(_is_unfinished, term.args)))


def stem(term: Term) -> Term:
    """What is computed of a quotient, at least: of softmaxes and sigmoids, their argument."""
    return term.args[0] if isinstance(term, Apply) and term.operator in (LOG_SOFTMAX, LOG_SIGMOID) else term
