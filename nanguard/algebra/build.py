"""Smart constructors of terms: each states an equation, and simplifies where the field has a name for the result.

Writing l for the logarithm of p, the constructors are, with the equation that each rests on:

1. `add`, `subtract`: log(p q) = l + m, log(p / q) = l - m; x - logsumexp(x, d) = log_softmax(x, d); 0 - x = -x.
2. `scale`: log p^k = k l. `shift`: log(c p) = l + log c.
3. `logsumexp`, `logmeanexp`: log sum p = logsumexp l; the mean has - log n.
4. `logaddexp`: log(p + q). `plus_constant`: log(p + c).
5. `clamp`: log is increasing, so log clamp(p, a, b) = clamp(l, log a, log b).
6. `reshape`, `rearrange`: log is elementwise, so it commutes with everything that only moves elements.
"""

from __future__ import annotations

import math
from typing import Any

from nanguard.algebra.term import Apply, Operator, Shape, Term, Unrecognised

__all__ = ["broadcast_shapes"]

_STABLE = "nanguard.stabilizer.functional"

ADD = Operator("add", "torch.add", "{0} + {1}", infix=True)
SUBTRACT = Operator("subtract", "torch.sub", "{0} - {1}", infix=True)
NEGATE = Operator("negate", "torch.neg", "-{0}", infix=True)
SCALE = Operator("scale", "torch.mul", "{other} * {0}", infix=True)
SHIFT = Operator("shift", "torch.add", "{0} + {other}", infix=True)
LOG_SOFTMAX = Operator("log_softmax", "torch.nn.functional.log_softmax", "F.log_softmax({0}, dim={dim})", fresh=False)
LOG_SIGMOID = Operator("logsigmoid", "torch.nn.functional.logsigmoid", "F.logsigmoid({0})")
SOFTMAX = Operator("softmax", "torch.nn.functional.softmax", "F.softmax({0}, dim={dim})", fresh=False)
SIGMOID = Operator("sigmoid", f"{_STABLE}.sigmoid", "torch.sigmoid({0})", fresh=False)
LOGSUMEXP = Operator("logsumexp", f"{_STABLE}.logsumexp", "torch.logsumexp({0}, dim={dim}, keepdim={keepdim})")
LOGMEANEXP = Operator(
    "logmeanexp",
    f"{_STABLE}.logmeanexp",
    "torch.logsumexp({0}, dim={dim}, keepdim={keepdim}) - math.log({count})",
    infix=True,
)
LOGADDEXP = Operator("logaddexp", f"{_STABLE}.logaddexp", "torch.logaddexp({0}, {1})")
PLUS_CONSTANT = Operator(
    "plus_constant", f"{_STABLE}.plus_constant", "torch.logaddexp({0}, torch.tensor({constant}).log())"
)
FLOOR_ZERO = Operator("floor_zero", f"{_STABLE}.floor_zero", "{0}")
CLAMP_MIN = Operator("clamp_min", f"{_STABLE}.clamp_min", "{0}.clamp(min=math.log({constant}))")
CLAMP_MAX = Operator("clamp_max", f"{_STABLE}.clamp_max", "{0}.clamp(max=math.log({constant}))")
EXPAND = Operator("expand", "torch.broadcast_to", "{0}.expand({size})", fresh=False)
RESHAPE = Operator("reshape", f"{_STABLE}.reshape", "{0}.reshape({sizes})", fresh=False)


def broadcast_shapes(*shapes: Shape) -> Shape:
    """The shape that these broadcast to. Raises `Unrecognised` where they do not."""
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    result = []
    for sizes in zip(*padded, strict=True):
        distinct = {size for size in sizes if size != 1}
        if len(distinct) > 1:
            raise Unrecognised
        result.append(distinct.pop() if distinct else 1)
    return tuple(result)


def add(a: Term, b: Term) -> Term:
    """Rests on log(p q) = l + m."""
    if isinstance(b, Apply) and b.operator is NEGATE:
        return subtract(a, b.args[0])
    if isinstance(a, Apply) and a.operator is NEGATE:
        return subtract(b, a.args[0])
    return Apply(ADD, (a, b), broadcast_shapes(a.shape, b.shape))


def subtract(a: Term, b: Term) -> Term:
    """Rests on log(p / q) = l - m, with x - logsumexp(x) = log_softmax(x) and x - log(1 + e^x) = logsigmoid(x)."""
    shape = broadcast_shapes(a.shape, b.shape)
    while isinstance(b, Apply) and b.operator is EXPAND and broadcast_shapes(a.shape, b.args[0].shape) == shape:
        b = b.args[0]
    if isinstance(b, Apply) and b.args[0] == a:
        if b.operator is PLUS_CONSTANT and b.params["constant"] == 1.0:
            return logsigmoid(a)
        if b.operator is LOGSUMEXP and len(b.params["dim"]) == 1 and _aligned(b):
            return log_softmax(a, b.params["dim"][0])
    return Apply(SUBTRACT, (a, b), shape)


