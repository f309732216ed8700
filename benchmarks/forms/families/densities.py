"""Hidden states and densities: hidden Markov models, mixture densities, bounds, products of heads."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from forms.exact import (
    cross_entropy,
    log_add,
    lsm,
    picked,
)
from forms.inputs import classes, free, pair, randn, select
from forms.registry import Family

family = Family("mixtures", pair("mild extreme"))
TARGETED = classes("mild extreme")


# Hidden Markov models.
def _forward(x, transitions):
    alpha = lsm(x[0], 0)
    for t in range(1, len(x)):
        alpha = torch.logsumexp(alpha[:, None] + lsm(transitions), 0) + lsm(x[t], 0)
    return torch.logsumexp(alpha, 0)


HMM = free(
    lambda: (randn(4, 3), randn(3, 3, seed=1)),
    lambda: (torch.eye(3)[[0, 1, 1, 2, 0]] * 200, torch.eye(3) * 100),
    long=lambda: (randn(30, 3) * 5, randn(3, 3, seed=1)),
)


@family.form(_forward, HMM)
def hidden_markov_forward(x, transitions):
    emission, transition = F.softmax(x, -1), F.softmax(transitions, -1)
    alpha = emission[0]
    for t in range(1, len(x)):
        alpha = (alpha @ transition) * emission[t]
    return torch.log(alpha.sum())


@family.form(_forward, HMM)
def hidden_markov_forward_with_vectors(x, transitions):
    emission, transition = torch.exp(x.log_softmax(-1)), torch.exp(transitions.log_softmax(-1))
    alpha = emission[0].unsqueeze(0)
    for t in range(1, len(x)):
        alpha = torch.matmul(alpha, transition) * emission[t].unsqueeze(0)
    return alpha.sum(1).log()[0]


@family.form(_forward, HMM)
def hidden_markov_forward_scaled(x, transitions):
    emission, transition = F.softmax(x, -1), F.softmax(transitions, -1)
    alpha = emission[0]
    total = torch.log(alpha.sum())
    alpha = alpha / alpha.sum()
    for t in range(1, len(x)):
        alpha = torch.einsum("i,ij->j", alpha, transition) * emission[t]
        total = total + torch.log(alpha.sum())
        alpha = alpha / alpha.sum()
    return total


# Densities.
def _mdn(x, y):
    weight, mean = lsm(x), x.roll(1, 1)
    return -torch.logsumexp(weight - 0.5 * (y.to(x)[:, None] - mean) ** 2 - 0.5 * math.log(2 * math.pi), 1)


@family.form(_mdn, select(classes(), "mild extreme"))
def mixture_density(x, y):
    weight, mean = F.softmax(x, 1), x.roll(1, 1)
    density = torch.exp(-0.5 * (y.to(x)[:, None] - mean) ** 2) / math.sqrt(2 * math.pi)
    return -torch.log((weight * density).sum(1))


@family.form(_mdn, select(classes(), "mild extreme"))
def mixture_density_by_distribution(x, y):
    normal = torch.distributions.Normal(x.roll(1, 1), torch.ones_like(x))
    return -torch.log(torch.sum(F.softmax(x, 1) * torch.exp(normal.log_prob(y.to(x)[:, None])), dim=1))


SIGMAS = free(
    lambda: (randn(4, 3), randn(4, 3, seed=1), randn(4, 3, seed=2) * 0.5),
    lambda: (randn(4, 3) * 90, randn(4, 3, seed=1) * 30, randn(4, 3, seed=2)),
)


@family.form(
    lambda x, m, s: -torch.logsumexp(lsm(x) - 0.5 * (m * torch.exp(-s)) ** 2 - s - 0.5 * math.log(2 * math.pi), 1),
    SIGMAS,
)
def mixture_density_with_learned_deviations(x, m, s):
    sigma = torch.exp(s)
    density = torch.exp(-0.5 * (m / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
    return -torch.log((F.softmax(x, 1) * density).sum(1))


@family.form(
    lambda x: torch.logsumexp(-0.5 * x**2, 1) - math.log(5) - 0.5 * math.log(2 * math.pi),
    free(lambda: (randn(4, 5),), lambda: (10 + randn(4, 5) * 30,)),
)
def kernel_density(x):
    return torch.log(torch.mean(torch.exp(-0.5 * x**2) / math.sqrt(2 * math.pi), dim=1))


@family.form(lambda x: -0.5 * x**2 - 0.5 * math.log(2 * math.pi), free(lambda: (randn(5),), lambda: (randn(5) * 40,)))
def gaussian_density(x):
    return torch.log(1 / math.sqrt(2 * math.pi) * torch.exp(-(x**2) / 2))


@family.form(
    lambda j, m: j.mean() - (torch.logsumexp(m, 0) - math.log(6)),
    free(lambda: (randn(6), randn(6, seed=1)), lambda: (randn(6), randn(6, seed=1) * 200)),
)
def mine(j, m):
    return torch.mean(j) - torch.log(torch.mean(torch.exp(m)))


@family.form(lambda w: torch.logsumexp(w, 0) - math.log(6), free(lambda: (randn(6),), lambda: (randn(6) * 100 - 400,)))
def importance_weighted_bound(w):
    return torch.log(w.exp().sum() / w.numel())


@family.form(lambda x, y: -log_add(picked(x, y), 2 * picked(x, y)) + math.log(2), TARGETED)
def mixture_of_powers(x, y):
    p = F.softmax(x, 1)[torch.arange(4), y]
    return -torch.log((p + p**2) / 2)


@family.form(lambda a, b: -torch.logaddexp(picked(a, _Y), picked(b, _Y)) + math.log(2), pair("mild extreme"))
def two_annotators(a, b):
    p = torch.stack([F.softmax(a, 1), F.softmax(b, 1)], dim=-1)
    return -torch.log(p[torch.arange(4), _Y].mean(-1))


_Y = torch.tensor([1, 2, 0, 3])


@family.form(
    lambda x: -torch.logsumexp(torch.stack([picked(x, _Y), picked(x, (_Y + 1) % 5)]), 0),
    classes("mild extreme", target=False),
)
def marginal_over_answer_spans(x):
    p = F.softmax(x, dim=-1)
    spans = torch.stack([_Y, (_Y + 1) % 5], 1)
    return -torch.log(torch.sum(torch.gather(p, 1, spans), dim=1))


@family.form(cross_entropy, TARGETED)
def expected_over_identical_draws(x, y):
    draws = torch.stack([F.softmax(x, 1) for _ in range(3)], 0)
    return F.nll_loss(torch.log(draws.mean(dim=0)), y)


@family.form(lambda a, b: -(lsm(a)[torch.arange(4), _Y] + lsm(b)[torch.arange(4), _Y]))
def joint_of_independent_heads(a, b):
    return -torch.log(F.softmax(a, 1)[torch.arange(4), _Y] * F.softmax(b, 1)[torch.arange(4), _Y])


@family.form(lambda a, b: lsm(a)[:, :, None] + lsm(b)[:, None])
def outer_product_of_heads(a, b):
    return torch.log(torch.einsum("ni,nj->nij", F.softmax(a, 1), F.softmax(b, 1)))


@family.form(lambda a, b: (lsm(a)[:, :, None] + lsm(b)[:, None]).flatten(1))
def outer_product_by_broadcast(a, b):
    return torch.log((F.softmax(a, 1).unsqueeze(2) * F.softmax(b, 1).unsqueeze(1)).flatten(1))
