"""Logarithms of 0, and divisions by it."""

from __future__ import annotations

from nanguard.diagnosis.table.entry import LOST, SATURATED, Entry, ops

__all__ = ["ZEROS"]

_EXPONENTIALS = ("exponential", "exponentials")

ZEROS: tuple[Entry, ...] = (
    Entry(
        "log_of_zero",
        ops("xlogy special_xlogy"),
        "xlogy is only 0 where its first argument is 0. Compute the logarithm from the logits (F.log_softmax, F.logsigmoid).",
        facts=("softmax", "sigmoid", *_EXPONENTIALS),
    ),
    Entry(
        "log_of_zero",
        ops("xlogy special_xlogy"),
        "xlogy is only 0 where its first argument is 0, and the second is 0 where the first is not. Bound the second away from "
        "0, such as clamp(min=eps).",
    ),
    Entry(
        "log_of_zero",
        ops("nll_loss_forward nll_loss2d_forward"),
        "The target class has probability 0: its logit is masked with -inf. Leave the target out of the mask, or such samples "
        "out of the loss.",
    ),
    Entry(
        "log_of_zero",
        ops("_linalg_slogdet"),
        "The matrix is singular, so its determinant is 0. Add a small multiple of the identity to it.",
    ),
    Entry(
        "log_of_zero",
        (),
        "A row is masked altogether, so the sum whose logarithm `{line}` takes is 0. Leave such rows out, or keep one entry of "
        "each unmasked.",
        facts=("masked row",),
    ),
    Entry("log_of_zero", (), LOST, facts=("lost",)),
    Entry("log_of_zero", (), SATURATED, facts=("one minus squared tanh",)),
    Entry(
        "log_of_zero",
        (),
        "The logarithm in `{line}` was given an exact 0. Compute it from the logits: F.log_softmax (NG101), F.cross_entropy "
        "(NG102) or torch.logsumexp (NG103).",
        facts=("softmax", "exponentials"),
    ),
    Entry(
        "log_of_zero",
        (),
        "The logarithm in `{line}` was given an exact 0. Compute it from the logits: F.logsigmoid (NG104) or "
        "F.binary_cross_entropy_with_logits.",
        facts=("sigmoid",),
    ),
    Entry(
        "log_of_zero",
        (),
        "The logarithm in `{line}` was given an exp that is an exact 0. Use the argument of exp itself, and bound it where it "
        "is the logarithm of a scale (clamp(min=-10)).",
        facts=("exponential",),
    ),
    Entry(
        "log_of_zero",
        (),
        "In `{line}` an exp has come so close to what it is subtracted from, or what is subtracted from it, that the logarithm "
        "was given an exact 0. Use torch.expm1 (NG111), and keep its argument away from 0.",
        facts=("shifted exponential",),
    ),
    Entry(
        "log_of_zero",
        (),
        "What `{line}` takes the logarithm of {weight}, and holds an exact 0 whatever the batch. Look at what has made it 0, "
        "and bound it where it is used, such as clamp(min=eps).",
        facts=("weight",),
    ),
    Entry(
        "log_of_zero",
        (),
        "The logarithm in `{line}` was given an exact 0. Bound its argument away from 0 before it, such as clamp(min=eps).",
    ),
    Entry(
        "division_by_zero",
        ops("native_layer_norm native_group_norm native_batch_norm _native_batch_norm_legit _fused_rms_norm"),
        "The variance that {op} divides by is 0, and its eps is too small to help. Give it an eps such as 1e-5.",
    ),
    Entry(
        "division_by_zero",
        ops("addcdiv"),
        "The optimizer divides by the square root of a second moment that is 0. Give it an eps such as 1e-8.",
        "optimizer",
    ),
    Entry(
        "division_by_zero",
        (),
        "A row is masked altogether, so the sum that `{line}` divides by is 0. Leave such rows out, or keep one entry of each "
        "unmasked.",
        facts=("masked row",),
    ),
    Entry("division_by_zero", (), LOST, facts=("lost",)),
    Entry(
        "division_by_zero",
        (),
        "The divisor in `{line}` {weight}, and is 0 whatever the batch. Look at what has made it 0, and bound the divisor away "
        "from 0 (clamp(min=eps)).",
        facts=("weight",),
    ),
    Entry(
        "division_by_zero",
        ops("pow"),
        "An exact 0 is raised to the power {exponent} in `{line}`, which divides by it. Bound it away from 0 before, such as "
        "clamp(min=eps).",
        facts=("exponent",),
    ),
    Entry(
        "division_by_zero",
        (),
        "The divisor in `{line}` is an exact 0. Bound it away from 0 before the division (clamp(min=eps)), or compute ratios "
        "of exponentials as F.softmax (NG201) or F.sigmoid (NG202).",
        facts=_EXPONENTIALS,
    ),
    Entry(
        "division_by_zero",
        (),
        "The divisor in `{line}` is an exact 0. Bound it away from 0 before the division, such as clamp(min=eps).",
    ),
)
