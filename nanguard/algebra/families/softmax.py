"""Softmax, written with the built-in or by hand, and the logarithm of what was picked from it."""

# A law is documented by the equation above it, a rule by markdown.
# ruff: noqa: D103, D415

from __future__ import annotations

from nanguard.algebra import build
from nanguard.algebra import operators as ops
from nanguard.algebra.build import is_op
from nanguard.algebra.call import Call
from nanguard.algebra.pattern import core_is, is_selection, unshifted
from nanguard.algebra.registry import Names, law, rule
from nanguard.algebra.term import Apply, Leaf, Term


# log softmax(x, d) = log_softmax(x, d)
@law(
    """
    torch.softmax(input, dim, dtype=None)
    torch.special.softmax(input, dim, dtype=None)
    torch.Tensor.softmax(input, dim, dtype=None)
    torch.nn.functional.softmax(input, dim=None, _stacklevel=3, dtype=None)
    """,
    source=True,
)
def softmax(call: Call) -> Term:
    logits = call.leaf()
    return build.log_softmax(logits, call.dim(logits.shape))


# softmin(x) = softmax(-x)
@law("torch.nn.functional.softmin(input, dim=None, _stacklevel=3, dtype=None)", source=True)
def softmin(call: Call) -> Term:
    logits = call.leaf()
    return build.log_softmax(build.negate(logits), call.dim(logits.shape))


def _cross_entropy(term: Term, names: Names) -> str | None:
    """`-F.cross_entropy(x, y)` where exactly the target's log-probability is picked from two-dimensional logits."""
    shape, picked = term.shape, term
    if isinstance(picked, Apply) and picked.operator is ops.RESHAPE:
        picked = picked.args[0]
    if not isinstance(picked, Apply) or not picked.args:
        return None
    base = picked.args[0]
    if not isinstance(base, Apply) or base.operator is not ops.LOG_SOFTMAX or not isinstance(base.args[0], Leaf):
        return None
    if len(base.shape) != 2 or base.params["dim"] != 1:
        return None
    target = _target(picked, base.shape[0], names)
    if target is None or shape not in ((base.shape[0],), (base.shape[0], 1)):
        return None
    text = f'-F.cross_entropy({names.of(base.args[0], "logits")}, {names.of(target, "target")}, reduction="none")'
    return text if len(shape) == 1 else f"{text}.unsqueeze(1)"


def _target(picked: Apply, rows: int, names: Names) -> Leaf | None:
    if picked.operator.name in ("gather", "take_along_dim") and picked.params["dim"] == 1:
        index: Leaf = picked.params["index" if "index" in picked.params else "indices"]
        return index if index.shape == (rows, 1) else None
    key = picked.params.get("key")
    if isinstance(key, tuple) and len(key) == 2 and isinstance(key[1], Leaf) and key[1].shape == (rows,):
        first = key[0].value if isinstance(key[0], Leaf) else key[0]
        return key[1] if names.counts_up(first, rows) else None
    return None


@rule("NG101", "log-softmax")
def log_of_softmax(term: Term) -> bool:
    """## What it does

    Finds the logarithm of a softmax, also where an epsilon, a bound or a change of shape stands between the two.

    ## Why is this bad

    A probability below the smallest float is 0, its logarithm -inf and the gradient NaN. In float32 that takes a gap of about
    104 between two logits, in float16 of 18.

    ## Example

    ```python
    p = torch.softmax(logits, dim=1)
    result = torch.log(p)
    ```

    ## Use instead

    ```python
    result = F.log_softmax(logits, dim=1)
    ```

    ## Fix safety

    Equal to rounding wherever the original is accurate. An epsilon is kept exactly, as `logaddexp`, unless asked to be dropped.

    ## References

    - https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.log_softmax.html
    """
    return core_is(term, ops.LOG_SOFTMAX) and not is_selection(term)


@rule("NG102", "cross-entropy", suggest=_cross_entropy)
def log_of_picked_softmax(term: Term) -> bool:
    """## What it does

    Finds the logarithm of probabilities that were picked from a softmax, by index, `gather` or a mask.

    ## Why is this bad

    It is the cross-entropy, but a target that the model thinks impossible has probability 0: the loss is inf, the gradient NaN.

    ## Example

    ```python
    p = torch.softmax(logits, dim=1)
    result = torch.log(p[torch.arange(len(target)), target])
    ```

    ## Use instead

    ```python
    result = -F.cross_entropy(logits, target, reduction="none")
    ```

    ## Fix safety

    Equal to rounding wherever the original is accurate. `F.cross_entropy` skips the label -100, where indexing raises.

    ## References

    - https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.cross_entropy.html
    """
    return core_is(term, ops.LOG_SOFTMAX) and is_selection(term)


@rule("NG201", "naive-softmax", kind="quotient")
def quotient_is_softmax(term: Term) -> bool:
    """## What it does

    Finds `exp(x)` divided by its own sum over one dim.

    ## Why is this bad

    exp(x) overflows from 89 on in float32 (12 in float16): inf / inf is NaN.

    ## Example

    ```python
    e = torch.exp(logits)
    result = e / e.sum(dim=1, keepdim=True)
    ```

    ## Use instead

    ```python
    result = F.softmax(logits, dim=1)
    ```

    ## Fix safety

    Equal to rounding wherever the original is accurate.

    ## References

    - https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.softmax.html
    """
    return is_op(unshifted(term), ops.LOG_SOFTMAX)
