"""Twins: one dimension, one keepdim or one in-place edit away from an unstable form, and something else."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from forms.inputs import TARGET, free, randn, scores
from forms.registry import Family

# Square, so that a wrong dimension or a lost keepdim still broadcasts.
SQUARE = free(lambda: (randn(4, 4),), lambda: (randn(4, 4) * 60,), large=lambda: (randn(4, 4) * 400,))
family = Family("twins", SQUARE)
ROWS = torch.arange(4)
NOISE = torch.rand(4, 4, generator=torch.Generator().manual_seed(1))
TWINS = {
    # Dimensions and keepdims.
    ("total_without_keepdim", "textbook"): lambda x: torch.log(x.exp() / x.exp().sum(1)),
    ("total_without_keepdim_divided_in_place", "divided_in_place"): lambda x: torch.log(
        (x.exp() * 1.0).div_(x.exp().sum(1))
    ),
    ("total_of_columns_transposed", "textbook"): lambda x: torch.log(x.exp() / x.exp().sum(0, keepdim=True).T),
    ("total_of_columns", "textbook"): lambda x: torch.log(x.exp() / x.exp().sum(0, keepdim=True))[ROWS, TARGET],
    ("total_of_everything", "textbook"): lambda x: torch.log(x.exp() / x.exp().sum()),
    ("shift_without_keepdim", "shifted_by_max_values"): lambda x: torch.log(
        torch.exp(x - x.max(1).values) / torch.exp(x - x.max(1).values).sum(1, keepdim=True)
    ),
    ("shift_of_columns", "shifted_by_max_values"): lambda x: torch.log(torch.exp(x - x.amax(0)).sum(1)) + x.amax(1),
    ("unsqueezed_at_the_front", "unsqueezed_total"): lambda x: torch.log(x.exp() / x.exp().sum(1).unsqueeze(0)),
    ("viewed_as_a_row", "viewed_total"): lambda x: torch.log(x.exp() / x.exp().sum(1).view(1, -1)),
    ("softmax_over_samples", "functional_softmax"): lambda x: torch.log(F.softmax(x, 0)[ROWS, TARGET]),
    ("softmax_of_the_transposed", "transposed_module_softmax"): lambda x: torch.log(
        torch.softmax(x.T, 1)[ROWS, TARGET]
    ),
    ("marginal_over_classes", "batch_marginal"): lambda x: torch.log(torch.softmax(x, 0).mean(1)),
    ("summed_over_the_other_dim", "total_torch"): lambda x: torch.log(x.exp().sum(0)) - x.logsumexp(1),
    ("normalised_over_columns", "normalized_by_l1"): lambda x: torch.log(F.normalize(x.exp(), p=1, dim=0)),
    ("cumsum_over_samples", "log_of_cumsum"): lambda x: torch.log(torch.softmax(x, 1).cumsum(0)),
    ("picked_transposed", "pick_transposed_index"): lambda x: torch.log(torch.softmax(x, 1).t()[ROWS, TARGET]),
    ("gathered_along_samples", "pick_gather_method"): lambda x: torch.log(torch.softmax(x, 1).gather(0, TARGET[None])),
    ("indexed_without_rows", "pick_arange_index"): lambda x: torch.log(torch.softmax(x, 1)[:, TARGET]),
    ("indexed_by_samples", "pick_arange_index"): lambda x: torch.log(torch.softmax(x, 1)[TARGET]),
    ("squared_norm_instead", "norm_of_order_one"): lambda x: torch.log(x.exp() / x.exp().norm(dim=1, keepdim=True)),
    ("mean_instead", "textbook"): lambda x: torch.log(x.exp() / x.exp().mean(1, keepdim=True)),
    ("biggest_instead_of_total", "textbook"): lambda x: torch.log(x.exp() / x.exp().amax(1, keepdim=True)),
    # Other operands.
    ("total_of_twice", "textbook"): lambda x: torch.log(x.exp() / (2 * x).exp().sum(1, keepdim=True)),
    ("total_of_the_shifted", "shifted_by_max_values"): lambda x: torch.log(
        x.exp() / torch.exp(x - x.amax(1, keepdim=True)).sum(1, keepdim=True)
    ),
    ("total_of_all_but_the_last", "textbook"): lambda x: torch.log(x.exp() / x[:, :-1].exp().sum(1, keepdim=True)),
    ("total_of_rolled_rows", "textbook"): lambda x: torch.log(x.exp() / x.roll(1, 0).exp().sum(1, keepdim=True)),
    ("detached_total", "textbook"): lambda x: torch.log(x.exp() / x.exp().sum(1, keepdim=True).detach()),
    ("detached_numerator", "textbook"): lambda x: torch.log(x.detach().exp() / x.exp().sum(1, keepdim=True)),
    ("shifted_by_a_live_maximum_once", "shifted_by_max_values"): lambda x: torch.log(
        torch.exp(x - x.amax(1, keepdim=True)).sum(1)
    ),
    ("two_minus", "unlikelihood"): lambda x: torch.log(2 - torch.softmax(x, 1)),
    ("one_plus", "unlikelihood"): lambda x: torch.log(1 + torch.softmax(x, 1)),
    ("one_minus_half", "unlikelihood"): lambda x: torch.log(1 - 0.5 * torch.softmax(x, 1)),
    ("exp_minus_a_tenth", "inverse_softplus"): lambda x: torch.log((x.abs() + 1).exp() - 0.1),
    ("one_plus_exp_of_abs", "softplus_log"): lambda x: torch.log(1 + torch.exp(-x.abs())),
    ("two_plus_exp", "softplus_log"): lambda x: torch.log(2 + torch.exp(x)),
    ("one_plus_tanh_of_softmax", "log_one_plus_tanh"): lambda x: torch.log(1 + torch.tanh(torch.softmax(x, 1))),
    ("sum_minus_another_diagonal", "simclr_sum_minus_diag"): lambda x: torch.log(x.exp().sum(1) - 0.5 * x.exp().diag()),
    ("sum_minus_diagonal_of_columns", "simclr_sum_minus_diag"): lambda x: torch.log(x.exp().sum(0) - x.exp().diag()),
    ("sum_plus_diagonal", "simclr_sum_minus_diag"): lambda x: torch.log(x.exp().sum(1) + x.exp().diag()),
    ("power_that_is_no_root", "renyi_of_some_classes"): lambda x: torch.log(torch.softmax(x, 1) ** 1.5),
    ("exponential_of_a_softmax", "textbook"): lambda x: torch.log(torch.softmax(x, 1).exp().sum(1)),
    ("softmax_of_a_softmax", "functional_softmax"): lambda x: torch.log(torch.softmax(torch.softmax(x, 1), 1)),
    ("softmax_of_an_exponential", "functional_softmax"): lambda x: torch.log(torch.softmax(x.clamp(max=4).exp(), 1)),
    ("log_twice", "functional_softmax"): lambda x: torch.log(-torch.log(torch.softmax(x, 1))),
    ("epsilon_times_two", "added_by_torch_add__drop"): lambda x: torch.log(
        torch.add(torch.softmax(x, 1), 1e-3, alpha=2)
    ),
    ("clamped_from_above", "clamped_min__drop"): lambda x: torch.log(torch.softmax(x, 1).clamp(max=0.3)),
    ("clamped_to_a_tensor", "clamped_min__drop"): lambda x: torch.log(torch.softmax(x, 1).clamp(min=torch.tensor(0.1))),
    ("clamped_in_exponential_space", "clamped_total"): lambda x: torch.log(x.exp().clamp(0.5, 20).sum(1)),
    ("masked_by_another_mask", "masked_total_by_product"): lambda x: torch.log(
        (x.exp() * torch.tensor([1, 0, 1, 2])).sum(1) / (x.exp() * torch.tensor([1, 1, 0, 1])).sum(1)
    ),
    ("masked_with_minus_one_plus_two", "masked_total_by_product"): lambda x: torch.log(
        2 * x.exp().sum(1) + (x.exp() * torch.tensor([1, -1, 1, -1])).sum(1)
    ),
    ("floored_division", "textbook"): lambda x: torch.log(
        1 + torch.div(x.exp(), x.exp().sum(1, keepdim=True) / 10, rounding_mode="floor")
    ),
    ("times_noise", "weighted_total"): lambda x: torch.log(torch.softmax(x, 1) * NOISE.to(x) + 0.1),
    ("divided_by_an_unknown", "relative_to_chance"): lambda x: torch.log(torch.softmax(x, 1) / (1 + NOISE.to(x))),
    ("renormalised_by_another", "relative_to_chance"): lambda x: torch.log(
        torch.softmax(x, 1) * NOISE.to(x) / NOISE.to(x).sum(1, keepdim=True)
    ),
    ("product_of_positives", "log_of_product"): lambda x: torch.log((x.abs() + 1).prod(1)),
    # In-place edits in between.
    ("edited_numerator", "textbook"): lambda x: (
        lambda e: torch.log(e.clone().mul_(torch.arange(1, 5)) / e.sum(1, keepdim=True))
    )(x.exp()),
    ("row_overwritten", "functional_softmax"): lambda x: torch.log(_overwritten(torch.softmax(x, 1).clone())),
    ("column_scaled", "functional_softmax"): lambda x: torch.log(_scaled(torch.softmax(x, 1).clone())),
    ("logits_edited_after", "functional_softmax"): lambda x: _edited_logits(x.clone()),
    ("total_edited", "textbook"): lambda x: _edited_total(x),
    ("epsilon_in_place_then_renormalised", "added_in_place__drop"): lambda x: _renormalised(torch.softmax(x, 1)),
    ("index_edited_after_picking", "pick_arange_index"): lambda x: _edited_index(x),
    ("loop_that_forgets_one", "total_accumulated_from_zero"): lambda x: torch.log(sum(x[:, j].exp() for j in range(3))),
    ("loop_that_counts_one_twice", "total_accumulated_from_zero"): lambda x: torch.log(x.exp().sum(1) + x[:, 0].exp()),
    ("loop_over_the_wrong_dim", "loop_over_classes"): lambda x: torch.log(
        x.exp().diagonal() / sum(x[j].exp() for j in range(4))
    ),
    ("buffer_used_twice", "total_accumulated_in_place"): lambda x: _accumulated_twice(x),
}


def _overwritten(p):
    p[0] = 0.25
    return p


def _scaled(p):
    p[:, 1] *= 0.5
    return p


def _edited_logits(x):
    p = torch.softmax(x, 1)
    x.mul_(2)
    return torch.log(p) + x


def _edited_total(x):
    e = x.exp()
    total = e.sum(1, keepdim=True).clone()
    total[0] = 1.0
    return torch.log(e / total)


def _renormalised(p):
    p = p + 1e-3
    return torch.log(p / p.sum(1, keepdim=True))


def _edited_index(x):
    rows = torch.tensor([0, 1, 2, 3])
    q = torch.softmax(x.detach(), 1)[rows, rows]
    rows.copy_(rows.flip(0))
    return torch.log(q) * x[:, 0]


def _accumulated_twice(x):
    total = torch.zeros(4, dtype=x.dtype)
    for column in x.unbind(1):
        total = total * 0.5
        total += column.exp()
    return torch.log(total)


for (title, of), function in TWINS.items():
    family.twin(of, name=title)(function)

SIGNED = scores("mild extreme saturated")
SIGMOID_TWINS = {
    ("sigmoid_of_double_minus", "log_of_torch_sigmoid"): lambda x: torch.log(torch.sigmoid(x) / torch.sigmoid(2 * x)),
    ("one_minus_another_sigmoid", "bce_by_hand"): lambda x: torch.log(1 - torch.sigmoid(x - 1)) + torch.sigmoid(x),
    ("one_plus_a_sigmoid", "complement_of_torch_sigmoid"): lambda x: torch.log(1 + torch.sigmoid(x)),
    ("sigmoid_minus_a_tenth", "logistic_bin"): lambda x: torch.log(torch.sigmoid(x.abs()) - 0.1),
    ("sum_of_sigmoids", "product_of_sigmoids"): lambda x: torch.log(torch.sigmoid(x).sum()),
    ("reciprocal_of_two_plus_exp", "sigmoid_by_one_over"): lambda x: 1 / (2 + torch.exp(-x)),
    ("sigmoid_scaled_above_one", "scaled_sigmoid"): lambda x: torch.log(1.7159 * torch.sigmoid(x)),
    ("tanh_of_another", "atanh_by_logs"): lambda x: torch.log((1 + torch.tanh(x)) / (1 - 0.5 * torch.tanh(2 * x))),
    ("hard_sigmoid", "log_of_functional_sigmoid"): lambda x: torch.log(F.hardsigmoid(x) + 0.01),
    ("squash_of_a_fraction", "sac_log_one_minus_tanh_squared"): lambda x: torch.log(1 - 0.99 * torch.tanh(x) ** 2),
    ("exp_over_two_plus_exp", "sigmoid_by_exp_over_one_plus"): lambda x: (
        torch.exp(-x.abs()) / (2 + torch.exp(-x.abs()))
    ),
}
for (title, of), function in SIGMOID_TWINS.items():
    family.twin(of, SIGNED, name=title)(function)
