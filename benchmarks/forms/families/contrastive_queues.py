"""Contrastive losses with queues, labels, margins and distances."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from forms.exact import (
    log_add,
    lsm,
)
from forms.families.contrastive import both, diagonal, nce, off
from forms.inputs import embeddings, free, randn
from forms.registry import Family

family = Family("contrastive", embeddings("mild extreme huge"))
LABELLED = embeddings("mild extreme huge", labels=True)


@family.form(lambda q, k: -lsm(torch.cat([(q * k).sum(1, keepdim=True), q @ QUEUE.to(q)], 1) / 0.07)[:, 0])
def moco(q, k):
    positive = torch.einsum("nc,nc->n", [q, k]).unsqueeze(-1)
    negative = torch.einsum("nc,ck->nk", [q, QUEUE.to(q)])
    e = torch.exp(torch.cat([positive, negative], dim=1) / 0.07)
    return -torch.log(e[:, 0] / e.sum(1))


QUEUE = randn(3, 6, seed=9)


@family.form(lambda q, k: -lsm(torch.cat([(q * k).sum(1, keepdim=True), q @ QUEUE.to(q)], 1) / 0.07)[:, 0])
def moco_by_parts(q, k):
    positive = torch.exp((q * k).sum(-1) / 0.07)
    negative = torch.exp(q @ QUEUE.to(q) / 0.07).sum(-1)
    return -torch.log(positive / (positive + negative))


def supcon(a: Tensor, b: Tensor, y: Tensor, t: float = 0.5) -> Tensor:
    x = both(a, b, t)
    labels = torch.cat([y, y])
    same = (labels[:, None] == labels) & ~diagonal(x)
    log_p = x - torch.logsumexp(off(x), 1, keepdim=True)
    return -torch.where(same, log_p, 0.0).sum(1) / same.sum(1)


@family.form(supcon, LABELLED)
def supcon_with_detached_max(a, b, y):
    x = both(a, b)
    labels = torch.cat([y, y]).view(-1, 1)
    mask = torch.eq(labels, labels.T).float()
    top, _ = torch.max(x, dim=1, keepdim=True)
    logits = x - top.detach()
    others = torch.scatter(torch.ones_like(mask), 1, torch.arange(len(x)).view(-1, 1), 0)
    mask = mask * others
    exp_logits = torch.exp(logits) * others
    log_prob = logits - torch.log(exp_logits.sum(1, keepdim=True))
    return -(mask * log_prob).sum(1) / mask.sum(1)


@family.form(supcon, LABELLED)
def supcon_without_shift(a, b, y):
    x = both(a, b)
    labels = torch.cat([y, y])
    others = ~diagonal(x)
    e = torch.exp(x) * others
    log_prob = x - torch.log(e.sum(1, keepdim=True))
    same = (labels[:, None] == labels[None]) & others
    return -(same * log_prob).sum(1) / same.sum(1)


@family.form(supcon, LABELLED)
def supcon_log_of_ratio(a, b, y):
    x = both(a, b)
    labels = torch.cat([y, y])
    e = torch.exp(x).masked_fill(diagonal(x), 0)
    same = (labels.unsqueeze(0) == labels.unsqueeze(1)) & ~diagonal(x)
    p = e / e.sum(1, keepdim=True)
    return -torch.stack([torch.log(p[i][same[i]]).mean() for i in range(len(x))])


def supcon_inside(a: Tensor, b: Tensor, y: Tensor) -> Tensor:
    x = both(a, b)
    labels = torch.cat([y, y])
    same = (labels[:, None] == labels) & ~diagonal(x)
    return torch.logsumexp(off(x), 1) - torch.logsumexp(x.masked_fill(~same, -math.inf), 1)


@family.form(supcon_inside, LABELLED)
def supcon_inside_the_log(a, b, y):
    x = both(a, b)
    labels = torch.cat([y, y])
    others = 1 - torch.eye(len(x))
    same = (labels[:, None] == labels).float() * others
    e = torch.exp(x)
    return -torch.log((e * same).sum(1) / (e * others).sum(1))


@family.form(supcon_inside, LABELLED)
def positives_over_positives_plus_negatives(a, b, y):
    x = both(a, b)
    labels = torch.cat([y, y])
    e = x.exp()
    same = (labels[:, None] == labels) & ~diagonal(x)
    positive = torch.where(same, e, torch.zeros_like(e)).sum(-1)
    negative = torch.where(labels[:, None] != labels, e, torch.zeros_like(e)).sum(-1)
    return -torch.log(positive / (positive + negative))


@family.form(lambda a, b: nce(a, b).mean(), embeddings("mild extreme huge"))
def exp_hidden_in_a_helper(a, b):
    def similarity(u, v):
        return (u[:, None] * v[None]).sum(-1).div(0.5).exp()

    matrix = similarity(a, b)
    return (-torch.log(matrix.diagonal() / matrix.sum(-1))).mean()


@family.form(lambda a, b: -lsm(-torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").pow(2)).diagonal())
def negative_squared_distances(a, b):
    e = torch.exp(-torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").pow(2))
    return -torch.log(e.diagonal() / e.sum(1))


@family.form(lambda x: F.softplus(x[:, 1] - x[:, 0]), free(lambda: (randn(4, 2),), lambda: (randn(4, 2) * 300,)))
def triplet_softmax(x):
    positive, negative = torch.exp(x[:, 0]), torch.exp(x[:, 1])
    return -torch.log(positive / (positive + negative))


COLLAPSED = free(
    lambda: (torch.eye(4) + randn(4, 4) * 0.1, torch.eye(4) + randn(4, 4, seed=5) * 0.1),
    lambda: (1 + randn(4, 4) * 0.01, -1 + randn(4, 4) * 0.01),
)


@family.form(
    lambda a, b: -lsm(128 * (F.normalize(a) @ F.normalize(b).T - 0.35 * torch.eye(4).to(a))).diagonal(), COLLAPSED
)
def cosface(a, b):
    scale = 128.0
    cosine = F.linear(F.normalize(a), F.normalize(b))
    numerator = scale * (torch.diagonal(cosine) - 0.35)
    excluded = torch.stack([torch.cat((cosine[i, :i], cosine[i, i + 1 :])) for i in range(4)])
    denominator = torch.exp(numerator) + torch.sum(torch.exp(scale * excluded), dim=1)
    return -(numerator - torch.log(denominator))


@family.form(lambda a, b: log_add(torch.logsumexp(off(a @ b.T / 0.5), 1) - (a @ b.T / 0.5).diagonal(), 0.0).mean())
def softplus_of_negatives(a, b):
    x = a @ b.T / 0.5
    gaps = torch.exp(x - x.diag()[:, None])
    return torch.log1p(gaps.sum(1) - gaps.diag()).mean()


@family.form(lambda a, b: _margins(a, b))
def alignment_minus_uniformity(a, b):
    distances = torch.pdist(a, p=2).pow(2)
    return (a - b).pow(2).sum(1).mean() + distances.mul(-2).exp().mean().log()


def _margins(a: Tensor, b: Tensor) -> Tensor:
    distances = torch.pdist(a, p=2).pow(2)
    return (a - b).pow(2).sum(1).mean() + torch.logsumexp(-2 * distances, 0) - math.log(6)


@family.form(lambda a, b: _hard(a, b))
def hard_negatives(a, b):
    x = a @ b.T / 0.5
    e = torch.exp(x)
    mask = ~diagonal(x)
    negative = e.masked_select(mask).view(4, -1)
    weight = (negative.log() * 0.5).exp()
    reweighted = (weight * negative).sum(-1) / weight.mean(-1)
    return -torch.log(e.diag() / (e.diag() + reweighted))


def _hard(a: Tensor, b: Tensor) -> Tensor:
    x = a @ b.T / 0.5
    rest = off(x)
    reweighted = torch.logsumexp(1.5 * rest, 1) - torch.logsumexp(0.5 * rest, 1) + math.log(3)
    return F.softplus(reweighted - x.diagonal())
