"""From an origin to a cause: by the operation, and by what it was given where it failed."""

from __future__ import annotations

import torch
from torch import Tensor

from nanguard.diagnosis.records import Evidence
from nanguard.diagnosis.walk import Finding
from nanguard.incident import Cause, TensorStats

__all__ = ["cause_of", "guilty_operand"]


def _names(text: str) -> frozenset[str]:
    return frozenset(f"aten.{name}" for name in text.split())


_LOGS = _names("log log2 log10 special_xlog1py")
_DIVISIONS = _names("div true_divide reciprocal remainder fmod floor_divide")
_SOFTMAXES = _names("_softmax _log_softmax _safe_softmax softmax log_softmax")
_SPREADS = _names("var std var_mean std_mean")
_WEIGHTED = _names("nll_loss_forward nll_loss2d_forward")
_NORMALISATIONS = _names(
    "native_layer_norm native_group_norm native_batch_norm _native_batch_norm_legit _fused_rms_norm "
    "_weight_norm_interface _weight_norm"
)
# Functions that are defined on a part of the line only, or have poles.
_DOMAINS = _names(
    "sqrt rsqrt acos asin acosh atanh erfinv logit log1p lgamma digamma polygamma special_zeta tan _ctc_loss igamma igammac "
    "mvlgamma special_erfcx special_log_ndtr special_ndtri special_entr linalg_cholesky_ex "
    "linalg_inv_ex _linalg_solve_ex linalg_lu_solve linalg_solve_triangular"
)
_DETERMINANTS = _names("_linalg_slogdet linalg_slogdet logdet slogdet")
# Their derivatives divide by differences of values, which fail whatever gradient arrives, also one of 0.
_DECOMPOSITIONS = _names("_linalg_eigh linalg_eig _linalg_svd linalg_qr linalg_cholesky_ex linalg_lu_factor_ex")
_GROWING = _names("lgamma tan")  # also overflow, where their argument is no pole


def cause_of(finding: Finding) -> Cause:
    """The kind of failure."""
    if finding.reached:
        return _reached(finding)
    evidence = finding.evidence
    if evidence is None:
        return "fully_masked" if finding.row else "unknown"
    if finding.origin.phase != "backward" or finding.custom:
        return _forward(finding.kernel, evidence, finding.origin.operands)
    return _backward(finding, evidence)


def guilty_operand(finding: Finding, cause: Cause) -> int | None:
    """The position of the input whose value is to blame, where there is one."""
    if finding.evidence is None or finding.origin.phase != "forward":
        return None
    if cause == "division_by_zero" and finding.kernel in ("aten.div", "aten.remainder", "aten.fmod"):
        return 1
    if cause in ("log_of_zero", "invalid_domain", "division_by_zero", "overflow") and len(finding.evidence.guilty) == 1:
        return 0
    return None


def _reached(finding: Finding) -> Cause:
    """An infinity that was meant has reached the loss."""
    if finding.row:
        return "fully_masked"
    return "log_of_zero" if finding.kernel in _WEIGHTED else "unknown"


def _forward(kernel: str, evidence: Evidence, stats: tuple[TensorStats, ...]) -> Cause:
    guilty = evidence.guilty
    if evidence.row:
        return "fully_masked"
    if _of_nothing(kernel, stats):
        return "empty_reduction"
    if kernel in _LOGS:
        return "log_of_zero" if _any(guilty[:1], lambda v: v == 0) else "invalid_domain"
    if kernel in ("aten.xlogy", "aten.special_xlogy"):
        return "log_of_zero" if _any(guilty[1:], lambda v: v == 0) else "invalid_domain"
    if kernel in _DIVISIONS:
        return _division(kernel, evidence, stats)
    if kernel == "aten.pow":
        return _power(evidence)
    if kernel == "aten.addcdiv":
        return "division_by_zero" if _any(guilty[2:3], lambda v: v == 0) else "overflow"
    if kernel in _DETERMINANTS:
        return "log_of_zero"
    if kernel in _NORMALISATIONS:
        return "overflow" if stats and _large(stats[0]) else "division_by_zero"
    if kernel in _SOFTMAXES | {"aten.logsumexp"}:
        return "invalid_domain" if _infinite(stats) else "overflow"
    if kernel in _DOMAINS:
        poles = kernel not in _GROWING or _any(guilty[:1], lambda v: (v <= 0) & (v == v.round()))
        return "invalid_domain" if poles else "overflow"
    if _any(guilty, torch.isnan):
        return "unknown"  # a NaN that stands in the source
    # Infinities that were meant, and then met 0 or each other; without a NaN nothing has met.
    if evidence.meant or _any(guilty, torch.isinf):
        return "invalid_domain" if evidence.nan else "unknown"
    # A function of one number has a NaN for a result only outside its domain: what overflows is infinite.
    alone = evidence.pointwise and len(stats) == 1 and len(guilty) == 1
    return "invalid_domain" if alone and evidence.nan else "overflow"


