"""What to do about a failure, by cause and operation. Data: to add advice is to add a line.

The first entry whose cause, operations and phase fit is taken. Fields in braces: `op`, `tensor`, `counts`, `largest`, `dtype`,
`line` (the line to change, or the operation where there is none). A rule's code is explained by ``nanguard rule``.
"""

from __future__ import annotations

from typing import NamedTuple

from nanguard.incident import Cause, Phase

__all__ = ["ADVICE", "Entry"]


class Entry(NamedTuple):
    """One piece of advice; empty `ops` fit every operation, an empty `phase` every phase."""

    cause: Cause
    ops: tuple[str, ...]
    text: str
    phase: Phase | None = None


def _ops(text: str) -> tuple[str, ...]:
    return tuple(f"aten.{name}" for name in text.split())


_LOGS = _ops("log log2 log10")
_ROOTS = _ops("sqrt rsqrt")

ADVICE: tuple[Entry, ...] = (
    Entry(
        "bad_input",
        (),
        "{tensor} holds {counts} before the model sees it. Clean or drop these samples in the dataset.",
    ),
    Entry(
        "parameters",
        (),
        "{tensor} is non-finite already, so an earlier step did the damage. Load an older checkpoint, and look at the "
        "learning rate and the gradient norms before this step.",
    ),
    Entry(
        "log_of_zero",
        _ops("xlogy"),
        "xlogy is only 0 where its first argument is 0. Compute the logarithm from the logits (F.log_softmax, F.logsigmoid).",
    ),
    Entry(
        "log_of_zero",
        _ops("nll_loss_forward nll_loss2d_forward"),
        "The target class has probability 0: its logit is masked with -inf. Leave the target out of the mask, or such samples "
        "out of the loss.",
    ),
    Entry(
        "log_of_zero",
        _ops("_linalg_slogdet"),
        "The matrix is singular, so its determinant is 0. Add a small multiple of the identity to it.",
    ),
    Entry(
        "log_of_zero",
        (),
        "The logarithm in `{line}` was given an exact 0. Compute it from the logits: F.log_softmax (NG101), F.cross_entropy "
        "(NG102), F.logsigmoid (NG104) or torch.logsumexp (NG103).",
    ),
    Entry(
        "division_by_zero",
        _ops("native_layer_norm native_group_norm native_batch_norm _native_batch_norm_legit _fused_rms_norm"),
        "The variance that {op} divides by is 0, and its eps is too small to help. Give it an eps such as 1e-5.",
    ),
    Entry(
        "division_by_zero",
        _ops("addcdiv"),
        "The optimizer divides by the square root of a second moment that is 0. Give it an eps such as 1e-8.",
        "optimizer",
    ),
    Entry(
        "division_by_zero",
        (),
        "The divisor in `{line}` is an exact 0. Bound it away from 0 before the division (clamp(min=eps)), or compute ratios "
        "of exponentials as F.softmax (NG201) or F.sigmoid (NG202).",
    ),
    Entry(
        "overflow",
        _ops("exp exp2 expm1 cosh sinh"),
        "{op} was given numbers up to {largest}, which is past what {dtype} can hold. Subtract the maximum first: "
        "torch.logsumexp (NG103), F.softmax (NG201), F.softplus (NG105), or clamp the argument (a log-variance).",
    ),
    Entry(
        "overflow",
        _ops("_to_copy copy"),
        "Numbers up to {largest} do not fit into the narrower dtype. Keep this part in float32 "
        "(torch.autocast(..., enabled=False)), or use bfloat16.",
    ),
    Entry(
        "overflow",
        (),
        "Finite inputs of {op} (up to {largest}) gave a result past the largest {dtype}. Normalise the inputs, clip the "
        "gradients, or lower the learning rate.",
    ),
    Entry(
        "invalid_domain",
        _ops("_ctc_loss"),
        "The target of a sequence is longer than its input allows, so no alignment exists. Drop such samples, or pass "
        "zero_infinity=True.",
    ),
    Entry(
        "invalid_domain",
        _ops("linalg_inv_ex _linalg_solve_ex linalg_lu_solve"),
        "The matrix is singular. Add a small multiple of the identity to it, or use torch.linalg.pinv.",
    ),
    Entry(
        "invalid_domain",
        _ops("mul add sub"),
        "An infinity that was put there on purpose met 0 or another infinity in `{line}`. Use torch.where or masked_fill "
        "instead of arithmetic with infinite masks.",
    ),
    Entry(
        "invalid_domain",
        (*_LOGS, *_ROOTS, *_ops("pow")),
        "The argument of {op} in `{line}` lies outside its domain. Clamp it to a small positive number, or compute it so "
        "that it cannot be negative.",
    ),
    Entry(
        "invalid_domain",
        _ops("acos asin atanh acosh erfinv logit"),
        "The argument of {op} lies outside its domain or at its end. Clamp it to just inside, such as "
        "clamp(-1 + 1e-6, 1 - 1e-6).",
    ),
    Entry(
        "invalid_domain",
        (),
        "The argument of {op} in `{line}` lies outside its domain or at a pole. Clamp it, or reparameterise.",
    ),
    Entry(
        "singular_gradient",
        (*_ROOTS, *_ops("pow linalg_vector_norm norm _cdist_forward")),
        "The derivative of {op} is infinite where its argument is 0. Add the epsilon inside: torch.sqrt(x + eps).",
        "backward",
    ),
    Entry(
        "singular_gradient",
        _ops("_linalg_eigh linalg_eigh _linalg_svd linalg_svd linalg_eig"),
        "The derivative of {op} divides by differences of eigenvalues (or singular values), and two of them are equal. Use "
        "only the values, or separate them by a little noise.",
        "backward",
    ),
    Entry(
        "singular_gradient",
        (),
        "The derivative of {op} in `{line}` is infinite at this argument. Keep the argument away from there, with an epsilon "
        "inside the function and not after it.",
    ),
    Entry(
        "masked_branch",
        (),
        "The result of {op} in `{line}` is masked out, but its gradient there is 0 * inf (the where trap, NG401). Make the "
        "argument safe with another torch.where before it.",
    ),
    Entry(
        "fully_masked",
        (),
        "A row is masked altogether, so {op} was given nothing but infinities. Leave such rows out, or keep one entry of each "
        "unmasked.",
    ),
    Entry(
        "empty_reduction",
        _ops("nll_loss_forward nll_loss2d_forward"),
        "All targets are ignored, so the mean has no elements. Skip such batches, or use reduction='sum' and divide by "
        "max(count, 1).",
    ),
    Entry(
        "empty_reduction",
        _ops("var std var_mean std_mean"),
        "The variance of a single element is 0 / 0. Use correction=0 (unbiased=False), or leave out groups of one.",
    ),
    Entry(
        "empty_reduction",
        (),
        "The mean of nothing is NaN. Check `{line}` for an empty selection first (no positives, no targets).",
    ),
    Entry(
        "unknown",
        (),
        "`{line}` gave something non-finite that its inputs do not explain. Look for a NaN or an infinity in the source.",
    ),
    Entry(
        "transient",
        (),
        "A second run of the same step came out finite. Suspect the hardware, or code with state or random numbers of its own.",
    ),
)
