"""Contrastive losses within a batch: InfoNCE, NT-Xent, CLIP, GRACE, DCL."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from forms.exact import log_sub, lsm
from forms.inputs import embeddings
from forms.registry import Family

TWO = embeddings("mild extreme huge")
LABELLED = embeddings("mild extreme huge", labels=True)
family = Family("contrastive", TWO)


def both(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """Similarities of all views with all."""
    z = torch.cat([a, b])
    return z @ z.T / t


def diagonal(x: Tensor) -> Tensor:
    return torch.eye(len(x), dtype=torch.bool)


def off(x: Tensor) -> Tensor:
    return x.masked_fill(diagonal(x), -math.inf)


def partners(x: Tensor) -> Tensor:
    half = len(x) // 2
    return torch.cat([x.diagonal(half), x.diagonal(-half)])


def nce(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """InfoNCE within a batch."""
    return -lsm(a @ b.T / t).diagonal()


def nt_xent(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """The loss of SimCLR."""
    x = both(a, b, t)
    return torch.logsumexp(off(x), 1) - partners(x)


@family.form(nce)
def info_nce(a, b):
    e = torch.exp(a @ b.T / 0.5)
    return -torch.log(e.diag() / e.sum(1))


@family.form(nce)
def info_nce_by_einsum(a, b):
    scores = torch.einsum("nd,md->nm", a, b) / 0.5
    positive = torch.exp(torch.einsum("nd,nd->n", a, b) / 0.5)
    return -torch.log(positive / torch.exp(scores).sum(dim=-1))


@family.form(nce)
def info_nce_with_softmax(a, b):
    return -torch.log(F.softmax(a.mm(b.t()) / 0.5, dim=1).diagonal())


@family.form(nce)
def info_nce_with_eye(a, b):
    p = F.softmax(torch.matmul(a, b.transpose(0, 1)) / 0.5, dim=-1)
    return -(torch.eye(len(a), dtype=a.dtype) * p).sum(1).log()


@family.form(lambda a, b: (nce(a, b) + nce(b, a)).mean() / 2)
def clip_by_hand(a, b):
    e = torch.exp(a @ b.t() / 0.5)
    rows = -torch.log(e.diag() / e.sum(dim=1)).mean()
    columns = -torch.log(e.diag() / e.sum(dim=0)).mean()
    return (rows + columns) / 2


@family.form(nce)
def positive_over_positive_plus_negatives(a, b):
    e = torch.exp(a @ b.T / 0.5)
    positive = torch.diag(e)
    negative = e.masked_fill(torch.eye(len(a)).bool(), 0).sum(1)
    return -torch.log(positive / (positive + negative))


@family.form(nce)
def negatives_by_subtraction(a, b):
    e = torch.exp(a @ b.T / 0.5)
    positive = torch.diag(e)
    negative = e.sum(1) - positive
    return -torch.log(positive / (positive + negative))


@family.form(nce)
def one_plus_ratio(a, b):
    e = torch.exp(a @ b.T / 0.5)
    negative = (e * (1 - torch.eye(len(a)))).sum(1)
    return torch.log(1 + negative / e.diag())


@family.form(nt_xent)
def simclr_sum_minus_diag(a, b):
    e = torch.exp(both(a, b))
    return -torch.log(partners(e) / (e.sum(1) - e.diag()))


@family.form(nt_xent)
def simclr_masked_select(a, b):
    z = torch.cat([a, b], dim=0)
    e = torch.exp(torch.mm(z, z.t().contiguous()) / 0.5)
    mask = (torch.ones_like(e) - torch.eye(len(z))).bool()
    e = e.masked_select(mask).view(len(z), -1)
    positive = torch.exp(torch.sum(a * b, dim=-1) / 0.5)
    return -torch.log(torch.cat([positive, positive]) / e.sum(dim=-1))


@family.form(nt_xent)
def simclr_boolean_index(a, b):
    x = both(a, b)
    e = torch.exp(x)[~diagonal(x)].view(len(x), -1)
    return -(partners(x) - torch.log(e.sum(1)))


@family.form(nt_xent)
def simclr_times_mask(a, b):
    x = both(a, b)
    e = torch.exp(x) * (~diagonal(x)).float()
    return -torch.log(torch.exp(partners(x)) / e.sum(1))


@family.form(nt_xent)
def simclr_fill_diagonal(a, b):
    e = torch.exp(both(a, b)).clone()
    e.fill_diagonal_(0)
    return -torch.log(partners(e) / e.sum(1))


@family.twin("simclr_sum_minus_diag", embeddings("mild extreme"))
def simclr_minus_e_to_one_over_t(a, b):
    z = F.normalize(torch.cat([a, b]), dim=1)
    e = torch.exp(z @ z.T / 0.5)
    refl = torch.full((len(z),), math.exp(1 / 0.5), dtype=z.dtype)
    return -torch.log(partners(e) / (e.sum(1) - refl))


@family.form(nt_xent)
def simclr_loop(a, b):
    z = torch.cat([a, b])
    losses = []
    for i in range(len(z)):
        total = 0
        for k in range(len(z)):
            if k != i:
                total = total + torch.exp(torch.dot(z[i], z[k]) / 0.5)
        j = (i + len(a)) % len(z)
        losses.append(-torch.log(torch.exp(torch.dot(z[i], z[j]) / 0.5) / total))
    return torch.stack(losses)


@family.form(nt_xent)
def simclr_pairs_with_indicator(a, b):
    z = torch.cat([a, b])
    x = z.unsqueeze(1).mul(z.unsqueeze(0)).sum(2) / 0.5
    indicator = torch.ones(len(z), dtype=x.dtype) - torch.eye(len(z), dtype=x.dtype)
    denominator = torch.sum(indicator * torch.exp(x), dim=1)
    nominator = torch.exp(partners(x))
    return -torch.log(nominator / denominator)


def grace(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    inner, outer = a @ a.T / t, a @ b.T / t
    return torch.logsumexp(torch.cat([off(inner), outer], 1), 1) - outer.diagonal()


@family.form(grace)
def grace_semi_loss(a, b):
    def f(x):
        return torch.exp(x / 0.5)

    refl = f(torch.mm(a, a.t()))
    between = f(torch.mm(a, b.t()))
    return -torch.log(between.diag() / (refl.sum(1) + between.sum(1) - refl.diag()))


@family.form(lambda a, b: log_sub(*_decoupled(a, b)), embeddings("mild extreme"), name="decoupled_sum_minus_positive")
def _decoupled_naive(a, b):
    e = torch.exp(a @ b.T / 0.5)
    return torch.log(e.sum(1) - e.diag()) - torch.log(e.diag())


def _decoupled(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The negatives' total less the positive, doubled so that it can be written as a difference."""
    x = a @ b.T / 0.5
    rest = torch.logsumexp(off(x), 1) - x.diagonal()
    return rest + math.log(2), rest


@family.form(lambda a, b: torch.logsumexp(off(a @ b.T / 0.5), 1) - (a @ b.T / 0.5).diagonal())
def decoupled_masked(a, b):
    x = a @ b.T / 0.5
    negative = torch.exp(x).masked_fill(diagonal(x), 0.0).sum(1)
    return -x.diagonal() + torch.log(negative)
