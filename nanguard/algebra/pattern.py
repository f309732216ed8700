"""Questions about the form of a term that rules share. No torch in here."""

from __future__ import annotations

import math

from nanguard.algebra import operators as ops
from nanguard.algebra.term import Apply, Leaf, Operator, Shape, Term

__all__ = [
    "constant_of",
    "core",
    "core_is",
    "has_floor",
    "is_bare",
    "is_bounded",
    "is_constant",
    "is_disguised",
    "is_finite",
    "is_over_probabilities",
    "is_part",
    "is_probability_or_total",
    "is_renormalised",
    "is_selection",
    "is_sigmoid_multiple",
    "is_softmax_of_logits",
    "is_softplus",
    "is_sum",
    "is_total",
    "operators",
    "renormalises",
    "unshifted",
    "vanishes",
]

# Epsilons are at most that large.
LARGEST_EPSILON = 1e-3

# What may stand around the computation that a rule names: constants, bounds, masks.
_WRAPPERS = frozenset(
    {ops.SHIFT, ops.CLAMP_MIN, ops.CLAMP_MAX, ops.FLOOR_ZERO, ops.MINUS, ops.XLOGY, ops.ENTR, ops.PADDED}
    | {ops.COMPLEMENT, ops.DISTANCE, ops.CLOSENESS, ops.NAN_TO_ZERO}
    | {ops.AMAX, ops.AMIN, ops.EXTREME, ops.SORTED, ops.TOPK, ops.MAXIMUM, ops.MINIMUM, ops.SCATTER_EXTREME}
)
# The operators of quotients, by name.
QUOTIENTS = frozenset({"subtract", "negate"})
# Probabilities by name, elementwise or nearly so.
_NAMED = (ops.LOG_SIGMOID, ops.LOG_REST, ops.LOG_NDTR)
_PICKS = frozenset(
    {ops.INDEX, ops.GATHER, ops.TAKE_ALONG_DIM, ops.INDEX_SELECT, ops.MASKED_SELECT, ops.SELECT, ops.TAKE}
)
_SUMS = frozenset({ops.LOGSUMEXP, ops.LOGMEANEXP, ops.LOGADDEXP, ops.LOGCUMSUMEXP, ops.SCATTER_ADD, ops.LOGADDEXP_AT})
_MASKS = frozenset(
    {ops.WEIGH, ops.WEIGH_REST, ops.FACTOR, ops.MASKED, ops.WHERE, ops.SET_ITEM, ops.FILLED_DIAGONAL, ops.TRIANGLE}
)


def core(term: Term, *, through_scale: bool = True, through_negation: bool = True) -> Term:
    """The computation inside constants, bounds, epsilons, selections and other shapes.

    Of several that are put together, the first stands for all.
    """
    through = {ops.SCALE: through_scale, ops.NEGATE: through_negation}
    while isinstance(term, Apply) and (_is_wrapper(term) or through.get(term.operator, False)):
        term = _inside(term)
    return term


def _inside(term: Apply) -> Term:
    """What a wrapper is about: the first that is no constant, as those are that survival curves start from."""
    return next((arg for arg in term.args if not is_constant(arg)), term.args[0])


def constant_of(term: Term) -> float | None:
    """The number that every element is, whatever the shape."""
    while isinstance(term, Apply) and term.operator.move and len(term.args) == 1:
        term = term.args[0]
    return term.params["constant"] if isinstance(term, Apply) and term.operator is ops.FULL else None


def is_constant(term: Term) -> bool:
    """Whether every element is the same number."""
    return constant_of(term) is not None


def vanishes(term: Term) -> bool:
    """Whether it was multiplied by 0, so that there is nothing left to be exact about."""
    if not isinstance(term, Apply):
        return False
    if term.operator is ops.SHIFT and math.isinf(term.params["other"]):
        return True
    some = any if term.operator in (ops.ADD, ops.SUBTRACT) else all
    return bool(term.args) and some(map(vanishes, term.args))


def core_is(term: Term, *names: Operator, through_scale: bool = True, through_negation: bool = True) -> bool:
    """Whether the core is one of these operators."""
    found = core(term, through_scale=through_scale, through_negation=through_negation)
    return isinstance(found, Apply) and found.operator in names


