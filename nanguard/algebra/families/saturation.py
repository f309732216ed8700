"""Bounds that stand where a logarithm should, in libraries and by hand: told, and replaced only where the user asks for it."""

# A rule is documented by markdown.
# ruff: noqa: D103, D415

from __future__ import annotations

from nanguard.algebra import operators as ops
from nanguard.algebra import sums
from nanguard.algebra.build import positive
from nanguard.algebra.call import Call
from nanguard.algebra.families.misuse import is_probability
from nanguard.algebra.pattern import core, is_probability_or_total
from nanguard.algebra.registry import Names, misuse, rule
from nanguard.algebra.term import Apply, Leaf, Term, Unrecognised

# The distance from 1 to the next number, in float64, float32, float16 and bfloat16.
_MACHINE_EPSILONS = frozenset({2.0**-52, 2.0**-23, 2.0**-10, 2.0**-7})
# Larger ones are no guards against log 0, but part of what is computed.
_LARGEST_EPSILON = 1e-3


def without_floor(term: Term) -> Term | None:
    """What stands under the bounds, eps and 1 - eps, that `torch.distributions` puts on probabilities, if it does."""
    if not isinstance(term, Apply):
        return None
    if term.operator is ops.DIFFERENCE and isinstance(term.args[0], Apply) and term.args[0].operator is ops.FULL:
        inner = without_floor(term.args[1])
        return None if inner is None else Apply(ops.DIFFERENCE, (term.args[0], inner), term.shape)
    bounds = {}
    while (
        isinstance(term, Apply) and term.operator in (ops.CLAMP_MIN, ops.CLAMP_MAX) and term.operator.name not in bounds
    ):
        bounds[term.operator.name] = term.params["constant"]
        term = term.args[0]
    smallest = bounds.get(ops.CLAMP_MIN.name)
    pair = smallest in _MACHINE_EPSILONS and bounds.get(ops.CLAMP_MAX.name) == 1 - smallest
    return term if pair else None


def _logits(term: Term, names: Names) -> str | None:
    found = core(term)
    inner = found.args[0] if isinstance(found, Apply) and found.args else None
    return f"logits={names.of(inner, 'logits')}" if isinstance(inner, Leaf) else None


@rule(
    "NG303",
    "saturated-distribution",
    kind="advice",
    suggest=_logits,
    advice="torch.distributions bounds probabilities by {epsilon} and 1 - {epsilon}: the logarithm of one beyond is wrong, and "
    "its gradient 0. Give the distribution logits={logits} in place of probs.",
)
def saturated_distribution(term: Term) -> bool:
    """## What it does

    Finds distributions that are given probabilities, such as `Categorical(probs=softmax(x))` and `Bernoulli(probs=sigmoid(x))`,
    where one of them is below the bound that torch puts on it before it takes the logarithm.

    ## Why is this bad

    `torch.distributions` clamps probabilities to eps ... 1 - eps of their dtype (in float32, eps is 1.2e-7). The logarithm of a
    smaller one is -15.9 whatever it is, and its gradient 0: what the policy thinks impossible stays so.

    ## Example

    ```python
    policy = torch.distributions.Categorical(probs=torch.softmax(logits, dim=1))
    result = policy.log_prob(target)
    ```

    ## Use instead

    ```python
    policy = torch.distributions.Categorical(logits=logits)
    result = policy.log_prob(target)
    ```

    ## Fix safety

    Told; replaced with `saturated: repair` only, which changes values that are at the bound. Where a probability is exactly 0
    (a masked logit) the bound stays. Probabilities on accelerators are not looked into, as that would wait for the device.

    ## References

    - https://docs.pytorch.org/docs/stable/distributions.html
    """
    return without_floor(term) is not None


@misuse(
    "NG304",
    """
    torch.nn.functional.binary_cross_entropy(input, target, weight=None, size_average=None, reduce=None, reduction='mean')
    """,
)
def binary_cross_entropy(call: Call) -> Term:
    p, target = positive(call.log()), call.leaf("target")
    rest = positive(sums.complement(p, 1.0))
    if target.shape != p.shape:
        raise Unrecognised
    return Apply(ops.BINARY_CROSS_ENTROPY, (p, rest, target), p.shape)