def _aligned(total: Apply) -> bool:
    """Whether a total over one dim broadcasts back to where it came from: without keepdim, only for the first dim."""
    return bool(total.params["keepdim"]) or total.params["dim"] == (0,)


def negate(a: Term) -> Term:
    """Rests on log(1 / p) = -l, with -log(1 + e^x) = logsigmoid(-x)."""
    if isinstance(a, Apply) and a.operator is NEGATE:
        return a.args[0]
    if isinstance(a, Apply) and a.operator is PLUS_CONSTANT and a.params["constant"] == 1.0:
        return logsigmoid(negate(a.args[0]))
    return Apply(NEGATE, (a,), a.shape)


def scale(a: Term, factor: float) -> Term:
    """Rests on log p^k = k l."""
    if factor == 1.0:
        return a
    return negate(a) if factor == -1.0 else Apply(SCALE, (a,), a.shape, other=factor)


def shift(a: Term, constant: float) -> Term:
    """Rests on log(c p) = l + log c, given log c."""
    return a if constant == 0.0 else Apply(SHIFT, (a,), a.shape, other=constant)


def log_softmax(a: Term, dim: int) -> Term:
    """The logarithm of softmax(x, d). Probabilities that are normalised already stay as they are."""
    if isinstance(a, Apply) and a.operator is LOG_SOFTMAX and a.params["dim"] == dim:
        return a
    return Apply(LOG_SOFTMAX, (a,), a.shape, dim=dim)


def logsigmoid(a: Term) -> Term:
    """Rests on log sigmoid(x)."""
    return Apply(LOG_SIGMOID, (a,), a.shape)


def logsumexp(a: Term, dims: tuple[int, ...], keepdim: bool) -> Term:
    """Rests on log sum p = logsumexp l. An empty sum is nobody's logarithm."""
    if not dims:
        return a
    return Apply(LOGSUMEXP, (a,), _reduced(a.shape, dims, keepdim), dim=dims, keepdim=keepdim)


def logmeanexp(a: Term, dims: tuple[int, ...], keepdim: bool) -> Term:
    """Rests on log mean p = logsumexp l - log n."""
    if not dims:
        return a
    shape = _reduced(a.shape, dims, keepdim)
    count = math.prod(a.shape[dim] for dim in dims)
    return Apply(LOGMEANEXP, (a,), shape, dim=dims, keepdim=keepdim, count=count)


def _reduced(shape: Shape, dims: tuple[int, ...], keepdim: bool) -> Shape:
    if any(shape[dim] == 0 for dim in dims):
        raise Unrecognised
    return tuple(1 if dim in dims else size for dim, size in enumerate(shape) if keepdim or dim not in dims)


def logaddexp(a: Term, b: Term) -> Term:
    """The logarithm of p + q."""
    return Apply(LOGADDEXP, (a, b), broadcast_shapes(a.shape, b.shape))


def plus_constant(a: Term, constant: float) -> Term:
    """The logarithm of p + c, for c > 0."""
    return Apply(PLUS_CONSTANT, (a,), a.shape, constant=constant)


def clamp(a: Term, minimum: float | None, maximum: float | None) -> Term:
    """Bounds above zero for p are bounds for l: log is increasing."""
    if minimum is not None:
        a = Apply(CLAMP_MIN, (a,), a.shape, constant=minimum)
    if maximum is not None:
        a = Apply(CLAMP_MAX, (a,), a.shape, constant=maximum)
    return a


def expand(a: Term, shape: Shape) -> Term:
    """Elements repeated along new or single dims."""
    return a if shape == a.shape else Apply(EXPAND, (a,), shape, size=shape)


def reshape(a: Term, shape: Shape) -> Term:
    """Another shape for the same elements in the same order; a reduction may so get its reduced dims back."""
    if shape == a.shape:
        return a
    if isinstance(a, Apply):
        if a.operator is RESHAPE:
            return reshape(a.args[0], shape)
        if a.operator in (LOGSUMEXP, LOGMEANEXP):
            for keepdim in (True, False):
                if shape == _reduced(a.args[0].shape, a.params["dim"], keepdim):
                    return Apply(a.operator, a.args, shape, **{**a.params, "keepdim": keepdim})
    return Apply(RESHAPE, (a,), shape, sizes=shape)


def rearrange(operator: Operator, args: tuple[Term, ...], shape: Shape, **params: Any) -> Term:
    """Elements picked or moved by `operator`: log commutes with it."""
    return Apply(operator, args, shape, **params)