def _division(kernel: str, evidence: Evidence, stats: tuple[TensorStats, ...]) -> Cause:
    divisor = evidence.guilty[:1] if kernel == "aten.reciprocal" else evidence.guilty[1:]
    if not _any(divisor, lambda v: v == 0):
        return "invalid_domain" if evidence.meant and evidence.nan else "overflow"
    return "division_by_zero"


def _power(evidence: Evidence) -> Cause:
    if len(evidence.guilty) < 2:
        return "overflow"
    base, exponent = evidence.guilty[:2]
    if _any((base,), lambda v: v == 0) and _any((exponent,), lambda v: v < 0):
        return "division_by_zero"
    return "invalid_domain" if evidence.nan else "overflow"


def _backward(finding: Finding, evidence: Evidence) -> Cause:
    masked = evidence.masked and finding.origin.op not in _DECOMPOSITIONS
    if evidence.zero and (masked or evidence.meant):
        return "masked_branch"
    forward = finding.forward
    if forward is not None:  # its value was non-finite already, and did not show in the loss
        return _forward(finding.origin.op or "", forward, forward.stats)
    if (finding.origin.op or "") in ("aten.logsumexp", *_SOFTMAXES) and (evidence.meant or _infinite(evidence.stats)):
        return "fully_masked"
    if finding.origin.op == "aten._ctc_loss":
        return "invalid_domain"
    if evidence.zero or evidence.nan or _singular(finding, evidence):
        return "singular_gradient"
    return "overflow"


def _singular(finding: Finding, evidence: Evidence) -> bool:
    """Whether the derivative has a pole there, so that it is no matter of size."""
    kernel, guilty = finding.kernel, evidence.guilty
    if kernel in ("aten.mul", "aten.add", "aten.sum", "aten.mm", "aten.bmm", "aten.addmm"):
        return False
    if kernel in ("aten.div", "aten.reciprocal", "aten.rsqrt", "aten.pow"):
        return any(bool((values == 0).any()) for values in guilty)
    return any(entry.zeros > 0 for entry in evidence.stats)


def _of_nothing(kernel: str, stats: tuple[TensorStats, ...]) -> bool:
    """Whether a mean had no elements, or a variance one fewer than it needs; whatever else has none does not overflow."""
    if kernel in _WEIGHTED:
        return not _infinite(stats[:1])
    if not stats:
        return False
    if 0 in stats[0].shape:
        return True
    if kernel == "aten.segment_reduce":
        return stats[-1].zeros > 0 and not _large(stats[0])
    return kernel in _SPREADS and not _large(stats[0])


def _large(entry: TensorStats) -> bool:
    """Whether squares of the values overflow."""
    return entry.min is not None and entry.max is not None and max(abs(entry.min), abs(entry.max)) > 1e18


def _infinite(stats: tuple[TensorStats, ...]) -> bool:
    return any(entry.posinf + entry.neginf > 0 for entry in stats)


def _any(values: tuple[Tensor, ...], test: object) -> bool:
    return any(bool(test(entry).any()) for entry in values)  # type: ignore[operator]
