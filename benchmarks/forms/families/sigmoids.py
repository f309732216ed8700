"""Sigmoid, then log: complements, odds, pairs, bins."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forms.exact import log1mexp, log_add
from forms.inputs import free, inputs, scores, select
from forms.registry import Family

family = Family("sigmoid, then log", scores())


SIGMOIDS = {
    "torch_sigmoid": torch.sigmoid,
    "method_sigmoid": lambda x: x.sigmoid(),
    "functional_sigmoid": F.sigmoid,
    "special_expit": torch.special.expit,
    "module_sigmoid": nn.Sigmoid(),
    "one_over_one_plus_exp": lambda x: 1 / (1 + torch.exp(-x)),
    "exp_over_one_plus_exp": lambda x: torch.exp(x) / (1 + torch.exp(x)),
    "shared_exp_over_exp_plus_one": lambda x: (lambda e: e / (e + 1.0))(x.exp()),
    "reciprocal_of_one_plus_exp": lambda x: torch.reciprocal(1.0 + (-x).exp()),
    "power_minus_one": lambda x: (1 + torch.exp(-x)) ** -1,
    "half_of_tanh": lambda x: 0.5 * (1 + torch.tanh(x / 2)),
    "half_of_tanh_plus_one": lambda x: (torch.tanh(0.5 * x) + 1) / 2,
    "two_column_softmax": lambda x: torch.softmax(torch.stack([x, torch.zeros_like(x)], 1), 1)[:, 0],
    "in_place_sigmoid": lambda x: (x * 1.0).sigmoid_(),
    "in_place_exp": lambda x: 1 / (1 + (-x).exp_()),
    "ratio_of_two_exponentials": lambda x: torch.exp(x / 2) / (torch.exp(x / 2) + torch.exp(-x / 2)),
}
for title, sigmoid in SIGMOIDS.items():
    kinds = "mild extreme saturated" if title.startswith(("half", "ratio")) else "mild extreme saturated half bfloat"
    family.form(lambda x: F.logsigmoid(x), scores(kinds), name=f"log_of_{title}")(lambda x, s=sigmoid: torch.log(s(x)))
    family.form(lambda x: F.logsigmoid(-x), scores("mild extreme saturated"), name=f"complement_of_{title}")(
        lambda x, s=sigmoid: torch.log(1 - s(x))
    )

COMPLEMENTS = {
    "log1p_of_minus_sigmoid": lambda x: torch.log1p(-torch.sigmoid(x)),
    "rsub": lambda x: torch.log(torch.rsub(torch.sigmoid(x), 1)),
    "sub_with_ones": lambda x: torch.log(torch.ones_like(x) - torch.sigmoid(x)),
    "minus_plus_one": lambda x: torch.log(-torch.sigmoid(x) + 1),
    "tensor_one": lambda x: torch.log(torch.tensor(1.0) - torch.sigmoid(x)),
    "in_place_rsub": lambda x: torch.sigmoid(x).neg().add_(1.0).log(),
    "two_columns": lambda x: torch.stack([1 - x.sigmoid(), x.sigmoid()], -1).log()[..., 0],
    "where_target": lambda x: torch.where(x > 5, 1 - x.sigmoid(), 1 - torch.sigmoid(x)).log(),
    "product": lambda x: torch.log(torch.sigmoid(x) * (1 - torch.sigmoid(x))) - torch.log(torch.sigmoid(x)),
    "log2": lambda x: torch.log2(1 - torch.sigmoid(x)) * math.log(2),
    "log10_of_negated": lambda x: torch.log10(torch.sigmoid(-x)) * math.log(10),
    "log1p_of_exp": lambda x: -torch.log1p(torch.exp(x)),
    "log_of_one_plus_exp": lambda x: -torch.log(1 + torch.exp(x)),
    "log_of_exp_plus_one": lambda x: -(x.exp() + 1).log(),
    "log_of_reciprocal": lambda x: torch.log(1 / (1 + x.exp())),
    "where_softplus": lambda x: -torch.where(x > 20, x, torch.log1p(torch.exp(x))),
    "where_softplus_log": lambda x: -torch.where(x > 20, x, torch.log(1 + x.exp())),
    "logaddexp_spelt_out": lambda x: -torch.log(torch.exp(torch.zeros_like(x)) + torch.exp(x)),
}
for title, complement in COMPLEMENTS.items():
    family.form(lambda x: F.logsigmoid(-x), scores("mild extreme saturated"), name=f"complement_{title}")(complement)


@family.form(lambda x: x)
def logit_of_sigmoid(x):
    p = torch.sigmoid(x)
    return torch.log(p / (1 - p))


@family.form(lambda x: x, scores("mild extreme saturated"))
def torch_logit_of_sigmoid(x):
    return torch.logit(torch.sigmoid(x))


@family.form(lambda x: x, scores("mild extreme saturated"))
def log_minus_log1p(x):
    p = torch.sigmoid(x)
    return torch.log(p) - torch.log1p(-p)


@family.form(lambda x: F.logsigmoid(x[0] - x[1:]))
def bpr(x):
    return torch.log(torch.sigmoid(x[0] - x[1:]))


@family.form(lambda x: -F.logsigmoid(x[1::2] - x[::2]).mean(), scores("mild extreme saturated"))
def bpr_mean(x):
    positive, negative = x[::2], x[1::2]
    return -(negative - positive).sigmoid().log().mean()


@family.form(lambda x: -(F.logsigmoid(x[:3]).mean() + F.logsigmoid(-x[3:]).mean()), scores("mild extreme saturated"))
def skip_gram(x):
    return -(torch.log(torch.sigmoid(x[:3])).mean() + torch.log(torch.sigmoid(-x[3:])).mean())


@family.form(lambda x: -F.logsigmoid(x) - F.logsigmoid(-x), scores("mild extreme saturated half"))
def vanilla_gan(x):
    real, fake = torch.sigmoid(x), torch.sigmoid(x)
    return -(torch.log(real) + torch.log(1.0 - fake))


@family.form(lambda x: F.logsigmoid(x) - math.log(2), scores("mild extreme saturated"))
def scaled_sigmoid(x):
    return torch.log(0.5 * torch.sigmoid(x))


@family.form(lambda x: F.logsigmoid(3 * x) * 2, scores("mild extreme saturated"))
def squared_sharp_sigmoid(x):
    return torch.log(torch.sigmoid(3 * x).pow(2))


@family.form(lambda x: F.logsigmoid(x).sum(), scores("mild extreme"))
def product_of_sigmoids(x):
    return torch.log(torch.prod(torch.sigmoid(x)))


@family.form(lambda x: F.logsigmoid(-x).sum(), scores("mild extreme saturated"))
def nobody_fires(x):
    return torch.log((1 - torch.sigmoid(x)).prod())


@family.form(
    lambda x: log1mexp(F.logsigmoid(-x).sum()),
    free(
        lambda: (torch.tensor([0.3, -1.0, 0.5]),),
        lambda: (torch.tensor([-30.0, -40.0, -35.0]),),
        far=lambda: (torch.tensor([-130.0, -140.0, -150.0]),),
    ),
)
def noisy_or(x):
    return torch.log(1 - torch.prod(1 - torch.sigmoid(x)))


@family.form(
    lambda a, b: log_add(F.logsigmoid(a), F.logsigmoid(b)) - math.log(2),
    free(
        lambda: (torch.tensor([0.5, 1.0]), torch.tensor([-0.5, 2.0])),
        lambda: (torch.tensor([-120.0, -300]), torch.tensor([-130.0, -200])),
    ),
)
def ensemble_of_two_sigmoids(a, b):
    return torch.log((torch.sigmoid(a) + torch.sigmoid(b)) / 2)


# sigma(a) - sigma(b): logistic bins, ordinal regression.
BINS = inputs(
    mild=lambda: (torch.tensor([0.5, -1.0, 2.0]), torch.tensor([-0.5, -1.5, 1.8])),
    extreme=lambda: (torch.tensor([40.0, -140.0, 120.0]), torch.tensor([38.0, -141.0, 110.0])),
    saturated=lambda: (torch.tensor([19.0, 22.0, -20]), torch.tensor([18.0, 21.0, -22])),
)


def log_bin(a: Tensor, b: Tensor) -> Tensor:
    return F.logsigmoid(a) + F.logsigmoid(-b) + log1mexp(b - a)


@family.form(log_bin, BINS)
def logistic_bin(a, b):
    return torch.log(torch.sigmoid(a) - torch.sigmoid(b))


@family.form(
    lambda a, b: torch.maximum(log_bin(a, b), torch.tensor(math.log(1e-12), dtype=a.dtype)),
    select(BINS, "mild extreme=saturated large=extreme"),
)
def logistic_bin_clamped(a, b):
    return torch.log(torch.clamp(torch.sigmoid(a) - torch.sigmoid(b), min=1e-12))


@family.form(log_bin, BINS)
def ordinal_difference(a, b):
    cumulative = torch.sigmoid(torch.stack([a, b]))
    return (cumulative[0] - cumulative[1]).log()
