"""Binary cross-entropy by hand, with and without epsilons."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from forms.exact import (
    log_add,
)
from forms.inputs import binary
from forms.registry import Family

hand = Family("binary cross-entropy by hand", binary())
FLOORED = binary("mild extreme=saturated")  # torch floors these logarithms at -100, which is part of them


def bce(x, y):
    return F.binary_cross_entropy_with_logits(x, y, reduction="none")


# Binary cross-entropy.
@hand.form(bce, constant=(1,))
def bce_by_hand(x, y):
    p = torch.sigmoid(x)
    return -(y * torch.log(p) + (1 - y) * torch.log(1 - p))


@hand.form(bce, binary("mild extreme saturated"), constant=(1,))
def bce_by_hand_with_log1p(x, y):
    p = 1 / (1 + torch.exp(-x))
    return -y * torch.log(p) - (1 - y) * torch.log1p(-p)


@hand.form(bce, constant=(1,))
def bce_selected_by_where(x, y):
    p = torch.sigmoid(x)
    return -torch.log(torch.where(y == 1, p, 1 - p))


@hand.form(bce, binary("mild extreme saturated"), constant=(1,))
def bce_of_p_t(x, y):
    p = x.sigmoid()
    p_t = p * y + (1 - p) * (1 - y)
    return -p_t.log()


@hand.form(bce, binary("mild extreme saturated"), constant=(1,))
def bce_of_powers(x, y):
    p = torch.sigmoid(x)
    return -torch.log(p**y * (1 - p) ** (1 - y))


@hand.form(lambda x, y: bce(x, y).mean(), binary("mild extreme saturated"), constant=(1,))
def bce_by_masks(x, y):
    p = torch.sigmoid(x)
    return -(torch.log(p[y == 1]).sum() + torch.log(1 - p[y == 0]).sum()) / len(x)


@hand.form(bce, binary("mild extreme saturated"), constant=(1,))
def bce_by_signed_scores(x, y):
    return -torch.log(torch.sigmoid((2 * y - 1) * x))


@hand.form(bce, binary("mild extreme saturated"), constant=(1,))
def logistic_loss(x, y):
    return torch.log(1 + torch.exp(-(2 * y - 1) * x))


@hand.form(bce, binary("mild extreme saturated"), constant=(1,))
def logits_minus_log(x, y):
    return torch.log(1 + torch.exp(x)) - x * y


@hand.form(bce, FLOORED, constant=(1,), saturated="repair")
def functional_bce(x, y):
    return F.binary_cross_entropy(torch.sigmoid(x), y, reduction="none")


@hand.form(lambda x, y: bce(x, y).mean(), FLOORED, constant=(1,), saturated="repair")
def module_bce(x, y):
    return nn.BCELoss()(nn.Sigmoid()(x), y)


@hand.form(lambda x, y: bce(x, y), FLOORED, constant=(1,), saturated="repair")
def functional_bce_with_a_view(x, y):
    return F.binary_cross_entropy(torch.sigmoid(x).view(2, 3), y.view(2, 3), reduction="none").view(-1)


@hand.form(
    lambda x, y: 0.3 * y * F.softplus(-x) + (1 - y) * F.softplus(x), binary("mild extreme saturated"), constant=(1,)
)
def weighted_bce(x, y):
    p = torch.sigmoid(x)
    return -(0.3 * y * p.log() + (1 - y) * (1 - p).log())


@hand.form(lambda x, y: bce(x, y * 0.9 + 0.05), binary("mild extreme saturated"), constant=(1,))
def smoothed_bce(x, y):
    p, soft = torch.sigmoid(x), y * 0.9 + 0.05
    return -(soft * torch.log(p) + (1 - soft) * torch.log(1 - p))


def eps_bce(x, y, eps):
    low = math.log(eps) if eps else -math.inf
    return -(y * log_add(F.logsigmoid(x), low) + (1 - y) * log_add(F.logsigmoid(-x), low))


def floor_bce(x, y, eps):
    """log(clamp(p, eps, 1 - eps)) and log(1 - clamp(p, eps, 1 - eps))."""
    if not eps:
        return bce(x, y)
    a, b = F.logsigmoid(x), F.logsigmoid(-x)
    low, high = math.log(eps), math.log1p(-eps)
    return -(y * a.clamp(low, high) + (1 - y) * b.clamp(low, high))


@hand.form(eps_bce, binary("mild extreme=saturated large=extreme"), constant=(1,), epsilon="both")
def bce_with_eps(x, y, eps=1e-8):
    p = torch.sigmoid(x)
    return -(y * torch.log(p + eps) + (1 - y) * torch.log(1 - p + eps))


@hand.form(eps_bce, binary("mild extreme=saturated large=extreme"), constant=(1,), epsilon="both")
def bce_with_eps_in_front(x, y, eps=1e-12):
    p = x.sigmoid()
    return -y * (eps + p).log() - (1.0 - y) * (eps + (1.0 - p)).log()


@hand.form(floor_bce, binary("mild extreme saturated"), constant=(1,), epsilon="both")
def bce_clamped(x, y, eps=1e-8):
    p = torch.clamp(torch.sigmoid(x), eps, 1 - eps)
    return -(y * torch.log(p) + (1 - y) * torch.log(1 - p))


@hand.form(floor_bce, binary("mild extreme saturated"), constant=(1,), epsilon="drop")
def bce_clamped_coarsely(x, y, eps=1e-4):
    p = torch.sigmoid(x).clamp(min=eps, max=1 - eps)
    return -(y * torch.log(p) + (1 - y) * torch.log(1 - p))


@hand.form(floor_bce, binary("mild extreme saturated"), constant=(1,), epsilon="drop", saturated="repair")
def bce_clamped_functional(x, y, eps=1e-6):
    return F.binary_cross_entropy(torch.sigmoid(x).clamp(eps, 1 - eps), y, reduction="none")
