"""Differences: what remains of 1, of a total, or of another number. Here digits cancel."""

# A law is documented by the equation above it, a rule by markdown.
# ruff: noqa: D103, D415

from __future__ import annotations

from nanguard.algebra import build, sums
from nanguard.algebra import operators as ops
from nanguard.algebra.call import Call
from nanguard.algebra.families.exponential import multiplied
from nanguard.algebra.pattern import core_is
from nanguard.algebra.registry import law, rule
from nanguard.algebra.term import Apply, Term, Unrecognised


# p - q, p - c, c - p
@law(
    """
    torch.sub(input, other, *, alpha=1)
    torch.subtract(input, other, *, alpha=1)
    torch.rsub(other, input, *, alpha=1)
    torch.Tensor.sub(input, other, *, alpha=1)
    torch.Tensor.subtract(input, other, *, alpha=1)
    torch.Tensor.__sub__(input, other)
    torch.Tensor.__rsub__(other, input)
    torch.Tensor.sub_(input, other, *, alpha=1)
    torch.Tensor.subtract_(input, other, *, alpha=1)
    torch.Tensor.__isub__(input, other)
    """,
    branch="follows",
)
def sub(call: Call) -> Term:
    if call.known("input") and call.known("other"):
        return sums.difference(call.log("input"), multiplied(call, "other"))
    if call.arguments.get("alpha", 1) != 1:
        raise Unrecognised
    if call.known("input") and not call.is_number("other"):
        return sums.offset(call.log("input"), call.weight("other"), -1)
    if call.known("other") and not call.is_number("input"):
        return sums.offset(call.log("other"), call.weight("input"), 1)
    if call.known("input"):
        return build.expand(sums.plus_constant(call.log("input"), -call.number("other")), call.shape)
    return build.expand(sums.plus_constant(build.minus(call.log("other")), call.number("input")), call.shape)


# p_(k+1) - p_k
@law("torch.diff(input, n=1, dim=-1, prepend=None, append=None)\n torch.Tensor.diff(input, n=1, dim=-1)")
def diff(call: Call) -> Term:
    log, dim = call.log(), call.dim(call.log().shape)
    if call["n"] != 1 or call.arguments.get("prepend") is not None or call.arguments.get("append") is not None:
        raise Unrecognised
    length = call.shape[dim]
    later, earlier = (
        build.rearrange(ops.NARROW, (log,), call.shape, dim=dim, start=start, length=length) for start in (1, 0)
    )
    return sums.difference(later, earlier)


# -p;  -log p = log(1 / p)
@law(
    """
    torch.neg(input)
    torch.negative(input)
    torch.Tensor.neg(input)
    torch.Tensor.negative(input)
    torch.Tensor.__neg__(input)
    torch.Tensor.neg_(input)
    """,
    branch="follows",
)
def neg(call: Call) -> Term:
    p = None if call.known("input") else call.exponential()
    if p is not None and not p.signed:
        return Apply(ops.LOGARITHM, (build.negate(p),), p.shape)
    log = call.log()
    if build.is_op(log, ops.EXPM1):
        raise Unrecognised  # log(-expm1(x)) is how log(1 - e^x) is written stably
    return build.minus(log)


@rule("NG110", "log-complement")
def log_of_complement(term: Term) -> bool:
    """## What it does

    Finds the logarithm of 1 minus a softmax: of the probability that it is one of the other classes.

    ## Why is this bad

    Once a probability rounds to 1 (in float32 at a gap of 17 between two logits), the difference is 0 and its logarithm -inf.

    ## Example

    ```python
    result = torch.log(1 - torch.softmax(logits, dim=1))
    ```

    ## Use instead

    ```python
    others = torch.eye(logits.shape[1], dtype=torch.bool)
    log_p = F.log_softmax(logits, dim=1).unsqueeze(1)
    result = torch.logsumexp(log_p.masked_fill(others, -math.inf), dim=2)
    ```

    ## Fix safety

    Equal to rounding wherever the original is accurate. Where the original has lost its digits, the difference shows.

    ## References

    - https://docs.pytorch.org/docs/stable/generated/torch.logsumexp.html
    """
    return core_is(term, ops.LOG_REST, ops.LOG_TAIL)


@rule("NG111", "log-difference")
def log_of_difference(term: Term) -> bool:
    """## What it does

    Finds the logarithm of a difference of exponentials or probabilities, such as `1 - exp(x)`, `exp(x) - 1` or the
    difference of two sigmoids in a discretised logistic mixture.

    ## Why is this bad

    Both may overflow although their logarithms are moderate; and where they are close, or both close to 1, all digits cancel.

    ## Example

    ```python
    result = torch.log(torch.exp(logits + 1) - torch.exp(logits))
    ```

    ## Use instead

    ```python
    result = logits + 1 + torch.log(-torch.expm1(logits - (logits + 1)))
    ```

    ## Fix safety

    Equal to rounding wherever the original is accurate. It is NaN where the difference is negative, as the original is.

    ## References

    - Maechler, Accurately computing log(1 - exp(-|a|)), https://cran.r-project.org/package=Rmpfr
    """
    return core_is(term, ops.DIFFERENCE, ops.BETWEEN, ops.EXPM1)


@rule("NG112", "log-sum-of-others")
def log_of_total_without_one(term: Term) -> bool:
    """## What it does

    Finds the logarithm of a sum of exponentials from which one of its terms is subtracted again, as the denominators of
    contrastive losses are often written.

    ## Why is this bad

    The positive pair is mostly the largest term: what remains after subtracting it has few digits, or is 0.

    ## Example

    ```python
    e = torch.exp(logits)
    result = torch.log(e.sum(dim=1) - e.diagonal())
    ```

    ## Use instead

    ```python
    own = torch.eye(len(logits), dtype=torch.bool)
    result = torch.logsumexp(logits.masked_fill(own, -math.inf), dim=1)
    ```

    ## Fix safety

    Equal to rounding wherever the original is accurate. Where the original has lost its digits, the difference shows.

    ## References

    - https://docs.pytorch.org/docs/stable/generated/torch.logsumexp.html
    """
    return core_is(term, ops.LOG_OTHERS)
