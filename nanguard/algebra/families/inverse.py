"""Tensors that are logarithms: their exponential is known to more digits than they tell."""

# A law is documented by the equation above it.
# ruff: noqa: D103

from __future__ import annotations

from nanguard.algebra import build, sums
from nanguard.algebra import operators as ops
from nanguard.algebra.call import Call
from nanguard.algebra.registry import law
from nanguard.algebra.term import Apply, Term, Unrecognised

LOG_SOFTMAX = """
    torch.log_softmax(input, dim, dtype=None)
    torch.special.log_softmax(input, dim, *, dtype=None)
    torch.Tensor.log_softmax(input, dim, dtype=None)
    torch.nn.functional.log_softmax(input, dim=None, _stacklevel=3, dtype=None)
    """


# exp log_softmax(x, d) = softmax(x, d); nothing is kept for it but the dim
@law(LOG_SOFTMAX, source=True)
def log_softmax(call: Call) -> Term:
    logits = call.leaf()
    return Apply(ops.NORMALISED, (), logits.shape, dim=call.dim(logits.shape))


# exp logsigmoid(x) = sigmoid(x)
@law("torch.nn.functional.logsigmoid(input)", source=True)
def logsigmoid(call: Call) -> Term:
    x = call.leaf()
    return Apply(ops.LOGARITHM, (build.logsigmoid(x),), x.shape)


# exp softplus(x) = 1 + exp(x)
@law("torch.nn.functional.softplus(input, beta=1, threshold=20)", source=True)
def softplus(call: Call) -> Term:
    x = call.leaf()
    if call["beta"] != 1 or call["threshold"] != 20:
        raise Unrecognised
    return Apply(ops.LOGARITHM, (sums.plus_constant(x, 1.0),), x.shape)
