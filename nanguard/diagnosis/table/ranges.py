"""Arguments that are too large, outside the domain, or where the derivative is infinite."""

from __future__ import annotations

from nanguard.diagnosis.table.entry import LOST, SATURATED, Entry, ops

__all__ = ["RANGES"]

_LOGS = ops("log log2 log10")
_ROOTS = ops("sqrt rsqrt")
_BOUNDED = ops("acos asin atanh acosh erfinv logit")

RANGES: tuple[Entry, ...] = (
    Entry(
        "overflow",
        ops("exp exp2 expm1 cosh sinh"),
        "{op} was given numbers up to {largest}, which is past what {dtype} can hold. Subtract the maximum first: "
        "torch.logsumexp (NG103), F.softmax (NG201), F.softplus (NG105), or clamp the argument (a log-variance).",
    ),
    Entry(
        "overflow",
        ops("_to_copy copy"),
        "Numbers up to {largest} do not fit into the narrower dtype. Keep this part in float32 "
        "(torch.autocast(..., enabled=False)), or use bfloat16.",
    ),
    Entry(
        "overflow",
        (),
        "In the optimizer {setting}, so that its update is not finite. Look at the schedule and at what sets this value.",
        "optimizer",
        ("setting",),
    ),
    Entry(
        "overflow",
        (),
        "Finite inputs of {op} (up to {largest}) gave a result past the largest {dtype}. Normalise the inputs, clip the "
        "gradients, or lower the learning rate.",
    ),
    Entry(
        "invalid_domain",
        ops("_ctc_loss"),
        "The target of a sequence is longer than its input allows, so no alignment exists. Drop such samples, or pass "
        "zero_infinity=True.",
    ),
    Entry(
        "invalid_domain",
        ops("linalg_inv_ex _linalg_solve_ex linalg_lu_solve"),
        "The matrix is singular. Add a small multiple of the identity to it, or use torch.linalg.pinv.",
    ),
    Entry(
        "invalid_domain",
        ops("mul add sub"),
        "An infinity that was put there on purpose met 0 or another infinity in `{line}`. Use torch.where or masked_fill "
        "instead of arithmetic with infinite masks.",
    ),
    Entry("invalid_domain", (*_BOUNDED, *ops("log1p rsqrt")), LOST, facts=("lost",)),
    Entry("invalid_domain", ops("log1p"), SATURATED, facts=("squared tanh",)),
    Entry(
        "invalid_domain",
        (),
        "The argument of {op} in `{line}` {weight}, and lies outside its domain whatever the batch. Look at what has made it "
        "so, and bound it where it is used.",
        facts=("weight",),
    ),
    Entry(
        "invalid_domain",
        ops("log1p"),
        "log1p in `{line}` was given an exact -1, of which it takes the logarithm of 0. Bound its argument above -1, such as "
        "clamp(min=-1 + 1e-6).",
        facts=("minus one",),
    ),
    Entry(
        "invalid_domain",
        ops("rsqrt"),
        "rsqrt in `{line}` was given an exact 0, where it is infinite. Add the epsilon inside: torch.rsqrt(x + eps).",
        facts=("zero",),
    ),
    Entry(
        "invalid_domain",
        (*_LOGS, *_ROOTS, *ops("pow")),
        "The argument of {op} in `{line}` lies outside its domain. Clamp it to a small positive number, or compute it so "
        "that it cannot be negative.",
    ),
    Entry(
        "invalid_domain",
        _BOUNDED,
        "The argument of {op} lies outside its domain or at its end. Clamp it to just inside, such as "
        "clamp(-1 + 1e-6, 1 - 1e-6).",
    ),
    Entry(
        "invalid_domain",
        (),
        "The argument of {op} in `{line}` lies outside its domain or at a pole. Clamp it, or reparameterise.",
    ),
    Entry("singular_gradient", (), LOST, "backward", ("lost",)),
    Entry(
        "singular_gradient",
        _ROOTS,
        "The derivative of {op} is infinite where its argument is 0. Add the epsilon inside: torch.{op}(x + eps).",
        "backward",
    ),
    Entry(
        "singular_gradient",
        ops("pow"),
        "The derivative of the power {exponent} is infinite where its base is 0. Add the epsilon inside: "
        "(x + eps) ** {exponent}.",
        "backward",
        ("exponent",),
    ),
    Entry(
        "singular_gradient",
        ops("pow linalg_vector_norm norm _cdist_forward"),
        "The derivative of {op} in `{line}` is infinite where its argument is 0. Add an epsilon inside, to what the power or "
        "the root is taken of.",
        "backward",
    ),
    Entry(
        "singular_gradient",
        ops("_linalg_eigh linalg_eigh _linalg_svd linalg_svd linalg_eig"),
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
)
