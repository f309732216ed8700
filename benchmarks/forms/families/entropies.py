"""Entropies of one distribution."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from forms.exact import (
    eps_log,
    floor_log,
    lsm,
    shannon,
)
from forms.inputs import classes
from forms.registry import Family

family = Family("entropies and divergences")
ONE = classes("mild extreme masked half", target=False)  # where 0 log 0 is defined
UNMASKED = classes("mild extreme half", target=False)


@family.form(shannon, UNMASKED)
def shannon_entropy(x):
    p = F.softmax(x, dim=1)
    return -(p * torch.log(p)).sum(1)


@family.form(shannon, UNMASKED)
def shannon_entropy_in_one_expression(x):
    return -torch.sum(torch.softmax(x, 1) * torch.softmax(x, 1).log(), dim=-1)


@family.form(shannon, UNMASKED)
def shannon_entropy_negated_inside(x):
    p = x.softmax(-1)
    return (-p * p.log()).sum(-1)


@family.form(shannon, ONE)
def shannon_entropy_xlogy(x):
    p = x.exp() / x.exp().sum(1, keepdim=True)
    return -torch.xlogy(p, p).sum(1)


@family.form(shannon, ONE)
def shannon_entropy_entr(x):
    p = x.exp() / x.exp().sum(1, keepdim=True)
    return torch.special.entr(p).sum(1)


@family.form(shannon, ONE)
def shannon_entropy_where(x):
    p = torch.softmax(x, 1)
    return -torch.where(p > 0, p * torch.log(p), torch.zeros_like(p)).sum(1)


@family.form(shannon, ONE)
def shannon_entropy_nan_to_num(x):
    p = torch.softmax(x, 1)
    return -torch.nan_to_num(p * torch.log(p)).sum(1)


@family.form(shannon, classes("mild extreme", target=False))
def shannon_entropy_einsum(x):
    p = torch.softmax(x, 1)
    return -torch.einsum("nk,nk->n", p, p.log())


@family.form(shannon, ONE)
def shannon_entropy_masked_afterwards(x):
    p = torch.softmax(x, 1)
    terms = p * torch.log(p)
    return -torch.where(p == 0, 0.0, terms).sum(1)


@family.form(lambda x: shannon(x) / math.log(5), UNMASKED)
def normalised_entropy(x):
    p = F.softmax(x, 1)
    return -(p * p.log()).sum(1) / math.log(x.shape[1])


@family.form(lambda x: shannon(x) / math.log(2), UNMASKED)
def entropy_in_bits(x):
    p = torch.softmax(x, dim=-1)
    return -(p * torch.log2(p)).sum(-1)


@family.form(lambda x: torch.exp(shannon(x)), UNMASKED)
def perplexity_of_a_softmax(x):
    p = torch.softmax(x, dim=-1)
    return torch.exp(-(p * torch.log(p)).sum(-1))


def eps_entropy(x, eps):
    a = lsm(x)
    return -(a.exp() * eps_log(a, eps)).sum(1) if eps else shannon(x)


def floor_entropy(x, eps):
    a = lsm(x)
    return -(a.exp() * floor_log(a, eps)).sum(1) if eps else shannon(x)


@family.twin("shannon_entropy", ONE, stable=eps_entropy)
def entropy_with_eps(x, eps=1e-5):
    p = F.softmax(x, 1)
    return -(p * torch.log(p + eps)).sum(1)


@family.twin("shannon_entropy", classes("mild extreme masked", target=False), stable=eps_entropy, epsilon="drop")
def entropy_with_eps_to_drop(x, eps=1e-8):
    p = F.softmax(x, 1)
    return -(p * torch.log(p + eps)).sum(1)


@family.twin("shannon_entropy", classes("mild extreme masked", target=False), stable=floor_entropy, epsilon="drop")
def entropy_clamped_to_drop(x, eps=1e-8):
    p = F.softmax(x, 1).clamp(min=eps)
    return -(F.softmax(x, 1) * torch.log(p)).sum(1)


@family.form(lambda x: shannon(torch.stack([x, torch.zeros_like(x)])[..., None], 0).squeeze(-1), UNMASKED)
def binary_entropy(x):
    p = torch.sigmoid(x)
    return -(p * torch.log(p) + (1 - p) * torch.log(1 - p))


def renyi(x, alpha):
    return torch.logsumexp(alpha * lsm(x), 1) / (1 - alpha)


@family.form(lambda x: torch.logsumexp(torch.stack([3 * lsm(x)[:, 1], 3 * lsm(x)[:, 3]]), 0) / -2, UNMASKED)
def renyi_of_some_classes(x):
    p = torch.softmax(x, 1)
    return torch.log(p[:, 1] ** 3 + p[:, 3] ** 3) / (1 - 3)


@family.form(lambda x: renyi(x, 0.5), classes("mild extreme", target=False))
def renyi_entropy_by_hand(x):
    p = x.exp() / x.exp().sum(1, keepdim=True)
    return torch.log(torch.sum(p**0.5, dim=1)) / (1 - 0.5)


@family.form(lambda x: renyi(x, 2), classes("mild extreme", target=False))
def collision_entropy_by_hand(x):
    p = x.exp() / x.exp().sum(1, keepdim=True)
    return -torch.log((p * p).sum(1))


@family.form(lambda x: -lsm(x).amin(1) + lsm(x).amax(1), UNMASKED)
def spread(x):
    p = torch.softmax(x, 1)
    return torch.log(p.amax(1) / p.amin(1))
