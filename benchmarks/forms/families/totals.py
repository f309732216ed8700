"""Logarithms of sums of exponentials: written out, accumulated, averaged."""

from __future__ import annotations

import math

import torch

from forms.exact import log_add, log_sub
from forms.inputs import classes, free, randn
from forms.registry import Family

family = Family("log of a sum of exponentials", classes("mild extreme masked half", target=False))
rows = "mild extreme masked"
PLAIN = classes("mild extreme", target=False)


def lse(x, dim=1):
    return torch.logsumexp(x, dim)


TOTALS = {
    "torch": lambda x: torch.log(torch.sum(torch.exp(x), dim=1)),
    "method": lambda x: x.exp().sum(1).log(),
    "last_dim": lambda x: x.exp().sum(-1).log(),
    "axis": lambda x: torch.log(torch.sum(x.exp(), axis=1)),
    "keepdim": lambda x: torch.log(x.exp().sum(1, keepdim=True)).squeeze(1),
    "in_place": lambda x: (x * 1.0).exp_().sum(1).log_(),
    "transposed": lambda x: x.t().exp().sum(0).log(),
    "loop": lambda x: torch.log(sum(torch.exp(column) for column in x.unbind(1))),
    "stacked": lambda x: torch.log(torch.stack([c.exp() for c in x.unbind(1)]).sum(0)),
    "dot_with_itself": lambda x: torch.log(torch.einsum("ij,ij->i", (x / 2).exp(), (x / 2).exp())),
    "sum_of_squares": lambda x: torch.log((x / 2).exp().pow(2).sum(1)),
    "squared_norm": lambda x: 2 * torch.log(torch.norm((x / 2).exp(), dim=1)),
    "bmm": lambda x: torch.log(torch.bmm(x.exp().unsqueeze(1), torch.ones(4, 5, 1, dtype=x.dtype))).view(-1),
    "mean_times_count": lambda x: torch.log(x.exp().mean(1) * x.size(1)),
    "half_split": lambda x: torch.log(x[:, :2].exp().sum(1) + x[:, 2:].exp().sum(1)),
    "shifted_by_hand": lambda x: torch.log(torch.exp(x - 2.0).sum(1)) + 2.0,
    "base_two": lambda x: torch.log2(x.exp().sum(1)) * math.log(2),
    "cumsum_last": lambda x: torch.log(torch.cumsum(x.exp(), 1)[:, -1]),
    "reduce_by_add": lambda x: torch.log(torch.add(x[:, :1].exp().sum(1), x[:, 1:].exp().sum(1))),
}
for title, total in TOTALS.items():
    kinds = (
        "mild extreme masked"
        if title in ("dot_with_itself", "sum_of_squares", "squared_norm", "bmm")
        else "mild extreme masked half"
    )
    family.form(lse, classes(kinds, target=False), name=f"total_{title}")(total)


@family.form(lse)
def total_accumulated_from_zero(x):
    total = 0
    for j in range(x.shape[1]):
        total += torch.exp(x[:, j])
    return torch.log(total)


@family.form(lse)
def total_accumulated_from_zeros(x):
    total = torch.zeros(x.shape[0], dtype=x.dtype)
    for j in range(x.shape[1]):
        total = total + torch.exp(x[:, j])
    return torch.log(total)


@family.form(lse)
def total_accumulated_in_place(x):
    total = torch.zeros(x.shape[0], dtype=x.dtype)
    for j in range(x.shape[1]):
        total += torch.exp(x[:, j])
    return total.log()


@family.form(lse)
def total_accumulated_by_add(x):
    total = torch.zeros_like(x[:, 0])
    for column in x.unbind(1):
        total.add_(column.exp())
    return torch.log(total)


@family.form(lse)
def total_in_a_list(x):
    parts = []
    for j in range(x.shape[1]):
        part = x[:, j].exp()
        parts.append(part)
    return torch.log(torch.stack(parts, dim=-1).sum(-1))


@family.form(lambda x: torch.logaddexp(x[0], x[1]), PLAIN)
def two_exponentials(x):
    return torch.log(torch.exp(x[0]) + torch.exp(x[1]))


@family.form(
    lambda x: log_sub(x[0], x[1]),
    free(
        lambda: (torch.tensor([[1.0, 2, 3], [0.5, -1, 2.9]]),),
        lambda: (torch.tensor([[1000.0, -200, 25], [999, -203, 24.99]]),),
    ),
)
def difference_of_two_exponentials(x):
    return torch.log(x[0].exp() - x[1].exp())


