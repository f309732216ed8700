"""Quotients, roots and products of exponentials where no log follows, and attention by hand."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from forms.exact import log_others, lsm
from forms.inputs import classes, free, randn, scores, vector
from forms.registry import Family

ONE = classes("mild extreme masked half bfloat", target=False)
UNMASKED = classes("mild extreme half", target=False)
family = Family("quotients without a log", ONE)


def exact(x):
    return lsm(x).exp()


QUOTIENTS = {
    "sum_keepdim": lambda e: e / e.sum(1, keepdim=True),
    "sum_negative_dim": lambda e: e / torch.sum(e, dim=-1, keepdim=True),
    "unsqueeze": lambda e: e / e.sum(1).unsqueeze(-1),
    "none": lambda e: e / e.sum(1)[:, None],
    "transposed": lambda e: (e.t() / e.sum(1)).t(),
    "div_method": lambda e: e.div(e.sum(1, keepdim=True)),
    "true_divide": lambda e: torch.true_divide(e, e.sum(1, keepdim=True)),
    "mul_reciprocal": lambda e: e * e.sum(1, keepdim=True).reciprocal(),
    "mul_power": lambda e: e * e.sum(1, keepdim=True).pow(-1),
    "expand": lambda e: e / e.sum(1, keepdim=True).expand(4, 5),
    "einsum_rows": lambda e: torch.einsum("ij,i->ij", e, 1 / e.sum(1)),
    "loop_over_rows": lambda e: torch.stack([row / row.sum() for row in e]),
    "in_place": lambda e: (e * 1.0).div_(e.sum(1, keepdim=True)),
}
for title, quotient in QUOTIENTS.items():
    kinds = "mild extreme masked" if title == "einsum_rows" else "mild extreme masked half"
    family.form(exact, classes(kinds, target=False), name=f"softmax_by_{title}")(lambda x, q=quotient: q(torch.exp(x)))


@family.form(lambda x: torch.exp(x - torch.logsumexp(x, 1, keepdim=True).clamp(min=math.log(1e-12))), UNMASKED)
def softmax_by_normalize(x):
    return F.normalize(torch.exp(x), p=1, dim=1)  # whose floor of 1e-12 is part of it


@family.form(exact, UNMASKED)
def one_over_sum_of_differences(x):
    return 1 / torch.exp(x[:, None, :] - x[:, :, None]).sum(-1)


@family.form(lambda x: lsm(x)[:, 0].exp(), UNMASKED)
def share_of_the_first(x):
    return x[:, 0].exp() / x.exp().sum(1)


@family.form(lambda x: lsm(x / 0.1).exp(), free(lambda: (randn(4, 5),), lambda: (randn(4, 5) * 20,)))
def softmax_with_temperature(x):
    e = torch.exp(x / 0.1)
    return e / e.sum(dim=1, keepdim=True)


@family.form(lambda x: lsm(x, 0).exp(), vector("mild extreme low saturated half"))
def weights_of_a_vector(x):
    w = x.exp()
    return w / w.sum()


@family.form(lambda x: 5 * lsm(x).exp(), UNMASKED)
def divided_by_the_mean(x):
    e = x.exp()
    return e / e.mean(1, keepdim=True)


@family.form(lambda x: (lsm(x).exp() * torch.arange(5).to(x)).sum(1), classes("mild extreme masked", target=False))
def soft_argmax(x):
    e = torch.exp(x)
    return (e * torch.arange(5).to(x)).sum(1) / e.sum(1)


@family.form(lambda x: (lsm(x).exp() * torch.arange(5).to(x)).sum(1), classes("mild extreme masked", target=False))
def soft_argmax_by_matmul(x):
    e = torch.exp(x)
    return (e @ torch.arange(5).to(x)) / e.sum(1)


@family.form(
    lambda q, k: lsm(q @ k.T).exp() @ k,
    free(lambda: (randn(4, 3), randn(4, 3, seed=1)), lambda: (randn(4, 3) * 30, randn(4, 3, seed=1) * 30)),
)
def attention_by_hand(q, k):
    e = torch.exp(q @ k.T)
    return (e / e.sum(-1, keepdim=True)) @ k


@family.form(
    lambda q, k: lsm(q @ k.T).exp() @ k,
    free(lambda: (randn(4, 3), randn(4, 3, seed=1)), lambda: (randn(4, 3) * 30, randn(4, 3, seed=1) * 30)),
)
def attention_by_hand_normalised_last(q, k):
    e = torch.exp(q @ k.T)
    return (e @ k) / e.sum(-1, keepdim=True)


@family.form(
    lambda x: lsm(x.tril() + torch.full_like(x, -math.inf).triu(1)).exp(),
    free(lambda: (randn(4, 4),), lambda: (randn(4, 4) * 300,)),
)
def causal_attention_by_hand(x):
    e = torch.exp(x.masked_fill(torch.ones(4, 4).triu(1).bool(), -math.inf))
    return e / e.sum(-1, keepdim=True)


@family.form(
    lambda x: lsm(x.masked_fill(torch.ones(4, 4).triu(1).bool(), -math.inf)).exp(),
    free(lambda: (randn(4, 4),), lambda: (randn(4, 4) * 300,)),
)
def causal_attention_by_multiplication(x):
    e = torch.exp(x) * torch.ones(4, 4).tril().to(x)
    return e / e.sum(-1, keepdim=True)


@family.form(lambda x: torch.stack([lsm(x[[0, 2]], 0), lsm(x[[1, 3]], 0)]).exp(), UNMASKED)
def scatter_softmax(x):
    e, where = x.exp(), torch.tensor([0, 1, 0, 1])
    total = torch.zeros(2, 5, dtype=x.dtype).index_add(0, where, e)
    p = e / total[where]
    return torch.stack([p[[0, 2]], p[[1, 3]]])


@family.twin("flattened_by_root", UNMASKED, stable=lambda x: lsm(2 * x).exp())
def sharpened(x):
    p = F.softmax(x, 1) ** 2
    return p / p.sum(1, keepdim=True)


@family.twin("flattened_by_root", classes("mild extreme", target=False), stable=lambda x: lsm(x / 0.5).exp())
def sharpened_by_temperature(x):
    p = torch.pow(F.softmax(x, 1), 1 / 0.5)
    return p / torch.sum(p, dim=1, keepdim=True)


@family.form(lambda x: lsm(0.5 * x).exp(), classes("mild extreme", target=False))
def flattened_by_root(x):
    p = F.softmax(x, 1).sqrt()
    return p / p.sum(1, keepdim=True)


LOW = free(lambda: (randn(4, 5),), lambda: (torch.tensor([[0.0, -200, -210, -205, -199]]).repeat(4, 1),))


@family.form(lambda x: lsm(x[:, 1:]).exp(), LOW)
def renormalised_without_the_first(x):
    p = F.softmax(x, 1)[:, 1:]
    return p / p.sum(1, keepdim=True)


@family.form(lambda x: lsm(x.masked_fill(torch.tensor([1, 0, 0, 0, 0]).bool(), -math.inf)).exp(), LOW)
def renormalised_with_a_mask(x):
    p = F.softmax(x, 1) * torch.tensor([0, 1, 1, 1, 1]).to(x)
    return p / p.sum(1, keepdim=True)


@family.form(lambda x: lsm(x)[:, 1:].exp() * 0 + torch.exp(lsm(x)[:, 1:] - log_others(x)[:, :1]), LOW)
def renormalised_by_one_minus(x):
    p = F.softmax(x, 1)
    return p[:, 1:] / (1 - p[:, :1])


@family.form(lambda x: torch.exp(lsm(x)[:, 2] - lsm(x)[:, 3]), LOW)
def ratio_of_two_probabilities(x):
    p = F.softmax(x, 1)
    return p[:, 2] / p[:, 3]


@family.form(lambda x: torch.exp(x[0] - x[1]), free(lambda: (randn(2, 4),), lambda: (200 + randn(2, 4),)))
def ratio_of_two_exponentials(x):
    return x[0].exp() / x[1].exp()


@family.form(
    lambda x: torch.exp(x[0] + x[1]),
    free(lambda: (randn(2, 4),), lambda: (torch.tensor([[200.0, -150, 100], [-195, 152, -102]]),)),
)
def product_of_two_exponentials(x):
    return torch.exp(x[0]) * torch.exp(x[1])


SCORES = scores("mild extreme saturated half bfloat")
SIGMOIDS = {
    "exp_over_one_plus": lambda x: x.exp() / (1 + x.exp()),
    "exp_over_plus_one": lambda x: torch.exp(x) / (torch.exp(x) + 1),
    "shared": lambda x: (lambda e: e / (1.0 + e))(torch.exp(x)),
    "one_minus_reciprocal": lambda x: 1 - 1 / (1 + x.exp()),
    "one_over": lambda x: 1 / (1 + torch.exp(-x)),
    "div_call": lambda x: torch.div(torch.ones_like(x), 1 + torch.exp(-x)),
    "two_exponentials": lambda x: torch.exp(x / 2) / (torch.exp(x / 2) + torch.exp(-x / 2)),
    "against_zero": lambda x: torch.exp(x) / (torch.exp(x) + torch.exp(torch.zeros_like(x))),
}
for title, sigmoid in SIGMOIDS.items():
    kinds = "mild extreme saturated" if title == "one_minus_reciprocal" else "mild extreme saturated half"
    family.form(torch.sigmoid, scores(kinds), name=f"sigmoid_by_{title}")(sigmoid)


@family.form(lambda x: x * torch.sigmoid(x), SCORES)
def silu_by_hand(x):
    return x / (1 + torch.exp(-x))


@family.form(lambda x: torch.sigmoid(x) * torch.sigmoid(-x), SCORES)
def derivative_of_a_sigmoid(x):
    e = torch.exp(-x)
    return e / (1 + e) ** 2


@family.form(
    lambda x: torch.exp(x),
    scores("mild saturated") | free(lambda: (randn(5),), lambda: (torch.tensor([20.0, 30, -20, 60, 85]),)),
)
def odds(x):
    p = torch.sigmoid(x)
    return p / (1 - p)


@family.form(torch.tanh, SCORES)
def tanh_by_hand(x):
    return (torch.exp(x) - torch.exp(-x)) / (torch.exp(x) + torch.exp(-x))


@family.form(torch.tanh, SCORES)
def tanh_by_hand_of_twice(x):
    return (torch.exp(2 * x) - 1) / (torch.exp(2 * x) + 1)


@family.form(lambda x: 2 * torch.sigmoid(x) - 1, SCORES)
def bipolar_sigmoid(x):
    return (1 - torch.exp(-x)) / (1 + torch.exp(-x))


@family.form(lambda x: x * torch.tanh(F.softplus(x)), scores("mild extreme saturated"))
def mish_by_hand(x):
    return x * torch.tanh(torch.log(1 + torch.exp(x)))


@family.form(lambda x: torch.exp(x / 2), free(lambda: (randn(5),), lambda: (torch.tensor([120.0, -150, 100, 90, 2]),)))
def root_of_an_exponential(x):
    return torch.sqrt(torch.exp(x))


@family.form(lambda x: torch.exp(-x / 2), free(lambda: (randn(5),), lambda: (torch.tensor([120.0, -150, 100, 90, 2]),)))
def inverse_root_of_a_variance(x):
    return torch.rsqrt(torch.exp(x))


@family.form(
    lambda m, v: m**2 * torch.exp(-v),
    free(lambda: (randn(5), randn(5, seed=1)), lambda: (randn(5), torch.tensor([95.0, 120, -3, 1, 100]))),
)
def gaussian_by_variance(m, v):
    return m**2 / torch.exp(v)


@family.form(lambda x: torch.exp(torch.logsumexp(x, 1) / 2), free(lambda: (randn(4, 5),), lambda: (randn(4, 5) + 100,)))
def root_of_a_total(x):
    return x.exp().sum(1).sqrt()


@family.form(lambda x: torch.exp(lsm(x).sum(1) / 5), UNMASKED)
def geometric_mean_of_probabilities(x):
    return F.softmax(x, 1).prod(1) ** (1 / 5)
