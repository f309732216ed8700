"""From an origin to a cause and a piece of advice. The advice is a table, so that adding to it is no programming."""

from __future__ import annotations

from nanguard.diagnosis.trace import Finding
from nanguard.incident import Cause, Origin, TensorStats

__all__ = ["advice", "cause_of"]

_LOGS = {"aten.log", "aten.log2", "aten.log10", "aten.log1p", "aten.xlogy"}
_DIVISIONS = {"aten.div", "aten.reciprocal", "aten.true_divide", "aten.remainder", "aten.fmod"}
_SOFTMAXES = {"aten._softmax", "aten._log_softmax", "aten.softmax", "aten.log_softmax", "aten._safe_softmax"}
_REDUCTIONS = {"aten.mean", "aten.std", "aten.var", "aten.std_mean", "aten.var_mean", "aten.nll_loss_forward"}
_DOMAINS = {
    *("aten.sqrt", "aten.rsqrt", "aten.acos", "aten.asin", "aten.acosh", "aten.atanh", "aten.pow", "aten.lgamma"),
    *("aten.digamma", "aten.erfinv", "aten.logit", "aten.log", "aten.log2", "aten.log10", "aten.log1p"),
    *("aten._ctc_loss", "aten.tan"),
}

_ADVICE: dict[Cause, str] = {
    "bad_input": ("{tensor} holds {counts} before the model sees it. Clean or drop these samples in the dataset."),
    "parameters": (
        "{tensor} is non-finite already, so an earlier step did the damage. Load an older checkpoint, and look at the "
        "learning rate and the gradient norms before this step."
    ),
    "log_of_zero": (
        "The logarithm was given an exact 0. Compute it from the logits: F.log_softmax, F.logsigmoid, "
        "F.cross_entropy or torch.logsumexp."
    ),
    "division_by_zero": (
        "The divisor is an exact 0. Bound it away from 0 before the division, or subtract logarithms instead."
    ),
    "overflow": (
        "Finite inputs (up to {largest}) gave a result past the largest {dtype}. Normalise the inputs or lower the "
        "learning rate; exp needs its maximum subtracted first (torch.logsumexp, F.softmax)."
    ),
    "invalid_domain": "The input lies outside the domain of {op}. Clamp it to the domain, or reparameterise.",
    "singular_gradient": (
        "{op} has an infinite derivative where its input is 0. Add the epsilon inside the function, not after it."
    ),
    "masked_branch": (
        "torch.where chose the other branch, but the gradient of {op} in the branch that was not chosen is 0 * inf. "
        "Make the input of {op} safe with another torch.where before it."
    ),
    "fully_masked": (
        "Every entry of a row is masked: softmax of only -inf. Leave out such rows, or one entry of them unmasked."
    ),
    "empty_reduction": (
        "The mean of nothing is NaN. Check for an empty selection first (all targets ignored, no positives)."
    ),
    "transient": (
        "A second run of the same step came out finite. Suspect the hardware, or code with random numbers of its own."
    ),
    "unknown": "",
}


def cause_of(finding: Finding) -> Cause:
    """The kind of failure, judged by the operation and by what it was given."""
    origin = finding.origin
    op = origin.op or ""
    stats = origin.operands
    if origin.phase == "backward":
        return _backward_cause(finding)
    if op in _LOGS and _any(stats, lambda s: s.zeros > 0):
        return "log_of_zero"
    if op in _DIVISIONS and _any(stats[-1:], lambda s: s.zeros > 0):
        return "division_by_zero"
    if op in _SOFTMAXES and _any(stats, lambda s: s.neginf > 0):
        return "fully_masked"
    if op in _REDUCTIONS and _is_empty(origin):
        return "empty_reduction"
    if op in _DOMAINS and (op != "aten.pow" or _any(stats, lambda s: s.min is not None and s.min <= 0)):
        return "invalid_domain"
    if _any(stats, lambda s: s.posinf + s.neginf > 0):  # infinities that were meant, and then met 0 or each other
        return "invalid_domain"
    return "overflow"


def _backward_cause(finding: Finding) -> Cause:
    if finding.zero_gradient:
        return "masked_branch"
    if _any(finding.origin.operands, lambda s: s.zeros > 0):
        return "singular_gradient"
    return "overflow"


def _any(stats: tuple[TensorStats, ...], test: object) -> bool:
    return any(test(entry) for entry in stats)  # type: ignore[operator]


def _is_empty(origin: Origin) -> bool:
    def few(entry: TensorStats) -> bool:
        return 0 in entry.shape or entry.shape in ((), (1,))

    return origin.op == "aten.nll_loss_forward" or _any(origin.operands[:1], few)


def advice(cause: Cause, origin: Origin | None) -> str:
    """One or two plain sentences: what to do."""
    stats = origin.operands if origin else ()
    counts = "non-finite values"
    if origin and origin.tensor and stats:
        nan, infinite = sum(s.nan for s in stats), sum(s.posinf + s.neginf for s in stats)
        kinds = ((nan, "NaN"), (infinite, "infinite value" if infinite == 1 else "infinite values"))
        counts = " and ".join(f"{number} {kind}" for number, kind in kinds if number) or counts
    extremes = [max(abs(s.min), abs(s.max)) for s in stats if s.min is not None and s.max is not None]
    return _ADVICE[cause].format(
        tensor=(origin.tensor if origin else None) or "A value",
        counts=counts,
        largest=f"{max(extremes, default=float('nan')):.3g}",
        dtype=stats[0].dtype if stats else "float",
        op=((origin.op if origin else None) or "the operation").removeprefix("aten."),
    )
