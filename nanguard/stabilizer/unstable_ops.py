"""Whether a loss has anything that the stabiliser could ever improve."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from nanguard.stabilizer.regions import Recomputation

__all__ = ["has_unstable_ops"]

# A logarithm, or the graft that took the place of one or of a quotient, is enough; an exponential needs something that divides,
# and a root something that selects.
# What was compiled cannot be seen, and would be compiled anew, without a guard, once the stabiliser is off.
_ALONE = ("Log", "Log2", "Log10", "Log1P", "BinaryCrossEntropy", "_Graft", "_GraftInPlace", "CompiledFunction")
_DIVISIONS = ("Div", "Reciprocal", "Pow")
_ROOTS = ("Sqrt", "Rsqrt", "Acos", "Asin", "LinalgVectorNorm", "Norm")
_REENTRANT = CheckpointFunction.__name__


_RATIO, _BRANCH = {"exponential", "division"}, {"root", "selection"}
_KINDS: dict[str, str] = {}


def _kind(name: str) -> str:
    if name in _ALONE:
        return "alone"
    if name == _REENTRANT:
        return "region"
    if name in _ROOTS:
        return "root"
    return {"Exp": "exponential", "Where": "selection"}.get(name, "division" if name in _DIVISIONS else "")


def has_unstable_ops(loss: Tensor, limit: int | None = None) -> bool:
    """Whether the graph of a loss contains an operation that a rule might replace, or has replaced.

    That is a logarithm of any base, a binary cross-entropy of probabilities, an exponential together with a division, or a root
    together with a `where`.
    `log_softmax`, `cross_entropy`, `logsumexp` and the built-in softmax (attention) are stable as they are and do not count.
    The inside of compiled regions cannot be seen, so that they always count; that of custom functions cannot either, and that
    of reentrant checkpoints only in so far as something was replaced there.

    Arguments:
        loss: any tensor; the answer is `False` for one without a graph.
        limit: at most that many nodes are visited, those next to the loss first.

    Example:
        >>> has_unstable_ops(torch.softmax(model(x), 1)[rows, y].log().mean())
        True
    """
    if loss.grad_fn is None:
        return False
    queue: list[Any] = [loss.grad_fn]
    seen = {loss.grad_fn}
    kinds: set[str] = set()
    for node in queue:
        name = type(node).__name__
        kind = _KINDS.get(name)
        if kind is None:
            kind = _KINDS[name] = _kind(name.partition("Backward")[0])
        if kind:
            if kind == "alone" or (kind == "region" and isinstance(getattr(node, "run_function", None), Recomputation)):
                return True
            kinds.add(kind)
            if kinds >= _RATIO or kinds >= _BRANCH:
                return True
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                if limit is not None and len(queue) >= limit:
                    break
                seen.add(following)
                queue.append(following)
    return False