@family.form(lambda x: lse(x) - math.log(5), PLAIN)
def log_mean_exp(x):
    return torch.log(torch.mean(torch.exp(x), dim=1))


@family.form(lambda x: torch.logsumexp(x, (0, 1)) - math.log(20), PLAIN)
def log_mean_exp_of_all(x):
    return torch.log(torch.exp(x).mean())


@family.form(lambda x: lse(x) - math.log(5), PLAIN)
def log_mean_exp_by_division(x):
    return torch.log(x.exp().sum(1) / x.shape[1])


@family.form(lambda x: torch.logsumexp(x, (0, 1)), PLAIN)
def total_of_all(x):
    return torch.log(torch.exp(x).sum())


@family.form(lambda x: torch.logsumexp(x.view(2, 2, 5), (0, 2)), PLAIN)
def total_over_two_dims(x):
    return torch.log(x.view(2, 2, 5).exp().sum(dim=(0, 2)))


@family.form(lambda x: lse(x).pow(2).mean(), PLAIN)
def z_loss(x):
    return torch.log(torch.exp(x).sum(-1)).pow(2).mean()


@family.form(lambda x: lse(10 * x) / 10, free(lambda: (randn(4, 5),), lambda: (randn(4, 5) * 20,)))
def smooth_maximum(x):
    return torch.log(torch.exp(10 * x).sum(1)) / 10


@family.form(lambda x: -0.5 * lse(-x / 0.5), PLAIN)
def soft_minimum(x):
    return -0.5 * torch.log(torch.sum(torch.exp(-x / 0.5), dim=1))


@family.form(lambda x: 0.1 * lse(x / 0.1), free(lambda: (randn(4, 5),), lambda: (randn(4, 5) * 30,)))
def energy_score(x):
    temperature = 0.1
    return temperature * torch.log(torch.exp(x / temperature).sum(dim=1))


@family.form(lambda x: log_add(lse(x), 0.0), PLAIN)
def one_plus_total(x):
    return torch.log(1 + x.exp().sum(1))


@family.form(lambda x: log_add(lse(x), 0.0), PLAIN)
def log1p_of_total(x):
    return torch.log1p(x.exp().sum(1))


@family.form(lambda x: log_add(torch.logsumexp(x.flatten(), 0), 0.0), PLAIN)
def lifted_structure(x):
    return torch.log(1 + torch.sum(torch.exp(x)))


@family.form(
    lambda x: (
        log_add(torch.logsumexp(-2 * (x[0] - 0.5), 0), 0.0) / 2
        + log_add(torch.logsumexp(50 * (x[1] - 0.5), 0), 0.0) / 50
    ),
    PLAIN,
)
def multi_similarity(x):
    positive = 1.0 / 2 * torch.log(1 + torch.sum(torch.exp(-2 * (x[0] - 0.5))))
    negative = 1.0 / 50 * torch.log(1 + torch.sum(torch.exp(50 * (x[1] - 0.5))))
    return positive + negative


@family.form(lambda x: log_add(torch.logsumexp(x[2, 1:] - x[2, 0], 0), 0.0), PLAIN)
def n_pair(x):
    return torch.log(1 + torch.exp(x[2, 1:] - x[2, 0]).sum())


@family.form(lambda x: torch.nn.functional.softplus(torch.logsumexp(x[0], 0) + torch.logsumexp(-x[1], 0)), PLAIN)
def circle_loss(x):
    return torch.log(1 + torch.exp(x[0]).sum() * torch.exp(-x[1]).sum())


@family.form(
    lambda x: torch.logcumsumexp(x, 1),
    free(
        PLAIN["mild"],
        lambda: (torch.tensor([[200.0, 1, -200, 3, 250]]),),
        low=lambda: (torch.tensor([[-300.0, -1, -200, 3, -250]]),),
    ),
)
def cumulative_total(x):
    return torch.log(torch.cumsum(torch.exp(x), dim=1))


@family.form(
    lambda x: torch.logcumsumexp(x.flip(1), 1).flip(1),
    free(
        PLAIN["mild"],
        lambda: (torch.tensor([[200.0, 1, -200, 3, 250]]),),
        low=lambda: (torch.tensor([[-300.0, -1, -200, 3, -250]]),),
    ),
)
def cumulative_total_from_behind(x):
    return torch.log(x.exp().flip(1).cumsum(1).flip(1))
