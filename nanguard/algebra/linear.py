"""Terms whose exponential has a stable form of its own. No torch in here."""

from __future__ import annotations

from nanguard.algebra import operators as ops
from nanguard.algebra.build import is_op
from nanguard.algebra.pattern import (
    QUOTIENTS,
    core,
    is_bounded,
    is_finite,
    is_over_probabilities,
    is_part,
    is_sigmoid_multiple,
    is_sum,
    is_total,
    operators,
    unshifted,
)
from nanguard.algebra.term import Apply, Term

__all__ = ["exponential", "fails_in_gradient_only"]

# The reciprocal of anything larger, and its derivative, are finite.
_FLOOR = 1e-15


def exponential(term: Term) -> Term | None:
    """The rule exp log_softmax(x) = softmax(x), exp logsigmoid(x) = sigmoid(x); quotients and roots by exp itself.

    `None` for all else: a product, a sum or a single exponential is as good as it was written. Probabilities that are
    normalised once more (over queries, by Sinkhorn) have nothing that overflows, and stay as they are.
    """
    if not isinstance(term, Apply):
        return None
    if term.operator is ops.LOG_SOFTMAX:
        softmax = Apply(ops.SOFTMAX, term.args, term.shape, **term.params)
        return None if _is_normalised(term.args[0]) and not _may_vanish(term.args[0]) else softmax
    if term.operator is ops.LOG_SIGMOID:
        return Apply(ops.SIGMOID, term.args, term.shape)
    if is_op(unshifted(term), ops.LOG_SOFTMAX):  # c e^x / sum e^x
        return None if exponential(unshifted(term)) is None else Apply(ops.EXPONENTIAL, (term,), term.shape)
    if is_sigmoid_multiple(term):
        return Apply(ops.EXPONENTIAL, (term,), term.shape)
    return Apply(ops.EXPONENTIAL, (term,), term.shape) if _is_fragile(term) else None


def fails_in_gradient_only(term: Term) -> bool:
    """Whether it is 1 / exp(x), whose value is right where exp(x) is inf: such are the frequencies of a rotary embedding."""
    inner = core(term, through_scale=False, through_negation=False)
    return isinstance(inner, Apply) and inner.operator is ops.NEGATE and not is_sum(core(inner))


def _is_plain(term: Term) -> bool:
    """Whether nothing is known about it, so that nothing of it overflows."""
    return isinstance(term, Apply) and term.operator is ops.WEIGH and is_op(term.args[0], ops.FULL)


def _is_normalised(term: Term) -> bool:
    """Whether it is all of something that was normalised before; of a part of it, all may have vanished."""
    return is_over_probabilities(term) and not is_part(term) and is_bounded(term)


def _may_vanish(term: Term) -> bool:
    """Whether all of it may have vanished: sigmoids without a softmax sum to anything, and so do products."""
    names = operators(term)
    product = "add" in names and not names & QUOTIENTS
    return product or not names & {"log_softmax", "log_rest"}


def _has_floor(term: Term) -> bool:
    """Whether a constant was added, or bounds it from below, so that it never vanishes."""
    while isinstance(term, Apply) and term.operator.move:
        term = term.args[0]
    return is_op(term, ops.PLUS_CONSTANT, ops.CLAMP_MIN) and bool(term.params["constant"] >= _FLOOR)  # type: ignore[union-attr]


def _are_weighed_alike(above: Term, below: Term) -> bool:
    """Whether two distributions are weighed, such as by a one-hot action, which may leave out all that has not vanished."""
    one, other = core(above), core(below)
    if not (isinstance(one, Apply) and isinstance(other, Apply) and is_sum(one) and is_sum(other)):
        return False
    first, second = one.args[0], other.args[0]
    if not (is_op(first, ops.WEIGH) and is_op(second, ops.WEIGH)):
        return False
    (p, weight), (q, other_weight) = first.args, second.args  # type: ignore[union-attr]
    fixed = not any(leaf.tracked for leaf in (*weight.leaves, *other_weight.leaves))
    return bool(fixed and p != q and weight.shape == other_weight.shape)


def _is_fragile(term: Term) -> bool:
    inner = core(term, through_scale=False, through_negation=False)
    if not isinstance(inner, Apply):
        return False
    if inner.operator is ops.SUBTRACT:
        above, below = inner.args
        if _is_plain(below) or (_is_plain(above) and is_over_probabilities(below)):
            return False
        if _has_floor(below) and is_finite(above) and is_finite(below):
            return False
        return not (is_total(below) and _is_normalised(above)) or _are_weighed_alike(above, below)
    root = inner.operator is ops.SCALE and inner.params["other"] < 1 and not is_sum(core(inner))
    if inner.operator is ops.NEGATE:
        return not (is_total(inner.args[0]) and _is_normalised(inner.args[0]))
    return root
