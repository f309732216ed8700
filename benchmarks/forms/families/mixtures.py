"""Mixtures: marginals over batches and groups, ensembles, gates, pointer-generators, noisy labels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from forms.exact import entropy, lsm
from forms.inputs import classes, pair
from forms.registry import Family

family = Family("mixtures", pair("mild extreme"))
ONE = classes("mild extreme", target=False)
TARGETED = classes("mild extreme")


def columns():
    """One class that no sample believes in."""
    return {
        **ONE,
        "extreme": lambda: (torch.tensor([[0.0, 200, 3, -250, 1], [3, 150, 1, -200, 2], [1, 0, 190, -210, 90]]),),
    }


@family.form(lambda x: torch.logsumexp(lsm(x), 0) - math.log(len(x)), columns())
def batch_marginal(x):
    return torch.log(torch.softmax(x, 1).mean(0))


@family.form(lambda x: -entropy(torch.logsumexp(lsm(x), 0) - math.log(len(x))).sum(), columns())
def entropy_of_the_batch_marginal(x):
    p = F.softmax(x, dim=1).mean(dim=0)
    return -(p * torch.log(p)).sum()


@family.form(lambda x: torch.logsumexp(lsm(x), 0) - math.log(len(x)), columns())
def batch_marginal_by_sum(x):
    p = F.softmax(x, dim=1)
    return torch.log(p.sum(0) / p.size(0))


@family.form(lambda x: torch.logsumexp(lsm(x), 0) - math.log(len(x)), columns())
def batch_marginal_renormalised(x):
    p = F.softmax(x, dim=1).sum(0)
    return torch.log(p / p.sum())


@family.form(lambda x: _information(x), columns())
def mutual_information(x):
    p = F.softmax(x, 1)
    marginal = p.mean(0)
    return (marginal * marginal.log()).sum() - (p * p.log()).sum(1).mean()


def _information(x):
    marginal = torch.logsumexp(lsm(x), 0) - math.log(len(x))
    return entropy(marginal).sum() - entropy(lsm(x)).sum(1).mean()


def ensemble(a, b):
    return torch.logaddexp(lsm(a), lsm(b)) - math.log(2)


@family.form(ensemble)
def ensemble_of_two(a, b):
    return torch.log((F.softmax(a, 1) + F.softmax(b, 1)) / 2)


@family.form(ensemble)
def ensemble_by_stack(a, b):
    return torch.stack([a, b]).softmax(-1).mean(0).log()


@family.form(ensemble)
def ensemble_by_stacked_probabilities(a, b):
    return torch.log(torch.mean(torch.stack([torch.softmax(z, -1) for z in (a, b)]), dim=0))


@family.form(ensemble)
def ensemble_accumulated(a, b):
    total = 0.0
    for z in (a, b):
        total += F.softmax(z, dim=1)
    return torch.log(total / 2)


@family.form(ensemble)
def ensemble_accumulated_in_place(a, b):
    total = torch.zeros_like(a)
    for z in (a, b):
        total += F.softmax(z, dim=1)
    total /= 2
    return torch.log(total)


@family.form(lambda a, b: torch.logaddexp(lsm(a) + math.log(0.3), lsm(b) + math.log(0.7)))
def weighted_ensemble(a, b):
    return torch.log(0.3 * F.softmax(a, 1) + 0.7 * F.softmax(b, 1))


@family.form(lambda a, b: torch.logaddexp(lsm(a) + math.log(0.3), lsm(b) + math.log(0.7)))
def lerped_ensemble(a, b):
    return torch.lerp(F.softmax(a, 1), F.softmax(b, 1), 0.7).log()


@family.form(lambda a, b: lsm(a) + lsm(b) - torch.logsumexp(lsm(a) + lsm(b), 1, keepdim=True))
def product_of_experts(a, b):
    p = F.softmax(a, 1) * F.softmax(b, 1)
    return torch.log(p / p.sum(1, keepdim=True))


@family.form(lambda a, b: torch.logsumexp(lsm(a) + lsm(b), 1))
def agreement(a, b):
    return torch.log((F.softmax(a, 1) * F.softmax(b, 1)).sum(1))


@family.form(lambda a, b: torch.logsumexp(lsm(a)[:, None] + lsm(b)[None], 2))
def agreement_of_all_pairs(a, b):
    return torch.log(F.softmax(a, 1) @ F.softmax(b, 1).T)


@family.form(lambda a, b: torch.logsumexp(lsm(a) + lsm(b), 1))
def agreement_by_einsum(a, b):
    return torch.log(torch.einsum("nk,nk->n", F.softmax(a, 1), F.softmax(b, 1)))


# Gates.
@family.form(lambda a, b: torch.logaddexp(F.logsigmoid(b[:, :1]) + lsm(a), F.logsigmoid(-b[:, :1]) + lsm(b)))
def gated_mixture(a, b):
    gate = torch.sigmoid(b[:, :1])
    return torch.log(gate * F.softmax(a, 1) + (1 - gate) * F.softmax(b, 1))


SOURCE = torch.tensor([[0, 1, 1, 4, 3], [2, 2, 0, 1, 4], [1, 3, 3, 3, 0], [0, 4, 2, 2, 1]])


def _pointed(a, b):
    copied = torch.stack([torch.logsumexp(lsm(b).masked_fill(word != SOURCE, -math.inf), 1) for word in range(5)], 1)
    return torch.logaddexp(F.logsigmoid(a[:, :1]) + lsm(a), F.logsigmoid(-a[:, :1]) + copied)


@family.form(_pointed, pair("mild extreme"), infinite=True)
def pointer_generator(a, b):
    p_gen = torch.sigmoid(a[:, :1])
    vocabulary, attention = p_gen * F.softmax(a, dim=1), (1 - p_gen) * F.softmax(b, dim=1)
    return torch.log(vocabulary.scatter_add(1, SOURCE, attention))


@family.form(lambda a, b: -_pointed(a, b).gather(1, torch.tensor([[0], [2], [1], [0]]))[:, 0])
def pointer_generator_loss(a, b):
    p_gen = torch.sigmoid(a[:, :1])
    final = torch.scatter_add(p_gen * F.softmax(a, 1), 1, SOURCE, (1 - p_gen) * F.softmax(b, 1))
    return -torch.log(final.gather(1, torch.tensor([[0], [2], [1], [0]])).squeeze(1))


@family.form(lambda a, b: _mixture_of_softmaxes(a, b))
def mixture_of_softmaxes(a, b):
    prior = F.softmax(a[:, :2], -1)
    experts = torch.stack([F.softmax(a, -1), F.softmax(b, -1)], dim=1)
    return torch.log((prior.unsqueeze(-1) * experts).sum(1))


def _mixture_of_softmaxes(a, b):
    return torch.logsumexp(lsm(a[:, :2])[:, :, None] + torch.stack([lsm(a), lsm(b)], 1), 1)


@family.form(lambda a, b: _mixture_of_softmaxes(a, b))
def mixture_of_softmaxes_by_bmm(a, b):
    prior = F.softmax(a[:, :2], -1)
    experts = torch.stack([F.softmax(a, -1), F.softmax(b, -1)], dim=1)
    return torch.bmm(prior.unsqueeze(1), experts).squeeze(1).log()


# Noisy labels.
SWAPPED = torch.tensor(
    [[0.9, 0.1, 0, 0, 0], [0.1, 0.9, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0.8, 0.2], [0, 0, 0, 0.2, 0.8]]
)


def corrected(x, y):
    return -torch.logsumexp(lsm(x)[:, :, None] + SWAPPED.to(x).log(), 1).gather(1, y[:, None])[:, 0]


@family.form(corrected, TARGETED)
def forward_correction(x, y):
    return -torch.log(torch.softmax(x, 1) @ SWAPPED.to(x)).gather(1, y[:, None])[:, 0]


@family.form(corrected, TARGETED)
def forward_correction_by_mm(x, y):
    noisy = torch.mm(F.softmax(x, dim=1), SWAPPED.to(x))
    return F.nll_loss(noisy.log(), y, reduction="none")


@family.form(corrected, TARGETED)
def forward_correction_by_bmm(x, y):
    noisy = torch.bmm(SWAPPED.to(x).T.expand(4, 5, 5), F.softmax(x, 1).unsqueeze(2)).squeeze(2)
    return -noisy[torch.arange(4), y].log()


@family.form(corrected, TARGETED)
def forward_correction_of_columns(x, y):
    return -torch.log((F.softmax(x, 1) * SWAPPED.to(x)[:, y].T).sum(1))


@family.form(
    lambda x, y: -torch.logsumexp(lsm(x)[:, :, None] + lsm(2 * torch.eye(5).to(x)), 1).gather(1, y[:, None])[:, 0],
    classes("mild extreme_=extreme")
    | {
        "extreme": lambda: (
            torch.tensor([[0.0, 200, 0, 0, 0], [1000, 0, 0, 0, 0], [0, 0, 300.0, 0, 1], [0, 0, 0, 0, 150]]),
            torch.tensor([1, 0, 2, 4]),
        )
    },
)
def learned_transition(x, y):
    e = x.exp()
    p = e / e.sum(1, keepdim=True)
    return -torch.log(torch.matmul(p, torch.softmax(2 * torch.eye(5).to(x), 1)))[torch.arange(4), y]