def _with_logits(term: Term, names: Names) -> str | None:
    assert isinstance(term, Apply)
    p, _, target = term.args
    if not isinstance(p, Apply) or p.operator is not ops.LOG_SIGMOID or not isinstance(p.args[0], Leaf):
        return None
    assert isinstance(target, Leaf)
    return f"F.binary_cross_entropy_with_logits({names.of(p.args[0], 'logits')}, {names.of(target, 'target')})"


@rule(
    "NG304",
    "saturated-binary-cross-entropy",
    kind="advice",
    suggest=_with_logits,
    advice="F.binary_cross_entropy bounds its logarithms by -100, and the gradient of a probability that rounds to 0 or 1 is "
    "lost. Write F.binary_cross_entropy_with_logits({logits}, target).",
)
def saturated_binary_cross_entropy(term: Term) -> bool:
    """## What it does

    Finds a sigmoid that is given to `F.binary_cross_entropy`, or `nn.BCELoss`, where a probability is so close to 0 or 1, and
    so far from its target, that the loss or its gradient is wrong.

    ## Why is this bad

    From a logit of 17 on, a sigmoid is 1 in float32. The loss of a target of 0 is then 100 instead of the logit, and its
    gradient 0: the worst mistakes are never corrected. Below 1e-12 the gradient fades, too.

    ## Example

    ```python
    label = (target % 2)[:, None].expand_as(logits).to(logits.dtype)
    result = F.binary_cross_entropy(torch.sigmoid(logits), label)
    ```

    ## Use instead

    ```python
    label = (target % 2)[:, None].expand_as(logits).to(logits.dtype)
    result = F.binary_cross_entropy_with_logits(logits, label)
    ```

    ## Fix safety

    Told; replaced with `saturated: repair` only, which changes values that have been bounded. Probabilities on accelerators
    are not looked into, as that would wait for the device.

    ## References

    - https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.binary_cross_entropy_with_logits.html
    """
    return isinstance(term, Apply) and term.operator is ops.BINARY_CROSS_ENTROPY and is_probability(term.args[0])


def without_epsilon(term: Term) -> tuple[Term, float, float] | None:
    """The same without the small epsilon of a probability or a total, the epsilon, and by what its logarithm is multiplied."""
    if not isinstance(term, Apply):
        return None
    if term.operator in (ops.PLUS_CONSTANT, ops.CLAMP_MIN) and term.params["constant"] <= _LARGEST_EPSILON:
        return (term.args[0], term.params["constant"], 1.0) if is_probability_or_total(term.args[0]) else None
    if len(term.args) != 1 or not (term.operator.move or term.operator in (ops.SCALE, ops.CLAMP_MAX)):
        return None
    found = without_epsilon(term.args[0])
    if found is None:
        return None
    bare, epsilon, scale = found
    factor = term.params["other"] if term.operator is ops.SCALE else 1.0
    return Apply(term.operator, (bare,), term.shape, **term.params), epsilon, scale * factor


@rule(
    "NG306",
    "saturating-epsilon",
    kind="advice",
    advice="The epsilon {constant} hides a probability far below it, whose gradient is lost. Write {stable} without it, "
    "or use nanguard.stabilize(epsilon='drop').",
)
def saturating_epsilon(term: Term) -> bool:
    """## What it does

    Finds `log(p + eps)` and `log(p.clamp(min=eps))` where p is far below the epsilon, and a loss depends on it.

    ## Why is this bad

    The logarithm of the epsilon stands where that of p should, and the derivative at p is 0: a sample that the model thinks
    impossible is never learnt.

    ## Example

    ```python
    p = torch.softmax(logits, dim=1)
    result = torch.log(p[torch.arange(len(target)), target] + 1e-8)
    ```

    ## Use instead

    ```python
    result = -F.cross_entropy(logits, target, reduction="none")
    ```

    ## Fix safety

    Told, where the backward pass shows that a gradient is lost. `epsilon: drop` drops such epsilons. Probabilities on
    accelerators are not looked into, as that would wait for the device.
    """
    return without_epsilon(term) is not None
