"""Terms whose exponential has a stable form of its own. No torch in here."""

from __future__ import annotations

from nanguard.algebra import operators as ops
from nanguard.algebra.build import is_op
from nanguard.algebra.pattern import core, is_over_probabilities, is_part, is_sum
from nanguard.algebra.term import Apply, Term

__all__ = ["exponential", "fails_in_gradient_only"]


def exponential(term: Term) -> Term | None:
    """The rule exp log_softmax(x) = softmax(x), exp logsigmoid(x) = sigmoid(x); quotients and roots by exp itself.

    `None` for all else: a product, a sum or a single exponential is as good as it was written. Probabilities that are
    normalised once more (over queries, by Sinkhorn) have nothing that overflows, and stay as they are.
    """
    if not isinstance(term, Apply):
        return None
    if term.operator is ops.LOG_SOFTMAX:
        softmax = Apply(ops.SOFTMAX, term.args, term.shape, **term.params)
        return None if _is_normalised(term.args[0]) else softmax
    if term.operator is ops.LOG_SIGMOID:
        return Apply(ops.SIGMOID, term.args, term.shape)
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
    return is_over_probabilities(term) and not is_part(term)


def _is_weighted_total(term: Term) -> bool:
    """Whether it is a sum from which weights may have left out all that has not vanished, such as `(p * one_hot).sum(1)`."""
    inner = core(term)
    return isinstance(inner, Apply) and is_sum(inner) and is_op(inner.args[0], ops.WEIGH)


def _is_fragile(term: Term) -> bool:
    inner = core(term, through_scale=False, through_negation=False)
    if not isinstance(inner, Apply):
        return False
    if inner.operator is ops.SUBTRACT:
        above, below = inner.args
        if _is_plain(below) or (_is_plain(above) and is_over_probabilities(below)):
            return False
        return not (is_sum(core(below)) and _is_normalised(above)) or _is_weighted_total(above)
    root = inner.operator is ops.SCALE and inner.params["other"] < 1 and not is_sum(core(inner))
    return root or inner.operator is ops.NEGATE
