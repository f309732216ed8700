"""What is masked out, or not there."""

from __future__ import annotations

from nanguard.diagnosis.table.entry import Entry, ops

__all__ = ["ABSENCES"]


ABSENCES: tuple[Entry, ...] = (
    Entry(
        "masked_branch",
        (),
        "The result of {op} in `{line}` is masked out, but its gradient there is 0 * inf (the where trap, NG401). Make the "
        "argument safe with another torch.where before it.",
    ),
    Entry(
        "fully_masked",
        ops("sub"),
        "A row is masked altogether, so what it is normalised by is infinite, too: `{line}` subtracts one from the other. "
        "Leave such rows out, or keep one entry of each unmasked.",
    ),
    Entry(
        "fully_masked",
        ops("mm addmm bmm baddbmm mul add convolution native_layer_norm native_group_norm native_batch_norm"),
        "A row is masked altogether, so its logsumexp is -inf, and `{line}` makes NaN of that. Leave such rows out, or keep "
        "one entry of each unmasked.",
    ),
    Entry(
        "fully_masked",
        (),
        "A row is masked altogether, so {op} was given nothing but infinities. Leave such rows out, or keep one entry of each "
        "unmasked.",
    ),
    Entry(
        "empty_reduction",
        ops("nll_loss_forward nll_loss2d_forward"),
        "All targets are ignored, so the mean has no elements. Skip such batches, or use reduction='sum' and divide by "
        "max(count, 1).",
    ),
    Entry(
        "empty_reduction",
        ops("var std var_mean std_mean"),
        "The variance of a single element is 0 / 0. Use correction=0 (unbiased=False), or leave out groups of one.",
    ),
    Entry(
        "empty_reduction",
        (),
        "The mean of nothing is NaN. Check `{line}` for an empty selection first (no positives, no targets).",
    ),
)
