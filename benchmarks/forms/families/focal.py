"""Focal losses and their kin, with sigmoids and with softmaxes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from forms.exact import eps_log, floor_log, log_others, nll, picked
from forms.inputs import binary, classes
from forms.registry import Family

family = Family("focal", binary("mild extreme saturated"))
TARGETED = classes("mild extreme saturated")


def focal(x, y, gamma=2.0, alpha=0.25):
    a, b = F.logsigmoid(x), F.logsigmoid(-x)
    return -(alpha * y * torch.exp(gamma * b) * a + (1 - alpha) * (1 - y) * torch.exp(gamma * a) * b)


@family.form(focal, constant=(1,))
def focal_of_sigmoid(x, y):
    p = torch.sigmoid(x)
    positive = 0.25 * y * (1 - p) ** 2 * torch.log(p)
    negative = 0.75 * (1 - y) * p**2 * torch.log(1 - p)
    return -(positive + negative)


@family.form(focal, constant=(1,))
def focal_of_p_t(x, y):
    p = x.sigmoid()
    p_t = torch.where(y == 1, p, 1 - p)
    alpha_t = torch.where(y == 1, 0.25, 0.75)
    return -alpha_t * (1 - p_t).pow(2) * p_t.log()


@family.form(focal, binary("mild extreme=saturated"), constant=(1,), saturated="repair")
def focal_of_bce(x, y):
    p = torch.sigmoid(x)
    p_t = p * y + (1 - p) * (1 - y)
    loss = F.binary_cross_entropy(p, y, reduction="none")
    return (0.25 * y + 0.75 * (1 - y)) * (1 - p_t) ** 2 * loss


@family.form(focal, constant=(1,))
def focal_of_distances(x, y):
    p = torch.sigmoid(x)
    distance = (y - p).abs()
    return -(0.25 * y + 0.75 * (1 - y)) * distance**2 * torch.log(1 - distance)


@family.form(lambda x, y: -(y * F.logsigmoid(x) + (1 - y) * F.logsigmoid(-x)).mean(), constant=(1,))
def distance_to_the_other_label(x, y):
    return -torch.log((torch.sigmoid(x) - (1 - y)).abs()).mean()


@family.twin("distance_to_the_other_label", constant=(1,))
def distance_to_soft_labels(x, y):
    return -torch.log(1 - (y * 0.9 + 0.05 - torch.sigmoid(x)).abs()).mean()


@family.form(lambda x, y: focal(x, y, 0.5), constant=(1,))
def focal_with_a_fractional_gamma(x, y):
    p = torch.sigmoid(x)
    p_t = p * y + (1 - p) * (1 - y)
    alpha_t = 0.25 * y + 0.75 * (1 - y)
    return -alpha_t * (1 - p_t) ** 0.5 * torch.log(p_t)


def centernet(x, y):
    a, b = F.logsigmoid(x), F.logsigmoid(-x)
    positive = a * torch.exp(2 * b) * y
    negative = b * torch.exp(2 * a) * (1 - y)
    return -(positive.sum() + negative.sum()) / y.sum()


@family.form(centernet, constant=(1,))
def centernet_without_a_clamp(x, y):
    p = torch.sigmoid(x)
    is_positive, is_negative = y.eq(1).float(), y.lt(1).float()
    positive = torch.log(p) * torch.pow(1 - p, 2) * is_positive
    negative = torch.log(1 - p) * torch.pow(p, 2) * torch.pow(1 - y, 4) * is_negative
    return -(positive.sum() + negative.sum()) / is_positive.float().sum()


def _sigmoid(x):
    """As in another file."""
    return torch.clamp(x.sigmoid(), min=1e-4, max=1 - 1e-4)


def _clamped_in_place(x):
    p = x.sigmoid() * 1.0
    return p.clamp_(min=1e-4, max=1 - 1e-4)


def centernet_clamped(x, y):
    low, high = math.log(1e-4), math.log1p(-1e-4)
    a, b = F.logsigmoid(x).clamp(low, high), F.logsigmoid(-x).clamp(low, high)
    return -(a * torch.exp(2 * b) * y + b * torch.exp(2 * a) * (1 - y)).sum() / y.sum()


@family.twin("centernet_without_a_clamp", stable=centernet_clamped, constant=(1,))
def centernet_clamped_elsewhere(x, y):
    p = _sigmoid(x)
    positive = torch.log(p) * torch.pow(1 - p, 2) * y
    negative = torch.log(1 - p) * torch.pow(p, 2) * torch.pow(1 - y, 4)
    return -(positive.sum() + negative.sum()) / y.sum()


@family.twin("centernet_without_a_clamp", stable=centernet_clamped, constant=(1,))
def centernet_clamped_in_place(x, y):
    p = _clamped_in_place(x)
    positive = torch.log(p) * torch.pow(1 - p, 2) * y
    negative = torch.log(1 - p) * torch.pow(p, 2) * torch.pow(1 - y, 4)
    return -(positive.sum() + negative.sum()) / y.sum()


def asymmetric(x, y, eps):
    a, b = F.logsigmoid(x), F.logsigmoid(-x)
    shifted = torch.minimum(b.exp() + 0.05, torch.ones_like(b))
    shifted_log = torch.log(shifted.clamp(min=eps))
    weight = torch.where(y == 1, b.exp(), (1 - shifted) ** 4)
    return -(y * floor_log(a, eps) + (1 - y) * shifted_log) * weight


@family.form(asymmetric, constant=(1,), epsilon="drop")
def asymmetric_loss(x, y, eps=1e-8):
    p = torch.sigmoid(x)
    negative = (1 - p + 0.05).clamp(max=1)
    loss = y * torch.log(p.clamp(min=eps)) + (1 - y) * torch.log(negative.clamp(min=eps))
    weight = torch.pow(1 - p * y - negative * (1 - y), 1 * y + 4 * (1 - y))
    return -loss * weight


# Of softmaxes.
def softmax_focal(x, y, gamma=2.0):
    return torch.exp(gamma * log_others(x).gather(1, y[:, None])[:, 0]) * nll(x, y)


@family.form(softmax_focal, TARGETED)
def focal_of_softmax(x, y):
    p = F.softmax(x, 1)[torch.arange(4), y]
    return -((1 - p) ** 2) * torch.log(p)


@family.form(softmax_focal, TARGETED)
def focal_of_gathered(x, y):
    p_t = F.softmax(x, dim=-1).gather(1, y.view(-1, 1)).view(-1)
    return -torch.pow(1 - p_t, 2.0) * p_t.log()


@family.form(softmax_focal, TARGETED)
def focal_of_one_hot(x, y):
    p = (F.softmax(x, 1) * F.one_hot(y, 5)).sum(1)
    return -(1 - p).square() * p.log()


@family.form(softmax_focal, TARGETED)
def focal_of_detached_p(x, y):
    log_p = torch.log(F.softmax(x, 1)).gather(1, y[:, None])[:, 0]
    p = log_p.exp()
    return -((1 - p) ** 2) * log_p


@family.form(
    lambda x, y, eps: -torch.exp(2 * log_others(x).gather(1, y[:, None])[:, 0]) * eps_log(picked(x, y), eps),
    TARGETED,
    epsilon="drop",
)
def focal_of_softmax_with_eps(x, y, eps=1e-10):
    p = F.softmax(x, 1)[torch.arange(4), y]
    return -((1 - p) ** 2) * torch.log(p + eps)


@family.form(lambda x, y: nll(x, y) + 1 - torch.exp(picked(x, y)), TARGETED)
def poly_loss(x, y):
    p = F.softmax(x, 1)[torch.arange(4), y]
    return -torch.log(p) + 1.0 * (1 - p)


@family.form(lambda x, y: (1 - torch.exp(0.7 * picked(x, y))) / 0.7, TARGETED)
def generalised_cross_entropy(x, y):
    p = F.softmax(x, 1)[torch.arange(4), y]
    return (1 - p**0.7) / 0.7


@family.form(lambda x, y: nll(x, y) - 4 * (1 - torch.exp(picked(x, y))) * -1, TARGETED)
def symmetric_cross_entropy(x, y):
    p = F.softmax(x, 1)
    hot = F.one_hot(y, 5).to(x.dtype).clamp(min=math.exp(-4))
    return -torch.log(p)[torch.arange(4), y] - (p * torch.log(hot)).sum(1)
