"""Epsilons between softmax and log: kept exactly, or dropped as guards."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from forms.exact import eps_log, floor_log, log_add, log_others, lsm, picked
from forms.inputs import classes
from forms.registry import Family

family = Family("epsilons", classes("mild extreme masked saturated"))
EPSILON = 1e-10


def kept(x: Tensor, y: Tensor, eps: float) -> Tensor:
    return -eps_log(picked(x, y), eps)


def floored(x: Tensor, y: Tensor, eps: float) -> Tensor:
    return -floor_log(picked(x, y), eps)


def pick(p: Tensor, y: Tensor) -> Tensor:
    return p[torch.arange(len(y)), y]


ADDED = {
    "after_picking": lambda x, y, eps: torch.log(pick(torch.softmax(x, 1), y) + eps),
    "before_picking": lambda x, y, eps: pick(torch.log(torch.softmax(x, 1) + eps), y),
    "in_front": lambda x, y, eps: pick(torch.log(eps + F.softmax(x, 1)), y),
    "to_gathered": lambda x, y, eps: (F.softmax(x, -1).gather(1, y[:, None]) + eps).log()[:, 0],
    "by_add": lambda x, y, eps: pick(torch.softmax(x, 1).add(eps).log(), y),
    "by_torch_add": lambda x, y, eps: pick(torch.log(torch.add(torch.softmax(x, 1), eps)), y),
    "in_place": lambda x, y, eps: pick((torch.softmax(x, 1) * 1.0).add_(eps).log_(), y),
    "augmented": lambda x, y, eps: pick(augmented(torch.softmax(x, 1), eps).log(), y),
    "of_ones": lambda x, y, eps: pick(torch.log(torch.softmax(x, 1) + eps * torch.ones_like(x)), y),
    "as_tensor": lambda x, y, eps: pick(torch.log(torch.softmax(x, 1) + torch.tensor(eps, dtype=x.dtype)), y),
    "to_one_hot_sum": lambda x, y, eps: torch.log((F.softmax(x, 1) * F.one_hot(y, 5)).sum(1) + eps),
    "twice": lambda x, y, eps: torch.log(pick(F.softmax(x, 1) + eps / 2, y) + eps / 2),
    "log2": lambda x, y, eps: torch.log2(pick(F.softmax(x, 1), y) + eps) * math.log(2),
}


def augmented(p: Tensor, eps: float) -> Tensor:
    p = p * 1.0
    p += eps
    return p


for title, log in ADDED.items():
    family.form(kept, epsilon="drop", name=f"added_{title}")(lambda x, y, eps=1e-8, log=log: -log(x, y, eps))

CLAMPED = {
    "min": lambda x, y, eps: torch.log(pick(torch.softmax(x, 1), y).clamp(min=eps)),
    "positional": lambda x, y, eps: pick(torch.log(torch.softmax(x, 1).clamp(eps)), y),
    "torch_clamp": lambda x, y, eps: pick(torch.log(torch.clamp(F.softmax(x, 1), min=eps)), y),
    "clamp_min": lambda x, y, eps: pick(F.softmax(x, 1).clamp_min(eps).log(), y),
    "clip": lambda x, y, eps: pick(F.softmax(x, 1).clip(min=eps).log(), y),
    "to_one": lambda x, y, eps: pick(torch.clamp(F.softmax(x, 1), eps, 1.0).log(), y),
    "in_place": lambda x, y, eps: pick(F.softmax(x, 1).clone().clamp_(min=eps).log(), y),
    "maximum": lambda x, y, eps: pick(torch.maximum(F.softmax(x, 1), torch.tensor(eps, dtype=x.dtype)).log(), y),
    "torch_max": lambda x, y, eps: pick(torch.max(F.softmax(x, 1), torch.full_like(x, eps)).log(), y),
    "threshold": lambda x, y, eps: torch.log(F.threshold(pick(F.softmax(x, 1), y), eps, eps)),
}
for title, log in CLAMPED.items():
    family.form(floored, epsilon="drop", name=f"clamped_{title}")(lambda x, y, eps=1e-12, log=log: -log(x, y, eps))


@family.form(lambda x, y, eps: -floor_log(picked(x, y), eps, 1 - eps) if eps else -picked(x, y), epsilon="drop")
def clamped_on_both_sides(x, y, eps=1e-5):
    p = F.softmax(x, dim=-1)
    p = torch.clamp(p, min=eps, max=1 - eps)
    return -torch.log(p[torch.arange(4), y])


@family.form(lambda x, y: -eps_log(picked(x, y), EPSILON), classes("mild extreme=half half"))
def module_constant_in_half(x, y):
    return -torch.log(F.softmax(x, 1)[torch.arange(4), y] + EPSILON)


@family.form(lambda x, y, eps: -eps_log(picked(x, y), eps), classes("mild extreme=half half"), epsilon="both")
def eps_that_half_precision_does_not_have(x, y, eps=1e-8):
    return -torch.log(F.softmax(x, 1) + eps).gather(1, y[:, None])[:, 0]


@family.form(lambda x, y, eps: -floor_log(picked(x, y), eps), classes("mild extreme=half half"), epsilon="both")
def clamp_that_half_precision_does_not_have(x, y, eps=1e-9):
    return -F.softmax(x, 1).clamp(min=eps).log().gather(1, y[:, None])[:, 0]


def shifted(x: Tensor) -> Tensor:
    return x - x.detach().amax(1, keepdim=True)


@family.form(
    lambda x, y: (
        -(shifted(x) - log_add(torch.logsumexp(shifted(x), 1, keepdim=True), math.log(1e-8)))[torch.arange(4), y]
    )
)
def eps_in_the_denominator_after_a_shift(x, y):
    e = torch.exp(x - x.detach().amax(1, keepdim=True))
    p = e / (e.sum(1, keepdim=True) + 1e-8)
    return -torch.log(p[torch.arange(4), y])


@family.form(lambda x, y: -(x - log_add(torch.logsumexp(x, 1, keepdim=True), math.log(1e-6)))[torch.arange(4), y])
def eps_in_the_denominator(x, y):
    e = torch.exp(x)
    return -torch.log(e / (e.sum(1, keepdim=True) + 1e-6))[torch.arange(4), y]


@family.form(lambda x, y, eps: -eps_log(picked(x, y), eps), epsilon="both")
def eps_on_an_overflowing_quotient(x, y, eps=1e-8):
    e = torch.exp(x)
    p = e / e.sum(1, keepdim=True)
    return -torch.log(p + eps)[torch.arange(4), y]


@family.form(
    lambda x, y: (
        -(log_add(x, math.log(1e-10)) - log_add(torch.logsumexp(x, 1, keepdim=True), math.log(1e-10)))[
            torch.arange(4), y
        ]
    )
)
def eps_on_both_sides_of_the_ratio(x, y):
    e = torch.exp(x)
    return -torch.log((e + 1e-10) / (e.sum(1, keepdim=True) + 1e-10))[torch.arange(4), y]


@family.form(
    lambda x, y, eps: torch.stack([-eps_log(log_others(x), eps).sum(1)]),
    classes("mild extreme saturated"),
    epsilon="both",
)
def complement_with_eps(x, y, eps=1e-8):
    return -torch.log(1 - torch.softmax(x, 1) + eps).sum(1)[None]


@family.form(
    lambda x, y, eps: -eps_log(log_others(x), eps)[torch.arange(4), y],
    classes("mild extreme saturated"),
    epsilon="both",
)
def complement_with_eps_inside(x, y, eps=1e-12):
    return -torch.log((1.0 + eps) - torch.softmax(x, 1))[torch.arange(4), y]


@family.form(
    lambda x, y, eps: -floor_log(log_others(x), eps), classes("mild extreme=saturated large=extreme"), epsilon="both"
)
def complement_clamped(x, y, eps=1e-12):
    return -torch.log((1 - torch.softmax(x, 1)).clamp(min=eps))


@family.form(lambda x, y, eps: -eps_log(torch.logsumexp(x, 1), eps), classes("mild extreme"), epsilon="both")
def eps_on_a_total(x, y, eps=1e-8):
    return -torch.log(torch.exp(x).sum(1) + eps)


@family.form(lambda x, y, eps: -floor_log(torch.logsumexp(x, 1), eps), classes("mild extreme"), epsilon="both")
def clamped_total(x, y, eps=1e-10):
    return -x.exp().sum(1).clamp(min=eps).log()


@family.form(
    lambda x, y: -(log_add(lsm(x) + math.log(0.99), math.log(0.01 / 5)))[torch.arange(4), y],
    classes("mild extreme saturated"),
)
def mixed_with_uniform_by_hand(x, y):
    e = x.exp()
    p = 0.99 * (e / e.sum(1, keepdim=True)) + 0.01 / 5
    return -torch.log(p)[torch.arange(4), y]


@family.twin("mixed_with_uniform_by_hand", stable=lambda x, y: -(log_add(lsm(x) + math.log(0.99), math.log(0.01 / 5))))
def mixed_with_uniform(x, y):
    return -torch.log(0.99 * torch.softmax(x, 1) + 0.01 / 5)


@family.twin("added_before_picking__drop", stable=lambda x, y: -log_add(lsm(x), math.log(0.05)), epsilon="drop")
def large_epsilon_is_no_guard(x, y):
    return -torch.log(torch.softmax(x, 1) + 0.05)


@family.form(lambda x, y: -picked(x + 1e-8, y), classes("mild extreme masked saturated"))
def eps_on_the_logits(x, y):
    return -torch.log(F.softmax(x + 1e-8, 1))[torch.arange(4), y]
