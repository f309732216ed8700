"""What is told and left as it is: probabilities where others are expected, and epsilons that do not exist."""

# A rule is documented by markdown.
# ruff: noqa: D103, D415

from __future__ import annotations

from nanguard.algebra import operators as ops
from nanguard.algebra.call import Call
from nanguard.algebra.families.inverse import LOG_SOFTMAX
from nanguard.algebra.pattern import core, is_probability_or_total, is_sum
from nanguard.algebra.registry import misuse, rule
from nanguard.algebra.term import Apply, Term, Unrecognised


def is_probability(term: Term) -> bool:
    """Whether it is a softmax, a sigmoid, or a sum of such, also with an epsilon or a bound."""
    found = core(term)
    while is_sum(found):
        found = core(found.args[0])  # type: ignore[union-attr]
    return not term.signed and isinstance(found, Apply) and found.operator in (ops.LOG_SOFTMAX, ops.LOG_SIGMOID)


@misuse(
    "NG301",
    """
    torch.nn.functional.cross_entropy(input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, \
reduction='mean', label_smoothing=0.0)
    """,
)
def cross_entropy(call: Call) -> Term:
    return call.log()


@rule(
    "NG301",
    "softmax-into-cross-entropy",
    kind="advice",
    advice="F.cross_entropy takes logits and normalises them itself: probabilities are normalised twice, and the gradient of a "
    "wrong but confident prediction is 0. Write F.cross_entropy({logits}, target).",
)
def softmax_into_cross_entropy(term: Term) -> bool:
    """## What it does

    Finds a softmax that is given to `F.cross_entropy`, or `nn.CrossEntropyLoss`.

    ## Why is this bad

    `F.cross_entropy` takes logits. Of probabilities it takes a second softmax: with C classes the loss stays between about
    log(1 + (C - 1) / e) and log(e + C - 1), and the gradient of a confident mistake is 0.

    ## Example

    ```python
    p = torch.softmax(logits, dim=1)
    result = F.cross_entropy(p, target)
    ```

    ## Use instead

    ```python
    result = F.cross_entropy(logits, target)
    ```

    ## Fix safety

    Told, never replaced: it is another loss.

    ## References

    - https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.cross_entropy.html
    """
    if isinstance(term, Apply) and term.operator is ops.LOG_SOFTMAX:
        return bool(term.params["dim"] == min(len(term.shape) - 1, 1))
    while isinstance(term, Apply) and term.operator.move:
        term = term.args[0]
    return isinstance(term, Apply) and term.operator is ops.LOG_SOFTMAX


@misuse(
    "NG307",
    """
    torch.nn.functional.binary_cross_entropy_with_logits(input, target, weight=None, size_average=None, reduce=None, \
reduction='mean', pos_weight=None)
    """,
)
def binary_cross_entropy_with_logits(call: Call) -> Term:
    return call.log()


@rule(
    "NG307",
    "sigmoid-into-logits",
    kind="advice",
    advice="F.binary_cross_entropy_with_logits takes logits and applies the sigmoid itself: of probabilities the loss is never "
    "below 0.31, and the gradient of a wrong but confident prediction is 0. "
    "Write F.binary_cross_entropy_with_logits({logits}, target).",
)
def sigmoid_into_logits(term: Term) -> bool:
    """## What it does

    Finds probabilities that are given to `F.binary_cross_entropy_with_logits`, or `nn.BCEWithLogitsLoss`.

    ## Why is this bad

    It takes logits, and applies a second sigmoid to probabilities: these become 0.5 ... 0.73, so that nothing can be found
    improbable, and the loss stays above 0.31. The gradient of a confident mistake is 0.

    ## Example

    ```python
    label = (target % 2)[:, None].expand_as(logits).to(logits.dtype)
    result = F.binary_cross_entropy_with_logits(torch.sigmoid(logits), label)
    ```

    ## Use instead

    ```python
    label = (target % 2)[:, None].expand_as(logits).to(logits.dtype)
    result = F.binary_cross_entropy_with_logits(logits, label)
    ```

    ## Fix safety

    Told, never replaced: it is another loss.

    ## References

    - https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.binary_cross_entropy_with_logits.html
    """
    while isinstance(term, Apply) and term.operator.move:
        term = term.args[0]
    return isinstance(term, Apply) and term.operator in (ops.LOG_SIGMOID, ops.LOG_SOFTMAX)


