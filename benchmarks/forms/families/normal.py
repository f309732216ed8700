"""The normal distribution function: probit models, censored and truncated observations, bins."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch.distributions import Normal
from torch.special import log_ndtr

from forms.exact import log1mexp, log_add
from forms.inputs import binary, free
from forms.registry import Family

MILD = torch.tensor([1.2, -0.7, 0.3, 2.2, -1.9, 0.0])
EXTREME = torch.tensor([9.0, -9, 14, -40, 300, -1e4])
SCORES = free(lambda: (MILD.clone(),), lambda: (EXTREME.clone(),), tails=lambda: (torch.linspace(-12, 12, 25),))
family = Family("normal distribution functions", SCORES)
LABELLED = binary("mild extreme saturated")

WAYS = {
    "erf": lambda x: torch.log(0.5 * (1 + torch.erf(x / 2**0.5))),
    "erf_halved": lambda x: ((torch.erf(x / math.sqrt(2.0)) + 1) / 2).log(),
    "two_halves": lambda x: torch.log(0.5 + 0.5 * torch.special.erf(x / math.sqrt(2))),
    "erfc": lambda x: torch.log(0.5 * torch.erfc(-x / math.sqrt(2))),
    "ndtr": lambda x: torch.special.ndtr(x).log(),
    "module": lambda x: torch.log(Normal(0.0, 1.0).cdf(x)),
    "survival": lambda x: torch.log(1 - Normal(0.0, 1.0).cdf(-x)),
    "log1p": lambda x: torch.log1p(-torch.special.ndtr(-x)),
    "minus_erf": lambda x: torch.log(1 - torch.erf(-x / math.sqrt(2))) - math.log(2),
    "half_minus_half": lambda x: torch.log(0.5 - 0.5 * torch.erf(-x / math.sqrt(2))),
}
for title, way in WAYS.items():
    family.form(log_ndtr, name=f"normal_cdf_by_{title}")(way)


@family.form(lambda x, y: -(y * log_ndtr(x) + (1 - y) * log_ndtr(-x)).mean(), LABELLED, constant=(1,))
def probit_regression(x, y):
    p = Normal(0, 1).cdf(x)
    return -(y * torch.log(p) + (1 - y) * torch.log(1 - p)).mean()


@family.form(
    lambda x, eps: log_add(log_ndtr(x), math.log(eps)) if eps else log_ndtr(x),
    free(lambda: (MILD.clone(),), lambda: (torch.tensor([9.0, -5, 14, -5.5, -6, 0]),)),
    epsilon="both",
)
def normal_cdf_with_eps(x, eps=1e-8):
    return torch.log(0.5 * (1 + torch.erf(x / math.sqrt(2))) + eps)


@family.form(
    lambda x: log_ndtr(x + 0.5) + log1mexp(log_ndtr(x - 0.5) - log_ndtr(x + 0.5)),
    free(lambda: (MILD.clone(),), lambda: (torch.tensor([-9.0, -5, -14, -40, -300, 0.25]),)),
)
def normal_bin(x):
    standard = Normal(0, 1)
    return torch.log(standard.cdf(x + 0.5) - standard.cdf(x - 0.5))


@family.form(lambda x: log_ndtr(x) + log_ndtr(-x) + math.log(4))
def one_minus_a_squared_error_function(x):
    return torch.log(1 - torch.erf(x / math.sqrt(2)) ** 2)


@family.twin("normal_cdf_by_erf")
def shifted_error_function(x):
    return torch.log(1.5 + torch.erf(x))


@family.twin("normal_cdf_by_erf")
def another_share_of_the_error_function(x):
    return torch.log(0.6 + 0.5 * torch.erf(x / 2))


around = Family("normal distribution functions elsewhere", SCORES)
CALLS = {
    "gelu_by_erf": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_by_cdf": lambda x: x * Normal(0.0, 1.0).cdf(x),
    "expected_improvement": lambda x: x * Normal(0.0, 1.0).cdf(x) + Normal(0.0, 1.0).log_prob(x).exp(),
    "size_of_the_error_function": lambda x: torch.log(2 - torch.erf(x).abs()),
    "relu_of_probabilities": lambda x: F.relu(torch.sigmoid(x) - 0.5) + F.relu(torch.sigmoid(x)),
    "distance_to_labels": lambda x: ((x > 0).to(x.dtype) - torch.sigmoid(x)).abs().sum(),
    "brier_score": lambda x: (torch.sigmoid(x) - (x > 0).to(x.dtype)).square().mean(),
    "log_of_a_moving_distance": lambda x: torch.log(1 + (torch.sigmoid(x) - x.sin().abs()).abs()),
}
for title, call in CALLS.items():
    around.innocent(name=title)(call)