def has_floor(term: Term, least: float) -> bool:
    """Whether that much, or more, was added to the core, or bounds it from below."""
    while isinstance(term, Apply) and (_is_wrapper(term) or term.operator in (ops.SCALE, ops.NEGATE)):
        if term.operator in (ops.PLUS_CONSTANT, ops.CLAMP_MIN) and term.params["constant"] >= least:
            return True
        term = _inside(term)
    return False


def is_selection(term: Term) -> bool:
    """Whether elements were picked anywhere between the core and the result."""
    while isinstance(term, Apply) and (_is_wrapper(term) or term.operator in (ops.SCALE, ops.NEGATE)):
        if term.operator in _PICKS:
            return True
        term = _inside(term)
    return False


def is_part(term: Term) -> bool:
    """Whether elements were left out."""
    while isinstance(term, Apply) and (_is_wrapper(term) or term.operator in (ops.SCALE, ops.NEGATE)):
        if term.operator in _PICKS or term.operator in (ops.NARROW, ops.DIAGONAL, ops.UNFOLD):
            return True
        term = _inside(term)
    return False


def is_bare(term: Term) -> bool:
    """Whether the core is a leaf: log exp(x); a mask may lie on it."""
    found = core(term)
    while isinstance(found, Apply) and found.operator in _MASKS:
        found = core(found.args[0])
    return isinstance(found, Leaf)


def is_disguised(term: Term) -> bool:
    """Whether it is a softmax or a sigmoid that was masked or weighted element by element, or cut to its largest."""
    if is_over_probabilities(term) and "topk" in operators(term):
        return True
    found = term
    while isinstance(found, Apply) and not _fills_with_one(found) and core(found) is not found:
        found = _inside(found)
    if not isinstance(found, Apply) or found.operator not in _MASKS:
        return False
    return core_is(found.args[0], ops.LOG_SOFTMAX, *_NAMED) or is_disguised(found.args[0])


def is_renormalised(masked: Term, total: Term) -> bool:
    """Whether masked or weighted probabilities are divided by their own total: a softmax of what is left."""
    inner = core(total)
    own = isinstance(inner, Apply) and is_sum(inner) and inner.args[0] == masked
    return own and "topk" not in operators(masked)


def is_softmax_of_logits(term: Term) -> bool:
    """Whether it is the softmax of a tensor itself, not of what was normalised before."""
    return isinstance(term, Apply) and term.operator is ops.LOG_SOFTMAX and isinstance(term.args[0], Leaf)


def unshifted(term: Term) -> Term:
    """The same without a constant factor."""
    return term.args[0] if isinstance(term, Apply) and term.operator is ops.SHIFT else term


def is_sigmoid_multiple(term: Term) -> bool:
    """Whether it is c / (1 + e^-x)."""
    inner = unshifted(term)
    return isinstance(inner, Apply) and inner.operator is ops.LOG_SIGMOID


def is_sum(term: Term) -> bool:
    """Whether it is a sum, a mean or a cumulated sum itself."""
    return isinstance(term, Apply) and term.operator in _SUMS


def is_total(term: Term) -> bool:
    """Whether it is a sum, or made of sums and constants: a denominator that the numerator is a part of, as in a Dice loss."""
    found = core(term)
    while isinstance(found, Apply) and found.operator is ops.PLUS_CONSTANT:
        found = core(found.args[0])
    return is_sum(found) or (
        isinstance(found, Apply) and found.operator is ops.DIFFERENCE and all(map(is_total, found.args))
    )


def is_probability_or_total(term: Term) -> bool:
    """Whether an epsilon on it guards a probability or a sum of exponentials, and not a mixture or a ratio."""
    while isinstance(term, Apply) and (
        term.operator.move or term.operator in (ops.COMPLEMENT, ops.NAN_TO_ZERO) or _is_guard(term)
    ):
        term = term.args[0]
    if not isinstance(term, Apply):
        return False
    if term.operator is ops.ADD:  # 1 - tanh^2 is a product of two sigmoids
        return all(core_is(arg, ops.LOG_SIGMOID) for arg in term.args)
    return is_sum(term) or term.operator in (
        ops.LOG_SOFTMAX,
        ops.LOG_OTHERS,
        ops.CLOSENESS,
        ops.DISTANCE,
        *_NAMED,
    )