@misuse("NG308", LOG_SOFTMAX)
def log_softmax(call: Call) -> Term:
    log = call.log()
    if not isinstance(log, Apply) or log.params.get("dim") != call.dim(log.shape):
        raise Unrecognised
    return log


@rule(
    "NG308",
    "softmax-into-log-softmax",
    kind="advice",
    advice="log_softmax takes logits and normalises them itself: this is the logarithm of a second softmax, whose "
    "gradient is 0 where a probability has saturated. Write F.log_softmax({logits}, dim).",
)
def softmax_into_log_softmax(term: Term) -> bool:
    """## What it does

    Finds a softmax that is given to `F.log_softmax`, or `nn.LogSoftmax`, over the same dim.

    ## Why is this bad

    It is no logarithm of the softmax, but of a second one: with C classes, all probabilities are then between 1 / (C - 1 + e)
    and e / (C - 1 + e).

    ## Example

    ```python
    p = torch.softmax(logits, dim=1)
    result = F.nll_loss(F.log_softmax(p, dim=1), target)
    ```

    ## Use instead

    ```python
    result = F.nll_loss(F.log_softmax(logits, dim=1), target)
    ```

    ## Fix safety

    Told, never replaced: it is another loss.

    ## References

    - https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.log_softmax.html
    """
    return isinstance(term, Apply) and term.operator is ops.LOG_SOFTMAX


@misuse(
    "NG302",
    """
    torch.nn.functional.kl_div(input, target, size_average=None, reduce=None, reduction='mean', log_target=False)
    torch.nn.functional.nll_loss(input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, \
reduction='mean')
    """,
)
def expects_logarithms(call: Call) -> Term:
    return call.log()


@rule(
    "NG302",
    "probabilities-as-logarithms",
    kind="advice",
    advice="{function} takes logarithms of probabilities, and was given the probabilities themselves. Give it {stable}.",
)
def probabilities_as_logarithms(term: Term) -> bool:
    """## What it does

    Finds probabilities as the first argument of `F.kl_div` or `F.nll_loss`, `nn.KLDivLoss` or `nn.NLLLoss`.

    ## Why is this bad

    Both take logarithms of probabilities. Of probabilities `F.nll_loss` is minus the probability of the target, and `F.kl_div`
    no divergence at all: it can be negative, and its minimum is not where the two are equal.

    ## Example

    ```python
    p = torch.softmax(logits, dim=1)
    result = F.nll_loss(p, target)
    ```

    ## Use instead

    ```python
    result = F.nll_loss(F.log_softmax(logits, dim=1), target)
    ```

    ## Fix safety

    Told, never replaced: it is another loss.

    ## References

    - https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.kl_div.html
    """
    return is_probability(term)


@rule(
    "NG305",
    "epsilon-without-effect",
    kind="advice",
    advice="{constant} is {rounded} in {dtype}, so it guards nothing. Take the logarithm in its stable form, {stable}.",
)
def epsilon_without_effect(term: Term) -> bool:
    """## What it does

    Finds epsilons on probabilities that do not exist in their dtype: `p + 1e-8` and `p.clamp(min=1e-8)` in float16, where 1e-8
    is 0, and the upper bound `1 - 1e-8` in float32, where it is 1, on a p that is then subtracted from 1.

    ## Why is this bad

    It was written as a guard against log 0, and does not guard.

    ## Example

    ```python
    p = torch.softmax(logits.half(), dim=1)
    result = torch.log(p + 1e-8)
    ```

    ## Use instead

    ```python
    result = F.log_softmax(logits.half(), dim=1)
    ```

    ## Fix safety

    Told. A logarithm that is replaced has the epsilon that the source says, in any dtype.

    ## References

    - https://docs.pytorch.org/docs/stable/type_info.html
    """
    return is_probability_or_total(term)
