"""Survival, ranking and sequences: Cox, ListMLE, Plackett-Luce, hazards, stopping, ordinal regression, CTC-like sums."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from forms.exact import eps_log, log1mexp, lsm
from forms.inputs import free, inputs, randn, scores
from forms.registry import Family

RISKS = free(lambda: (randn(6),), lambda: (randn(6) * 150,), low=lambda: (randn(6) * 5 - 200,))
family = Family("survival and ranking", RISKS)
EVENT = torch.tensor([1, 0, 1, 1, 0, 1])
TIME = torch.tensor([5.0, 3, 4, 2, 6, 1])


def cox(x):
    return -((x - torch.logcumsumexp(x, 0)) * EVENT).sum() / EVENT.sum()


@family.form(cox)
def cox_with_cumsum(x):
    risk = torch.log(torch.cumsum(torch.exp(x), 0))
    return -((x - risk) * EVENT).sum() / EVENT.sum()


@family.form(cox)
def cox_with_a_ratio(x):
    hazard = torch.exp(x)
    likelihood = torch.log(hazard / torch.cumsum(hazard, dim=0))
    return -(likelihood * EVENT).sum() / EVENT.sum()


@family.form(lambda x: _cox_sets(x))
def cox_with_a_risk_matrix(x):
    at_risk = (TIME[None] >= TIME[:, None]).to(x.dtype)
    total = torch.log(torch.sum(torch.exp(x)[None] * at_risk, dim=1))
    return -((x - total) * EVENT).mean()


@family.form(lambda x: _cox_sets(x))
def cox_with_a_risk_matmul(x):
    at_risk = (TIME[None] >= TIME[:, None]).to(x.dtype)
    return -((x - torch.log(at_risk @ torch.exp(x))) * EVENT).mean()


def _cox_sets(x):
    at_risk = TIME[None] >= TIME[:, None]
    total = torch.logsumexp(x[None].expand(6, 6).masked_fill(~at_risk, -math.inf), 1)
    return -((x - total) * EVENT).mean()


@family.form(lambda x: cox(x[torch.argsort(TIME, descending=True)]))
def cox_sorted(x):
    x = x[torch.argsort(TIME, descending=True)]
    return -((x - x.exp().cumsum(0).log()) * EVENT).sum() / EVENT.sum()


def list_mle(x):
    return (torch.logcumsumexp(x.flip(0), 0).flip(0) - x).sum()


@family.form(list_mle)
def list_mle_with_flips(x):
    return (torch.log(x.exp().flip(0).cumsum(0).flip(0)) - x).sum()


@family.form(lambda x: list_mle(x - x.max().detach()))
def list_mle_shifted(x):
    shifted = x - x.max().detach()
    totals = torch.cumsum(shifted.exp().flip(dims=[0]), dim=0).flip(dims=[0])
    return torch.sum(torch.log(totals) - shifted)


@family.form(lambda x, eps: (eps_log(torch.logcumsumexp(x.flip(0), 0).flip(0), eps) - x).sum(), epsilon="both")
def list_mle_with_eps(x, eps=1e-10):
    return (torch.log(x.exp().flip(0).cumsum(0).flip(0) + eps) - x).sum()


@family.form(list_mle)
def plackett_luce_loop(x):
    loss = 0
    for i in range(len(x)):
        loss = loss - torch.log(torch.exp(x[i]) / torch.exp(x[i:]).sum())
    return loss


@family.form(list_mle)
def plackett_luce_product(x):
    e = torch.exp(x)
    total = e.flip(0).cumsum(0).flip(0)
    return -torch.log(torch.prod(e / total))


@family.form(lambda x: -(lsm(torch.tensor([3.0, 1, 0, 2, 0, 1]).to(x), 0).exp() * lsm(x, 0)).sum())
def list_net(x):
    relevance = F.softmax(torch.tensor([3.0, 1, 0, 2, 0, 1]).to(x), 0)
    return -(relevance * torch.log(F.softmax(x, 0))).sum()


@family.form(lambda x: F.softplus(x[None, :] - x[:, None]).triu(1).sum())
def rank_net(x):
    return torch.log(1 + torch.exp(x[None, :] - x[:, None])).triu(1).sum()


@family.form(lambda x: -F.logsigmoid(x[:3, None] - x[None, 3:]).mean())
def rank_net_of_sigmoids(x):
    return -torch.log(torch.sigmoid(x[:3, None] - x[None, 3:])).mean()


# Discrete hazards.
HAZARDS = scores("mild extreme saturated")


@family.form(lambda x: F.logsigmoid(-x).cumsum(0), HAZARDS)
def survival_by_cumprod(x):
    return torch.log(torch.cumprod(1 - torch.sigmoid(x), 0))


@family.form(lambda x: F.logsigmoid(-x).sum(), HAZARDS)
def survival_by_prod(x):
    return torch.log(torch.prod(1 - torch.sigmoid(x)))


@family.form(lambda x: F.logsigmoid(x[-1]) + F.logsigmoid(-x[:-1]).sum(), HAZARDS)
def event_at_the_end(x):
    hazard = torch.sigmoid(x)
    survival = torch.cumprod(1 - hazard, 0)
    return torch.log(hazard[-1]) + torch.log(survival[-2])


@family.form(lambda x: F.logsigmoid(x[-1]) + F.logsigmoid(-x[:-1]).sum(), HAZARDS)
def event_at_the_end_as_product(x):
    hazard = torch.sigmoid(x)
    survival = torch.cumprod(1 - hazard, 0)
    return torch.log(hazard[-1] * survival[-2])


@family.form(lambda x: F.logsigmoid(x) + torch.cat([torch.zeros(1).to(x), F.logsigmoid(-x[:-1]).cumsum(0)]), HAZARDS)
def stick_breaking(x):
    v = torch.sigmoid(x)
    rest = torch.cat([torch.ones(1).to(x), torch.cumprod(1 - v, 0)[:-1]])
    return torch.log(v * rest)


@family.form(lambda x: F.logsigmoid(x) + torch.cat([torch.zeros(1).to(x), F.logsigmoid(-x[:-1]).cumsum(0)]), HAZARDS)
def halting_loop(x):
    remaining, found = 1.0, []
    for step in torch.sigmoid(x):
        found.append(torch.log(remaining * step))
        remaining = remaining * (1 - step)
    return torch.stack(found)


@family.form(lambda x: lsm(x, 0)[2:].logsumexp(0), RISKS)
def survival_from_a_probability_mass(x):
    return torch.log(F.softmax(x, 0)[2:].sum())


@family.form(lambda x: lsm(x, 0).flip(0).logcumsumexp(0).flip(0)[1:], RISKS)
def survival_curve_from_one_minus_cumsum(x):
    return torch.log(1 - torch.cumsum(F.softmax(x, 0), 0)[:-1])


@family.form(
    lambda x: log1mexp(-torch.exp(x)), free(lambda: (randn(5),), lambda: (torch.tensor([-20.0, -30, -90, 1, 3]),))
)
def complementary_log_log(x):
    return torch.log(1 - torch.exp(-torch.exp(x)))


@family.form(lambda x: x - torch.exp(x), free(lambda: (randn(5),), lambda: (torch.tensor([5.0, 4.7, 2, 1, 6]),)))
def weibull_density(x):
    return torch.log(torch.exp(x) * torch.exp(-torch.exp(x)))


# Ordinal regression.
THRESHOLDS = inputs(
    mild=lambda: (randn(4), torch.tensor([-1.0, 0.0, 1.0])),
    extreme=lambda: (torch.tensor([40.0, -40, 150, -150]), torch.tensor([-1.0, 0.0, 1.0])),
)


def cumulative_link(x, t):
    upper, lower = t[1:] - x[:, None], t[:-1] - x[:, None]
    middle = F.logsigmoid(upper) + F.logsigmoid(-lower) + log1mexp(lower - upper)
    return torch.cat([F.logsigmoid(t[:1] - x[:, None]), middle, F.logsigmoid(x[:, None] - t[-1:])], 1)


@family.form(cumulative_link, THRESHOLDS)
def cumulative_link_model(x, t):
    below = torch.sigmoid(t - x[:, None])
    return torch.log(torch.cat([below[:, :1], below[:, 1:] - below[:, :-1], 1 - below[:, -1:]], 1))


@family.form(cumulative_link, THRESHOLDS)
def cumulative_link_with_diff(x, t):
    below = torch.sigmoid(t - x[:, None])
    below = torch.cat([torch.zeros(4, 1).to(x), below, torch.ones(4, 1).to(x)], 1)
    return torch.log(below.diff(dim=1))


@family.form(lambda x, t: F.logsigmoid(x[:, None] - t) + F.logsigmoid(t - x[:, None]), THRESHOLDS)
def coral(x, t):
    p = torch.sigmoid(x[:, None] - t)
    return p.log() + (1 - p).log()


# Sums over alignments.
@family.form(lambda x: _paths(x), free(lambda: (randn(5, 2),), lambda: (randn(5, 2) * 60,)))
def alignments_by_dynamic_programming(x):
    p = torch.sigmoid(x)
    stay, move = p[0, 0], p[0, 1]
    for t in range(1, 5):
        stay, move = stay * p[t, 0], (move + stay) * p[t, 1]
    return torch.log(stay + move)


def _paths(x):
    p = F.logsigmoid(x)
    stay, move = p[0, 0], p[0, 1]
    for t in range(1, 5):
        stay, move = stay + p[t, 0], torch.logaddexp(move, stay) + p[t, 1]
    return torch.logaddexp(stay, move)


@family.form(lambda x: torch.logsumexp(torch.stack([x[0] + x[1], x[0] + x[2], x[1] + x[2]]), 0))
def elementary_symmetric_polynomial(x):
    e = torch.exp(x)
    return torch.log(e[0] * e[1] + e[0] * e[2] + e[1] * e[2])


@family.form(lambda x: torch.logsumexp(x[:3], 0) + torch.logsumexp(x[3:], 0))
def partition_function_by_product(x):
    return torch.log(x[:3].exp().sum() * x[3:].exp().sum())


@family.form(lambda x: torch.logsumexp(x.view(2, 3)[0][:, None] + x.view(2, 3)[1][None], (0, 1)))
def crf_step(x):
    alpha, emission = x.view(2, 3).exp()
    return torch.log((alpha[:, None] * emission[None, :]).sum())
