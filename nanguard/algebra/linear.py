"""Terms whose exponential has a stable form of its own. No torch in here."""

from __future__ import annotations

from nanguard.algebra import build
from nanguard.algebra.term import Apply, Term

__all__ = ["exponential"]


def exponential(term: Term) -> Term | None:
    """The rule exp log_softmax(x) = softmax(x), exp logsigmoid(x) = sigmoid(x); `None` for all else."""
    if isinstance(term, Apply):
        if term.operator is build.LOG_SOFTMAX:
            return Apply(build.SOFTMAX, term.args, term.shape, **term.params)
        if term.operator is build.LOG_SIGMOID:
            return Apply(build.SIGMOID, term.args, term.shape)
    return None