def _is_guard(term: Apply) -> bool:
    if term.operator in (ops.PLUS_CONSTANT, ops.CLAMP_MIN):
        return bool(term.params["constant"] <= LARGEST_EPSILON)
    return term.operator is ops.CLAMP_MAX and bool(1 - LARGEST_EPSILON <= term.params["constant"] <= 1)


def renormalises(log: Term, divisor: Shape) -> bool:
    """Whether probabilities are divided by something that is the same for all classes: they are none any more.

    Those that are compared to other ones, class by class, remain what they are, and totals become means. A single number
    divides all alike.
    """
    total = log
    while isinstance(total, Apply) and total.operator.move:
        total = total.args[0]
    if not is_over_probabilities(log) or is_sum(total):
        return False
    if divisor == () or (is_selection(log) and divisor == log.shape):
        return False
    if len(divisor) > len(log.shape) or any(
        one not in (1, size) for one, size in zip(divisor[::-1], log.shape[::-1], strict=False)
    ):
        return True
    inner = core(log)
    if not isinstance(inner, Apply) or inner.operator is not ops.LOG_SOFTMAX:
        return len(log.shape) > 1 or bool(divisor != log.shape)
    if inner.shape != log.shape:
        return bool(divisor != log.shape)
    behind = len(log.shape) - inner.params["dim"]
    return len(divisor) < behind or bool(divisor[-behind] == 1)


def is_over_probabilities(term: Term) -> bool:
    """Whether softmaxes or sigmoids went into it."""
    return bool(operators(term) & {"log_softmax", "logsigmoid", "log_rest", "log_ndtr"})


def is_bounded(term: Term) -> bool:
    """Whether it is made of probabilities alone, by sums, products, weights and shares."""
    if isinstance(term, Leaf) or (term.operator is ops.NEGATE and not is_total(term.args[0])):
        return False
    if term.operator in (ops.LOG_SOFTMAX, ops.FULL, ops.CLOSENESS, ops.DISTANCE, *_NAMED):
        return True
    return all(map(is_bounded, term.args[:1] if term.operator in (ops.WEIGH, ops.WEIGH_REST) else term.args))


def is_finite(term: Term) -> bool:
    """Whether it is made of probabilities without a quotient, so that nothing of it overflows."""
    return is_bounded(term) and not operators(term) & QUOTIENTS


def operators(term: Term) -> set[str]:
    """Names of all operators in a term."""
    if isinstance(term, Leaf):
        return set()
    return {term.operator.name}.union(*map(operators, term.args))


def is_softplus(term: Term) -> bool:
    """Whether it is log(1 + e^x); of a probability the logarithm is stable as it is."""
    if not isinstance(term, Apply) or term.operator is not ops.PLUS_CONSTANT or term.params["constant"] != 1.0:
        return False
    inner = core(term.args[0], through_negation=False)
    if isinstance(inner, Apply) and inner.operator is ops.NEGATE and is_over_probabilities(inner):
        return True  # the reciprocal of a probability overflows
    inner = core(inner)
    while isinstance(inner, Apply) and inner.operator in _MASKS:
        inner = core(inner.args[0])
    if isinstance(inner, Apply) and inner.operator is ops.SUBTRACT:
        return not is_sum(core(inner.args[1]))  # a share of a total is a probability, a ratio of two of them is none
    return not is_over_probabilities(inner)


def _is_wrapper(term: Apply) -> bool:
    if term.operator is ops.PLUS_CONSTANT:
        return bool(term.params["constant"] != 1.0)
    if term.operator is ops.WHERE and not any(map(is_constant, term.args)):  # one of two known ones, not a mask
        return True
    if term.operator is ops.WEIGH and term.args[1].shape == ():  # one number for all is no mask
        return not is_constant(term.args[0])
    return term.operator.move or term.operator in _WRAPPERS or _fills_with_one(term)


def _fills_with_one(term: Apply) -> bool:
    """Whether it puts a 1 in the place of what is masked, whose logarithm is 0: it does not count."""
    if term.operator is ops.WHERE:
        return [constant_of(arg) for arg in term.args if is_constant(arg)] == [1.0]
    return term.operator in _MASKS and term.params.get("value") == 0.0
