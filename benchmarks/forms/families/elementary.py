"""Elementary functions written out: log cosh, log expm1, where-traps, logaddexp, log of a root, odd bases."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from forms.exact import log1mexp, log_sub, lsm
from forms.inputs import classes, free, randn, scores
from forms.registry import Family

SIGNED = scores("mild extreme")
family = Family("elementary functions", SIGNED)
POSITIVE = free(lambda: (torch.tensor([0.3, 1.0, 2.5, 5.0]),), lambda: (torch.tensor([100.0, 1e-9, 300, 1e-4]),))
NEGATIVE = free(lambda: (-torch.tensor([0.3, 1.0, 2.5, 5.0]),), lambda: (-torch.tensor([1e-9, 1e-10, 20, 100]),))


@family.form(lambda x: x.abs() + F.softplus(-2 * x.abs()) - math.log(2))
def log_cosh(x):
    return torch.log(torch.cosh(x))


@family.form(lambda x: x.abs() + F.softplus(-2 * x.abs()) - math.log(2))
def log_cosh_written_out(x):
    return torch.log((torch.exp(x) + torch.exp(-x)) / 2)


@family.form(lambda x: x + torch.log(-torch.expm1(-x)), POSITIVE)
def inverse_softplus(x):
    return torch.log(torch.exp(x) - 1)


@family.form(lambda x: x + torch.log(-torch.expm1(-x)), POSITIVE)
def inverse_softplus_expm1(x):
    return torch.log(torch.expm1(x))


@family.form(log1mexp, NEGATIVE)
def log_of_one_minus_exp(x):
    return torch.log(1 - torch.exp(x))


@family.form(log1mexp, NEGATIVE)
def log1p_of_minus_exp(x):
    return torch.log1p(-torch.exp(x))


@family.form(log1mexp, NEGATIVE)
def log_of_minus_exp_minus_one(x):
    return torch.log(-(x.exp() - 1))


@family.form(lambda x: x + torch.log(-torch.expm1(-2 * x)) - math.log(2), POSITIVE)
def log_sinh(x):
    return torch.log(torch.sinh(x))


@family.form(F.softplus, scores("mild extreme saturated half"))
def softplus_log(x):
    return torch.log(1 + torch.exp(x))


@family.form(F.softplus, scores("mild extreme half"))
def softplus_log1p(x):
    return torch.log1p(torch.exp(x))


@family.form(lambda x: F.softplus(2 * x) / 2, SIGNED)
def softplus_with_beta(x):
    return torch.log(1 + torch.exp(2 * x)) / 2


@family.form(lambda x: F.softplus(x) - math.log(2))
def shifted_softplus(x):
    return torch.log(0.5 * torch.exp(x) + 0.5)


@family.form(lambda x: torch.where(x > 20, x, F.softplus(x)))
def softplus_with_a_where_trap(x):
    return torch.where(x > 20, x, torch.log(1 + torch.exp(x)))


@family.form(lambda x: x)
def log_of_exp(x):
    return torch.log(torch.exp(x))


@family.form(lambda x: x)
def exp_of_log_of_exp(x):
    return torch.log(torch.exp(torch.log(torch.exp(x))))


@family.form(lambda x: x / 2)
def log_of_root_of_exp(x):
    return torch.log(torch.sqrt(torch.exp(x)))


@family.form(lambda x: 3 * x)
def log_of_cube_of_exp(x):
    return torch.log(torch.exp(x) ** 3)


@family.form(lambda x: -x)
def log_of_reciprocal_of_exp(x):
    return torch.log(1 / torch.exp(x))


@family.form(lambda x: x * math.log(2), scores("mild extreme"))
def log_of_exp2(x):
    return torch.log(torch.exp2(x))


@family.form(lambda x: x * math.log(2))
def log_of_two_to_the_power(x):
    return torch.log(2**x)


@family.form(lambda x: x * math.log(10))
def log_of_ten_to_the_power(x):
    return torch.log(torch.pow(10.0, x))


@family.form(lambda x: x / math.log(2))
def log2_of_exp(x):
    return torch.log2(torch.exp(x))


@family.form(lambda x: x)
def log1p_of_expm1(x):
    return torch.log1p(torch.expm1(x))


@family.form(lambda x: x + 0.5 * math.log(3))
def log_of_scaled_exp(x):
    return torch.log(math.sqrt(3) * torch.exp(x))


@family.form(lambda x: -(x**2))
def log_of_a_gaussian_kernel(x):
    return torch.log(torch.exp(-(x**2)))


@family.form(lambda x: F.logsigmoid(x) - F.logsigmoid(-x) - x + F.softplus(x))
def nested_softplus(x):
    return torch.log(1 + torch.exp(torch.log(torch.exp(x))))


@family.form(lambda x: torch.logaddexp(x, 2 * x - 1))
def logaddexp_by_hand(x):
    return torch.log(torch.exp(x) + torch.exp(2 * x - 1))


@family.twin("logaddexp_by_hand", stable=lambda x: torch.logaddexp(x, 2 * x - 1))
def logaddexp_shifted_by_maximum(x):
    top = torch.maximum(x, 2 * x - 1)
    return torch.log(torch.exp(x - top) + torch.exp(2 * x - 1 - top)) + top


@family.form(
    lambda a, b: log_sub(a, b),
    free(
        lambda: (torch.tensor([1.0, 2]), torch.tensor([0.0, 1.5])),
        lambda: (torch.tensor([100.0, 20]), torch.tensor([99.0, 19.99])),
    ),
)
def log_of_a_difference(a, b):
    return torch.log(a.exp() - b.exp())


@family.form(lambda x: F.logsigmoid(-x) * 2 + x, scores("mild extreme"))
def log_density_of_a_logistic(x):
    e = torch.exp(-x)
    return torch.log(e / (1 + e) ** 2)


@family.form(lambda x: -x - torch.exp(-x), free(lambda: (randn(5),), lambda: (torch.tensor([-5.0, 95, 120, -3, 1]),)))
def log_density_of_a_gumbel(x):
    return torch.log(torch.exp(-(x + torch.exp(-x))))


# Traps of torch.where and of roots, without any exponential.
ZEROS = free(lambda: (torch.tensor([0.5, 1.0, 2.0, 0.1]),), lambda: (torch.tensor([0.5, 0.0, 2.0, 0.0]),))


@family.form(lambda x: torch.where(x > 0, torch.log(torch.where(x > 0, x, 1.0)), 0.0), ZEROS)
def where_log(x):
    return torch.where(x > 0, torch.log(x), torch.zeros_like(x))


@family.form(lambda x: torch.where(x > 0, torch.log(torch.where(x > 0, x, 1.0)), 0.0), ZEROS)
def where_log_scalar(x):
    return torch.where(x > 0, x.log(), 0.0)


@family.form(lambda x: torch.where(x > 0, x * torch.log(torch.where(x > 0, x, 1.0)), 0.0), ZEROS)
def where_x_log_x(x):
    return torch.where(x > 0, x * torch.log(x), torch.zeros_like(x))


@family.form(lambda x: torch.where(x == 0, 0.0, 1 / torch.where(x == 0, 1.0, x)), ZEROS)
def where_reciprocal(x):
    return torch.where(x == 0, torch.zeros_like(x), 1 / x)


@family.form(lambda x: torch.where(x > 0, torch.sqrt(torch.where(x > 0, x, 1.0)), 0.0), ZEROS)
def where_sqrt(x):
    return torch.where(x > 0, torch.sqrt(x), torch.zeros_like(x))


@family.form(lambda x: torch.where(x > 20, x, F.softplus(x)), SIGNED)
def where_log1p_of_exp(x):
    return torch.where(x > 20, x, torch.log1p(x.exp()))


@family.form(lambda x: torch.where(x > 0, x, torch.expm1(torch.where(x > 0, 0.0, x))))
def elu_by_hand(x):
    return torch.where(x > 0, x, torch.exp(x) - 1)


@family.form(torch.sigmoid)
def sigmoid_in_two_branches(x):
    return torch.where(x >= 0, 1 / (1 + torch.exp(-x)), torch.exp(x) / (1 + torch.exp(x)))


@family.form(lambda x: torch.where(lsm(x) > -5, lsm(x), 0.0), classes("mild extreme masked", target=False))
def where_probability_is_large(x):
    p = torch.softmax(x, 1)
    return torch.where(p > math.exp(-5), torch.log(p), torch.zeros_like(p))


@family.form(
    lambda x: lsm(x).exp() * torch.where(lsm(x) == -math.inf, 0.0, lsm(x)), classes("mild extreme masked", target=False)
)
def xlogy_of_softmax(x):
    p = F.softmax(x, 1)
    return torch.xlogy(p, p)


@family.form(
    lambda x: -(lsm(x).exp() * torch.where(lsm(x) == -math.inf, 0.0, lsm(x))),
    classes("mild extreme masked", target=False),
)
def entr_of_softmax(x):
    return torch.special.entr(F.softmax(x, 1))


@family.form(
    lambda x: lsm(x).exp() * torch.where(lsm(x) == -math.inf, 0.0, lsm(x)), classes("mild extreme masked", target=False)
)
def masked_fill_after_log(x):
    p = F.softmax(x, 1)
    return p * torch.log(p).masked_fill(p == 0, 0.0)
