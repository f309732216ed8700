"""The normal distribution function and the error functions that it is written with."""

# A law is documented by the equation above it, a rule by markdown.
# ruff: noqa: D103, D415

from __future__ import annotations

import math

from nanguard.algebra import build
from nanguard.algebra import operators as ops
from nanguard.algebra.call import Call
from nanguard.algebra.pattern import core_is, has_floor
from nanguard.algebra.registry import law, rule
from nanguard.algebra.term import Apply, Term

# A bound that large hides what a distribution function loses.
LARGE_FLOOR = 1e-3


# log ndtr(x) = log_ndtr(x)
@law("torch.special.ndtr(input)", source=True)
def ndtr(call: Call) -> Term:
    return build.log_ndtr(call.leaf())


# known for 1 + erf(x) = 2 ndtr(sqrt(2) x) and 1 - erf(x) = 2 ndtr(-sqrt(2) x)
@law(
    """
    torch.erf(input)
    torch.erf_(input)
    torch.special.erf(input)
    torch.Tensor.erf(input)
    torch.Tensor.erf_(input)
    """,
    source=True,
)
def erf(call: Call) -> Term:
    x = call.leaf()
    return Apply(ops.ERF, (x,), x.shape)


# log erfc(x) = log(2) + log_ndtr(-sqrt(2) x)
@law(
    """
    torch.erfc(input)
    torch.erfc_(input)
    torch.special.erfc(input)
    torch.Tensor.erfc(input)
    torch.Tensor.erfc_(input)
    """,
    source=True,
)
def erfc(call: Call) -> Term:
    return build.shift(build.log_ndtr(build.scale(call.leaf(), -math.sqrt(2))), math.log(2))


@rule("NG113", "log-normal-cdf")
def log_of_normal_distribution_function(term: Term) -> bool:
    """## What it does

    Finds the logarithm of a normal distribution function, also where it is written with `erf` or `erfc`, and of
    `Normal(0, 1).cdf`.

    ## Why is this bad

    In float32, 1 + erf(x) is 0 below -4, and the function itself below -14: the logarithm is -inf, and its gradient NaN. Digits
    are lost long before.

    ## Example

    ```python
    result = torch.log(0.5 * (1 + torch.erf(logits / math.sqrt(2))))
    ```

    ## Use instead

    ```python
    result = torch.special.log_ndtr(logits)
    ```

    ## Fix safety

    Equal to rounding wherever the original is accurate.

    ## References

    - https://docs.pytorch.org/docs/stable/special.html#torch.special.log_ndtr
    """
    return core_is(term, ops.LOG_NDTR) and not has_floor(term, LARGE_FLOOR)
