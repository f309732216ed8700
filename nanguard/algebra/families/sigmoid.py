"""The logistic function, built in or by hand, and its logarithm."""

# A law is documented by the equation above it, a rule by markdown.
# ruff: noqa: D103, D415

from __future__ import annotations

from nanguard.algebra import build
from nanguard.algebra import operators as ops
from nanguard.algebra.call import Call
from nanguard.algebra.pattern import core, core_is, is_sigmoid_multiple, is_softplus
from nanguard.algebra.registry import law, rule
from nanguard.algebra.term import Term


# log sigmoid(x) = logsigmoid(x) = -log(1 + e^-x)
@law(
    """
    torch.sigmoid(input)
    torch.special.expit(input)
    torch.Tensor.sigmoid(input)
    torch.Tensor.sigmoid_(input)
    torch.sigmoid_(input)
    torch.nn.functional.sigmoid(input)
    """,
    source=True,
)
def sigmoid(call: Call) -> Term:
    return build.logsigmoid(call.leaf())


@rule("NG104", "log-sigmoid")
def log_of_sigmoid(term: Term) -> bool:
    """## What it does

    Finds the logarithm of a sigmoid.

    ## Why is this bad

    Below -104 the sigmoid is 0 in float32, its logarithm -inf and the gradient NaN.

    ## Example

    ```python
    result = torch.log(torch.sigmoid(logits))
    ```

    ## Use instead

    ```python
    result = F.logsigmoid(logits)
    ```

    ## Fix safety

    Equal to rounding wherever the original is accurate. An epsilon is kept exactly, unless asked to be dropped.

    ## References

    - https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.logsigmoid.html
    """
    return core_is(term, ops.LOG_SIGMOID)


@rule("NG105", "softplus")
def log_of_one_plus_exponential(term: Term) -> bool:
    """## What it does

    Finds `log(1 + p)` where the logarithm of p is known, above all `log(1 + exp(x))`.

    ## Why is this bad

    exp(x) overflows from 89 on in float32: the result is inf although it equals x, and the gradient is NaN. Below -17 the sum
    is 1, and both digits and gradient are lost.

    ## Example

    ```python
    result = torch.log(1 + torch.exp(logits))
    ```

    ## Use instead

    ```python
    result = F.softplus(logits)
    ```

    ## Fix safety

    Equal to rounding wherever the original is accurate. Beyond its threshold of 20, `F.softplus` itself is linear.

    ## References

    - https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.softplus.html
    """
    return is_softplus(core(term))


@rule("NG202", "naive-sigmoid", kind="quotient")
def quotient_is_sigmoid(term: Term) -> bool:
    """## What it does

    Finds `1 / (1 + exp(-x))` and `exp(x) / (1 + exp(x))`.

    ## Why is this bad

    exp overflows from 89 on in float32: the quotient is inf / inf = NaN, or its gradient 0 * inf = NaN.

    ## Example

    ```python
    e = torch.exp(logits)
    result = e / (1 + e)
    ```

    ## Use instead

    ```python
    result = torch.sigmoid(logits)
    ```

    ## Fix safety

    Equal to rounding wherever the original is accurate.

    ## References

    - https://docs.pytorch.org/docs/stable/generated/torch.sigmoid.html
    """
    return is_sigmoid_multiple(term)
