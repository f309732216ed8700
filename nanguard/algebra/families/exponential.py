"""Exponentials, their sums, and what the logarithm of those is."""

# A law is documented by the equation above it, a rule by markdown.
# ruff: noqa: D103, D415

from __future__ import annotations

from nanguard.algebra import build
from nanguard.algebra.call import Call
from nanguard.algebra.pattern import core, core_is, is_bare, operators
from nanguard.algebra.registry import law, rule
from nanguard.algebra.term import Apply, Term


# log exp(x) = x
@law("torch.exp(input)\n torch.Tensor.exp(input)\n torch.Tensor.exp_(input)\n torch.exp_(input)", source=True)
def exp(call: Call) -> Term:
    return call.leaf()


# log sum p = logsumexp(log p)
@law(
    """
    torch.sum(input, dim=None, keepdim=False, *, dtype=None)
    torch.Tensor.sum(input, dim=None, keepdim=False, *, dtype=None)
    """
)
def _sum(call: Call) -> Term:
    log = call.log()
    return build.logsumexp(log, call.dims(log.shape), _flag(call, "keepdim"))


# log mean p = logsumexp(log p) - log n
@law(
    """
    torch.mean(input, dim=None, keepdim=False, *, dtype=None)
    torch.Tensor.mean(input, dim=None, keepdim=False, *, dtype=None)
    """
)
def mean(call: Call) -> Term:
    log = call.log()
    return build.logmeanexp(log, call.dims(log.shape), _flag(call, "keepdim"))


def _flag(call: Call, name: str) -> bool:
    return bool(call[name])


def _over_probabilities(term: Term) -> bool:
    found = core(term)
    return isinstance(found, Apply) and bool(operators(found.args[0]) & {"log_softmax", "logsigmoid"})


@rule("NG103", "logsumexp")
def log_of_sum_of_exponentials(term: Term) -> bool:
    """## What it does

    Finds the logarithm of a sum or a mean of exponentials.

    ## Why is this bad

    exp(x) overflows from 89 on in float32, and a sum of exponentials of very negative numbers is 0: the logarithm is inf or
    -inf although the result is an ordinary number.

    ## Example

    ```python
    result = torch.log(torch.exp(logits).sum(dim=1))
    ```

    ## Use instead

    ```python
    result = torch.logsumexp(logits, dim=1)
    ```

    ## Fix safety

    Equal to rounding wherever the original is accurate. Where all terms are -inf, the stabilised gradient is 0, not NaN.

    ## References

    - https://docs.pytorch.org/docs/stable/generated/torch.logsumexp.html
    """
    return core_is(term, build.LOGSUMEXP, build.LOGMEANEXP, build.LOGADDEXP) and not _over_probabilities(term)


@rule("NG106", "log-exp")
def log_of_exponential(term: Term) -> bool:
    """## What it does

    Finds the logarithm of an exponential, also of a scaled, shifted or selected one.

    ## Why is this bad

    It is the identity, but by way of numbers that overflow or vanish.

    ## Example

    ```python
    result = torch.log(torch.exp(logits))
    ```

    ## Use instead

    ```python
    result = logits.clone()
    ```

    ## Fix safety

    Equal to rounding wherever the original is accurate.
    """
    return is_bare(term)


@rule("NG107", "log-marginal")
def log_of_summed_probabilities(term: Term) -> bool:
    """## What it does

    Finds the logarithm of a sum or a mean of probabilities, such as a batch marginal or an ensemble.

    ## Why is this bad

    Probabilities that vanish take their gradient with them; if all do, the logarithm is -inf.

    ## Example

    ```python
    p = torch.softmax(logits, dim=1)
    result = torch.log(p.mean(dim=0))
    ```

    ## Use instead

    ```python
    log_p = F.log_softmax(logits, dim=1)
    result = torch.logsumexp(log_p, dim=0) - math.log(len(log_p))
    ```

    ## Fix safety

    Equal to rounding wherever the original is accurate. The mean of the logarithms would be another quantity.

    ## References

    - https://docs.pytorch.org/docs/stable/generated/torch.logsumexp.html
    """
    return core_is(term, build.LOGSUMEXP, build.LOGMEANEXP, build.LOGADDEXP) and _over_probabilities(term)
