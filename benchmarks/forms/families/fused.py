"""Sums, products, windows and scattered extrema that one call computes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from forms.exact import log_add, lsm
from forms.inputs import classes, pair
from forms.registry import Family

PLAIN = classes("mild extreme half", target=False)
family = Family("sums and products in one call", PLAIN)
PAIRS = pair("mild extreme half")
STEPS = torch.tensor(
    [[0.9, 0.1, 0, 0, 0], [0, 0.9, 0.1, 0, 0], [0, 0, 0.9, 0.1, 0], [0, 0, 0, 0.9, 0.1], [0.1, 0, 0, 0, 0.9]]
)
PLACES = torch.tensor([0, 1, 0, 1, 0])


def product(a, b):
    return torch.logsumexp(a[:, :, None] + b, 1)


@family.form(lambda x, z: log_add(lsm(z) + math.log(0.25), product(lsm(x), STEPS.to(x).log()) + math.log(0.75)), PAIRS)
def addmm_with_transitions(x, z):
    return torch.log(torch.addmm(F.softmax(z, 1), F.softmax(x, 1), STEPS.to(x), beta=0.25, alpha=0.75))


@family.form(lambda x, z: product(lsm(x), lsm(z.T)), PAIRS)
def addmm_to_nothing(x, z):
    return torch.zeros(4, 4, dtype=x.dtype).addmm(F.softmax(x, 1), F.softmax(z.T, 1)).log()


@family.form(lambda x, z: log_add(lsm(z), lsm(x)[None] @ torch.zeros(5, 5).to(x) - math.inf), PAIRS, name="baddbmm")
def _baddbmm(x, z):
    return torch.baddbmm(F.softmax(z, 1)[None], F.softmax(x, 1)[None], torch.zeros(1, 5, 5, dtype=x.dtype)).log()


@family.form(lambda x, z: log_add(lsm(z), lsm(x) + F.logsigmoid(z) + math.log(2)), PAIRS)
def addcmul_of_gates(x, z):
    return torch.addcmul(torch.softmax(z, 1), torch.softmax(x, 1), torch.sigmoid(z), value=2).log()


@family.form(lambda x, z: log_add(lsm(z), lsm(x) - lsm(z)), pair("mild extreme"))
def addcdiv_of_ratios(x, z):
    p, q = torch.softmax(x, 1), torch.softmax(z, 1)
    return torch.log(q.addcdiv(p, q))


@family.form(lambda x, z: product(product(lsm(x), z.T), lsm(x)), PAIRS)
def multi_dot_of_exponentials(x, z):
    return torch.linalg.multi_dot([F.softmax(x, 1), torch.exp(z.T), F.softmax(x, 1)]).log()


@family.form(lambda x: product(product(lsm(x[:, :4]), lsm(x[:, :4])), lsm(x[:, :4])))
def three_steps_of_a_chain(x):
    return torch.linalg.matrix_power(F.softmax(x[:, :4], 1), 3).log()


@family.form(lambda x, y: lsm(x)[y], classes("mild extreme saturated half"))
def rows_by_embedding(x, y):
    return torch.log(F.embedding(y, F.softmax(x, 1)))


@family.form(lambda x: lsm(x).unfold(1, 2, 1).logsumexp(-1))
def neighbours_by_unfold(x):
    return F.softmax(x, 1).unfold(1, 2, 1).sum(-1).log()


@family.form(
    lambda x: log_add(x[:, 1:], x[:, :-1]).logsumexp(1) - math.log(4), classes("mild extreme half", target=False)
)
def evidence_by_trapezoids(x):
    return torch.trapezoid(torch.exp(x), dx=0.5, dim=1).log()


@family.form(lambda x: torch.stack([lsm(x)[:, ::2].amax(1), lsm(x)[:, 1::2].amax(1)], 1))
def largest_of_each_group(x):
    groups = torch.zeros(4, 2, dtype=x.dtype)
    return groups.scatter_reduce(1, PLACES.expand(4, 5), F.softmax(x, 1), "amax").log()


@family.form(lambda x: torch.stack([lsm(x)[:, ::2].logsumexp(1), lsm(x)[:, 1::2].logsumexp(1)], 1))
def total_of_each_group(x):
    groups = torch.zeros(4, 2, dtype=x.dtype)
    return groups.scatter_reduce_(1, PLACES.expand(4, 5), F.softmax(x, 1), reduce="sum").log()


@family.form(lambda x: torch.logsumexp(lsm(x)[:, 1:], 1))
def total_without_what_is_missing(x):
    p = torch.softmax(x, 1)[:, 1:]
    return torch.log(torch.nansum(p, 1))


around = Family("layers and sums around probabilities", classes("mild extreme", target=False))
CALLS = {
    "addmm_as_a_layer": lambda x: torch.addmm(torch.ones(5), torch.softmax(x, 1), x.T @ x).relu() + 1,
    "attention_by_baddbmm": lambda x: torch.baddbmm(x[None], torch.softmax(x @ x.T, 1)[None], x[None]),
    "moving_squares": lambda x: (x.detach() * 0.9).addcmul(x, torch.sigmoid(x), value=0.1),
    "windows_of_a_softmax": lambda x: torch.softmax(x, 1).unfold(1, 3, 1) * x[:, :3, None],
    "pooled_gates": lambda x: F.avg_pool1d(torch.sigmoid(x) * x, 2, 1, 1),
    "power_of_a_transition": lambda x: torch.linalg.matrix_power(torch.softmax(x[:, :4], 1), 5) @ x,
    "missing_left_out": lambda x: torch.nansum(torch.softmax(x, 1) * torch.where(x > 0, x, torch.nan), 1),
    "table_of_attention": lambda x: F.embedding(torch.tensor([0, 2]), torch.softmax(x, 1)) @ x.T,
}
for title, call in CALLS.items():
    around.innocent(name=title)(call)
