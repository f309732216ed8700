"""Logarithms of weighted, masked and grouped sums of exponentials."""

from __future__ import annotations

import math

import torch

from forms.exact import (
    lsm,
)
from forms.inputs import classes, vector
from forms.registry import Family

family = Family("log of a sum of exponentials", classes("mild extreme masked half", target=False))
PLAIN = classes("mild extreme", target=False)


def lse(x, dim=1):
    return torch.logsumexp(x, dim)


WEIGHTS = torch.tensor([0.5, 0.2, 0.1, 0.15, 0.05])


@family.form(lambda x: lse(x + WEIGHTS.to(x).log()), PLAIN)
def weighted_total(x):
    return torch.log((WEIGHTS.to(x) * torch.exp(x)).sum(1))


@family.form(lambda x: lse(x + WEIGHTS.to(x).log()), PLAIN)
def weighted_total_by_matmul(x):
    return torch.log(torch.exp(x) @ WEIGHTS.to(x))


@family.form(lambda x: lse(x + WEIGHTS.to(x).log()), PLAIN)
def weighted_total_by_einsum(x):
    return torch.log(torch.einsum("nk,k->n", x.exp(), WEIGHTS.to(x)))


MASK = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [1, 1, 0, 0, 1]])


@family.form(lambda x: lse(x.masked_fill(MASK == 0, -math.inf)), PLAIN)
def masked_total_by_product(x):
    return torch.log((x.exp() * MASK).sum(1))


@family.form(lambda x: lse(x.masked_fill(MASK == 0, -math.inf)), PLAIN)
def masked_total_by_where(x):
    return torch.log(torch.where(MASK.bool(), x.exp(), torch.zeros_like(x)).sum(1))


@family.form(lambda x: lse(x.masked_fill(MASK == 0, -math.inf)), PLAIN)
def masked_total_by_masked_fill(x):
    return torch.log(torch.exp(x).masked_fill(~MASK.bool(), 0).sum(1))


@family.form(lambda x: lse(x.masked_fill(MASK == 0, -math.inf)), PLAIN)
def masked_total_by_assignment(x):
    e = torch.exp(x).clone()
    e[MASK == 0] = 0
    return torch.log(e.sum(1))


@family.form(lambda x: lse(x.masked_fill(MASK == 0, -1e9)), PLAIN)
def masked_total_by_large_negative(x):
    return torch.log(torch.exp(x.masked_fill(MASK == 0, -1e9)).sum(1))


@family.form(lambda x: lse(x) - lse(x.masked_fill(MASK == 0, -math.inf)), PLAIN)
def minus_log_of_masked_share(x):
    e = torch.exp(x)
    return -torch.log((e * MASK).sum(1) / e.sum(1))


@family.form(lambda x: lse(x[:, 1:]), PLAIN)
def total_minus_the_first(x):
    e = x.exp()
    return torch.log(e.sum(1) - e[:, 0])


@family.form(lambda x: x[0] - torch.logsumexp(x, 0), vector())
def vector_softmax(x):
    return torch.log(x[0].exp() / x.exp().sum())


@family.form(lambda x: lsm(x, 0)[1], vector("mild extreme low saturated"))
def vector_normalised(x):
    w = torch.exp(x)
    w = w / torch.sum(w)
    return torch.log(w)[1]


@family.form(lambda x: torch.logsumexp(x.view(2, 2, 5), 1), PLAIN)
def summed_pairs_by_reshape(x):
    return torch.log(x.exp().reshape(2, 2, 5).sum(1))


@family.form(lambda x: torch.stack([torch.logsumexp(x[[0, 2]], 0), torch.logsumexp(x[[1, 3]], 0)]), PLAIN)
def segment_totals(x):
    found = torch.zeros(2, 5, dtype=x.dtype).index_add_(0, torch.tensor([0, 1, 0, 1]), x.exp())
    return torch.log(found)


@family.form(lambda x: torch.stack([torch.logsumexp(x[[0, 2]], 0), torch.logsumexp(x[[1, 3]], 0)]), PLAIN)
def segment_totals_by_scatter(x):
    where = torch.tensor([0, 1, 0, 1])[:, None].expand_as(x)
    return torch.log(torch.zeros(2, 5, dtype=x.dtype).scatter_add_(0, where, x.exp()))


@family.form(lambda x: 2 * lse(x) - lse(2 * x), PLAIN)
def effective_sample_size(x):
    w = torch.exp(x)
    return torch.log(w.sum(1) ** 2 / (w**2).sum(1))


@family.form(lambda x: (torch.exp(lsm(x)) * x).sum(1) - lse(x), PLAIN)
def negative_entropy_by_moments(x):
    e = x.exp()
    z = e.sum(1)
    return (e * x).sum(1) / z - torch.log(z)
