"""Divergences of two distributions, distillation, complementary labels, label smoothing, soft targets."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from forms.exact import entropy, log_others, lsm, nll, picked
from forms.inputs import classes, pair
from forms.registry import Family

family = Family("entropies and divergences", pair())
ONE = classes("mild extreme masked half", target=False)  # where 0 log 0 is defined
UNMASKED = classes("mild extreme half", target=False)
TARGETED = classes("mild extreme")
COMPLEMENT = classes("mild extreme=saturated large=extreme")


# Two distributions.
def kl(a, b):
    return (lsm(a).exp() * (lsm(a) - lsm(b))).sum(1)


@family.form(kl)
def kl_of_logs(a, b):
    p, q = F.softmax(a, 1), F.softmax(b, 1)
    return (p * (p.log() - q.log())).sum(1)


@family.form(kl)
def kl_of_ratio(a, b):
    p, q = F.softmax(a, 1), F.softmax(b, 1)
    return (p * torch.log(p / q)).sum(1)


@family.form(kl)
def functional_kl(a, b):
    return F.kl_div(F.softmax(b, 1).log(), F.softmax(a, 1), reduction="none").sum(1)


@family.form(kl)
def cross_entropy_minus_entropy(a, b):
    p, q = F.softmax(a, 1), F.softmax(b, 1)
    return -(p * torch.log(q)).sum(1) + (p * torch.log(p)).sum(1)


@family.form(lambda a, b: kl(a, b) + kl(b, a))
def symmetric_kl(a, b):
    p, q = F.softmax(a, 1), F.softmax(b, 1)
    return ((p - q) * (torch.log(p) - torch.log(q))).sum(1)


@family.form(lambda a, b: kl(a, b) + kl(b, a))
def r_drop(a, b):
    p, q = F.softmax(a, dim=-1), F.softmax(b, dim=-1)
    first = F.kl_div(torch.log(p), q, reduction="none").sum(-1)
    second = F.kl_div(torch.log(q), p, reduction="none").sum(-1)
    return first + second


def js(a, b):
    p, q = lsm(a), lsm(b)
    m = torch.logaddexp(p, q) - math.log(2)
    return 0.5 * (p.exp() * (p - m) + q.exp() * (q - m)).sum(1)


@family.form(js)
def jensen_shannon(a, b):
    p, q = F.softmax(a, 1), F.softmax(b, 1)
    m = 0.5 * (p + q)
    return 0.5 * ((p * torch.log(p / m)).sum(1) + (q * torch.log(q / m)).sum(1))


@family.form(js)
def jensen_shannon_by_entropies(a, b):
    p, q = F.softmax(a, 1), F.softmax(b, 1)
    m = (p + q) / 2

    def h(r):
        return -(r * r.log()).sum(1)

    return h(m) - 0.5 * h(p) - 0.5 * h(q)


@family.form(js)
def jensen_shannon_functional(a, b):
    p, q = F.softmax(a, 1), F.softmax(b, 1)
    m = ((p + q) / 2).log()
    return 0.5 * (F.kl_div(m, p, reduction="none").sum(1) + F.kl_div(m, q, reduction="none").sum(1))


@family.form(lambda a, b: (lsm(b).exp() * lsm(a)).sum(1), pair("mild extreme half"))
def soft_targets(a, b):
    return (F.softmax(b, 1) * torch.log(F.softmax(a, 1))).sum(1)


@family.form(lambda a, b: -(lsm(b.detach()).exp() * lsm(a)).sum(1), pair("mild extreme half"))
def soft_targets_of_a_teacher(a, b):
    with torch.no_grad():
        teacher = F.softmax(b, dim=1)
    return -torch.sum(teacher * torch.log(F.softmax(a, dim=1)), dim=1)


@family.form(lambda a, b: 16 * kl(b.detach() / 4, a / 4), pair("mild extreme"))
def distillation(a, b):
    teacher, student = F.softmax(b.detach() / 4.0, 1), F.softmax(a / 4.0, 1)
    return (teacher * (teacher.log() - student.log())).sum(1) * 4.0**2


@family.form(lambda a, b: -(lsm((b.detach() - 0.1) / 0.04).exp() * lsm(a / 0.1)).sum(1), pair("mild extreme"))
def dino(a, b):
    teacher = F.softmax((b - 0.1) / 0.04, dim=-1).detach()
    return torch.sum(-teacher * torch.log(F.softmax(a / 0.1, dim=-1)), dim=-1)


@family.form(lambda a, b: -0.5 * (torch.logsumexp((lsm(a) + lsm(b)) / 2, 1)), pair("mild extreme"))
def bhattacharyya(a, b):
    p, q = F.softmax(a, 1), F.softmax(b, 1)
    return -0.5 * torch.log((p.sqrt() * q.sqrt()).sum(1))


@family.form(lambda a, b: torch.logsumexp(2 * lsm(a) - lsm(b), 1), pair("mild extreme"))
def renyi_divergence(a, b):
    p, q = F.softmax(a, 1), F.softmax(b, 1)
    return torch.log((p**2 / q).sum(1))


# Decoupled knowledge distillation: target and non-target classes.
def _dkd(x, y):
    target, rest = picked(x, y), log_others(x).gather(1, y[:, None])[:, 0]
    return torch.stack([target, rest], 1)


@family.form(_dkd, TARGETED)
def target_against_the_rest(x, y):
    p = F.softmax(x, dim=1)
    mask = torch.zeros_like(x).scatter_(1, y.unsqueeze(1), 1).bool()
    both = torch.cat([(p * mask).sum(1, keepdim=True), (p * ~mask).sum(1, keepdim=True)], dim=1)
    return torch.log(both)


@family.form(_dkd, TARGETED)
def target_against_one_minus(x, y):
    p = F.softmax(x, dim=1).gather(1, y[:, None])
    return torch.cat([p, 1 - p], dim=1).log()


@family.form(lambda x, y: log_others(x).gather(1, y[:, None])[:, 0], COMPLEMENT)
def complementary_labels(x, y):
    return torch.log(1 - F.softmax(x, 1).gather(1, y[:, None])).squeeze(1)


@family.form(lambda x, y: log_others(x).gather(1, y[:, None])[:, 0], COMPLEMENT)
def complementary_labels_log1p(x, y):
    return torch.log1p(-F.softmax(x, 1)[torch.arange(4), y])


@family.form(lambda x, y: log_others(x).gather(1, y[:, None])[:, 0], COMPLEMENT)
def complementary_labels_summed(x, y):
    p = F.softmax(x, 1)
    return torch.log(p.sum(1) - p[torch.arange(4), y])


@family.form(lambda x: log_others(x), classes("mild extreme saturated", target=False))
def unlikelihood(x):
    return torch.log(1.0 - x.softmax(-1))


@family.form(lambda x: log_others(x), classes("mild extreme saturated", target=False))
def unlikelihood_by_hand(x):
    e = torch.exp(x)
    return torch.log(1 - e / e.sum(-1, keepdim=True))


@family.form(lambda x: log_others(x) + torch.log1p(lsm(x).exp()), classes("mild extreme saturated", target=False))
def one_minus_the_square(x):
    return torch.log(1 - torch.softmax(x, 1) ** 2)


@family.form(lambda x: lsm(x) - log_others(x), classes("mild extreme saturated", target=False))
def log_odds(x):
    p = torch.softmax(x, 1)
    return torch.log(p / (1 - p))


@family.form(lambda x: lsm(x) - log_others(x), classes("mild extreme saturated", target=False))
def logit_of_softmax(x):
    return torch.logit(torch.softmax(x, 1))


@family.form(
    lambda x, y: -(picked(x, y) - log_others(x).gather(1, y[:, None])[:, 0]), classes("mild extreme saturated")
)
def odds_ratio_preference(x, y):
    p = F.softmax(x, 1)[torch.arange(4), y]
    return -(torch.log(p) - torch.log1p(-p))


# Label smoothing and other soft labels.
@family.form(lambda x, y: 0.9 * nll(x, y) - 0.1 * lsm(x).mean(1), classes("mild extreme half"))
def label_smoothing(x, y):
    log_p = torch.log(F.softmax(x, -1))
    return 0.9 * -log_p[torch.arange(4), y] + 0.1 * -log_p.mean(-1)


@family.form(lambda x, y: 0.9 * nll(x, y) - 0.1 * lsm(x).mean(1), TARGETED)
def label_smoothing_of_targets(x, y):
    soft = F.one_hot(y, 5).to(x.dtype) * (1 - 0.1) + 0.1 / 5
    return -(soft * F.softmax(x, 1).log()).sum(1)


@family.form(lambda x, y: 0.3 * nll(x, y) + 0.7 * nll(x, y.flip(0)), TARGETED)
def mixup_of_losses(x, y):
    log_p = F.softmax(x, 1).log()
    return 0.3 * F.nll_loss(log_p, y, reduction="none") + 0.7 * F.nll_loss(log_p, y.flip(0), reduction="none")


@family.form(lambda x, y: -math.log(5) - lsm(x).mean(1), TARGETED)
def confidence_penalty(x, y):
    uniform = torch.full_like(x, 1 / 5)
    return (uniform * (torch.log(uniform) - torch.log(F.softmax(x, 1)))).sum(1)


@family.form(lambda x, y: -picked(x / 0.05, y), TARGETED)
def temperature(x, y):
    return -torch.log(F.softmax(x / 0.05, dim=1)[torch.arange(4), y])


@family.form(lambda x, y: -picked(x + torch.tensor([0.1, 0.2, 0.3, 0.1, 0.3]).to(x).log(), y), TARGETED)
def balanced_softmax(x, y):
    e = torch.exp(x) * torch.tensor([0.1, 0.2, 0.3, 0.1, 0.3]).to(x)
    return -torch.log(e / e.sum(1, keepdim=True))[torch.arange(4), y]


@family.form(lambda x, y: nll(x, y) * torch.tensor([0.5, 1.0, 2.0, 1.0]).to(x), TARGETED)
def weighted_samples(x, y):
    return -torch.tensor([0.5, 1.0, 2.0, 1.0]).to(x) * F.softmax(x, 1)[torch.arange(4), y].log()


@family.form(lambda x: entropy(lsm(x / 0.5) * 1.0).sum(1), UNMASKED)
def sharpened_entropy(x):
    p = F.softmax(x, 1) ** (1 / 0.5)
    p = p / p.sum(1, keepdim=True)
    return (p * p.log()).sum(1)
