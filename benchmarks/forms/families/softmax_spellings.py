"""Softmax, then log: every spelling of the softmax."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forms.exact import cross_entropy, lsm
from forms.inputs import classes
from forms.registry import Family

family = Family("softmax by hand, then log", classes())


def ce(p: Tensor, y: Tensor) -> Tensor:
    return -torch.log(p[torch.arange(len(y)), y]).mean()


@family.form(cross_entropy)
def textbook(x, y):
    e = torch.exp(x)
    p = e / e.sum(1, keepdim=True)
    return -torch.log(p[torch.arange(4), y]).mean()


@family.form(cross_entropy)
def shifted_by_max_values(x, y):
    e = torch.exp(x - x.max(dim=1, keepdim=True).values)
    return ce(e / e.sum(dim=1, keepdim=True), y)


@family.form(cross_entropy)
def shifted_by_max_tuple(x, y):
    top, _ = torch.max(x, dim=-1, keepdim=True)
    e = torch.exp(x - top)
    return ce(e / torch.sum(e, dim=-1, keepdim=True), y)


@family.form(cross_entropy)
def shifted_by_detached_amax(x, y):
    e = (x - x.detach().amax(1, keepdim=True)).exp()
    return ce(e / torch.sum(e, axis=1, keepdims=True), y)


@family.form(cross_entropy, classes("mild extreme masked saturated"))
def shifted_by_global_max(x, y):
    e = torch.exp(x - x.max())
    return ce(e / e.sum(1, keepdim=True), y)


@family.form(cross_entropy)
def unsqueezed_total(x, y):
    e = x.exp()
    return ce(torch.div(e, e.sum(1).unsqueeze(1)), y)


@family.form(cross_entropy)
def none_indexed_total(x, y):
    e = x.exp()
    return ce(e / e.sum(-1)[:, None], y)


@family.form(cross_entropy)
def viewed_total(x, y):
    e = x.exp()
    return ce(e / e.sum(1).view(-1, 1), y)


@family.form(cross_entropy)
def expanded_total(x, y):
    e = x.exp()
    return ce(e / e.sum(1, keepdim=True).expand_as(e), y)


@family.form(cross_entropy)
def repeated_total(x, y):
    e = x.exp()
    return ce(e / e.sum(1, keepdim=True).repeat(1, e.size(1)), y)


@family.form(cross_entropy)
def times_reciprocal(x, y):
    e = x.exp()
    return ce(e * (1.0 / e.sum(1, keepdim=True)), y)


@family.form(cross_entropy)
def times_torch_reciprocal(x, y):
    e = x.exp()
    return ce(e * torch.reciprocal(e.sum(1, keepdim=True)), y)


@family.form(cross_entropy)
def times_power_minus_one(x, y):
    e = x.exp()
    return ce(e * e.sum(1, keepdim=True) ** -1, y)


@family.form(cross_entropy)
def in_columns(x, y):
    e = torch.exp(x.t())
    return ce((e / e.sum(0)).T, y)


@family.form(cross_entropy)
def divided_in_place(x, y):
    e = torch.exp(x)
    p = e * 1.0
    p /= e.sum(1, keepdim=True)
    return ce(p, y)


@family.form(cross_entropy)
def all_in_place(x, y):
    z = x.clone()
    z.sub_(z.detach().max(1, keepdim=True)[0]).exp_()
    p = z.div(z.sum(1, keepdim=True))
    return -p.log().gather(1, y[:, None]).mean()


@family.form(cross_entropy, classes("mild extreme masked saturated"))
def two_to_the_power(x, y):
    z = x / math.log(2)
    e = torch.exp2(z)
    return ce(e / e.sum(1, keepdim=True), y)


@family.form(cross_entropy, classes("mild extreme masked saturated"))
def e_to_the_power(x, y):
    e = math.e**x
    return ce(e / e.sum(1, keepdim=True), y)


@family.form(cross_entropy, classes("mild extreme masked saturated"))
def torch_pow_e(x, y):
    e = torch.pow(torch.tensor(math.e), x) if x.dtype == torch.float32 else torch.pow(math.e, x)
    return ce(e / e.sum(1, keepdim=True), y)


@family.form(cross_entropy)
def expm1_plus_one(x, y):
    e = torch.expm1(x) + 1
    return ce(e / e.sum(1, keepdim=True), y)


@family.form(cross_entropy)
def quotient_of_the_picked(x, y):
    e = torch.exp(x)
    return -torch.log(e[torch.arange(4), y] / e.sum(1)).mean()


@family.form(cross_entropy)
def quotient_of_the_gathered(x, y):
    top = torch.exp(torch.gather(x, 1, y.view(-1, 1))).squeeze(1)
    return -(top / torch.exp(x).sum(dim=1)).log().mean()


@family.form(cross_entropy)
def difference_of_logs(x, y):
    e = torch.exp(x)
    return (torch.log(e.sum(1)) - torch.log(e[torch.arange(4), y])).mean()


@family.form(cross_entropy)
def logit_minus_log_total(x, y):
    return -(x.gather(1, y[:, None])[:, 0] - x.exp().sum(1).log()).mean()


@family.form(cross_entropy)
def inverted_quotient(x, y):
    e = torch.exp(x)
    return torch.log(e.sum(1) / e[torch.arange(4), y]).mean()


@family.form(cross_entropy)
def one_over_total_of_differences(x, y):
    gaps = x - x.gather(1, y[:, None])
    return -torch.log(1 / torch.exp(gaps).sum(1)).mean()


@family.form(cross_entropy)
def loop_over_classes(x, y):
    total = 0
    for j in range(x.shape[1]):
        total = total + torch.exp(x[:, j])
    return -torch.log(torch.exp(x[torch.arange(4), y]) / total).mean()


@family.form(cross_entropy)
def loop_over_samples(x, y):
    loss = 0
    for i in range(len(x)):
        e = torch.exp(x[i])
        loss = loss - torch.log(e[y[i]] / e.sum())
    return loss / len(x)


@family.form(cross_entropy, classes("mild extreme masked saturated"))
def matmul_with_ones(x, y):
    e = torch.exp(x)
    return ce(e / (e @ torch.ones(x.shape[1], 1, dtype=x.dtype)), y)


@family.form(cross_entropy, classes("mild extreme masked saturated"))
def einsum_total(x, y):
    e = torch.exp(x)
    return ce(e / torch.einsum("ij->i", e)[:, None], y)


def floored(x, y):
    """The floor of 1e-12 that `F.normalize` has is part of it."""
    total = torch.logsumexp(x, 1, keepdim=True).clamp(min=math.log(1e-12))
    return -(x - total).gather(1, y[:, None]).mean()


@family.form(floored, classes("mild extreme masked saturated"))
def normalized_by_l1(x, y):
    return ce(F.normalize(torch.exp(x), p=1, dim=1), y)


@family.form(cross_entropy)
def norm_of_order_one(x, y):
    e = torch.exp(x)
    return ce(e / e.norm(p=1, dim=1, keepdim=True), y)


@family.form(lambda x, y: lsm(x, 1) - math.log(5), classes("mild extreme saturated half"))
def mean_instead_of_sum(x, y):
    e = torch.exp(x)
    return torch.log(e / e.mean(1, keepdim=True)) - 2 * math.log(5)


@family.form(cross_entropy)
def method_softmax(x, y):
    return ce(x.softmax(1), y)


@family.form(cross_entropy)
def keyword_softmax(x, y):
    return ce(torch.softmax(input=x, dim=-1), y)


@family.form(cross_entropy)
def functional_softmax(x, y):
    return ce(F.softmax(x, dim=1), y)


@family.form(cross_entropy)
def special_softmax(x, y):
    return ce(torch.special.softmax(x, 1), y)


@family.form(cross_entropy)
def module_softmax(x, y):
    return ce(nn.Softmax(dim=1)(x), y)


@family.form(cross_entropy)
def transposed_module_softmax(x, y):
    return ce(nn.Softmax(dim=0)(x.T).T, y)


@family.form(cross_entropy)
def softmin_of_negated(x, y):
    return ce(F.softmin(-x, dim=1), y)


@family.form(cross_entropy)
def softmin_module(x, y):
    return ce(nn.Softmin(dim=1)(-x), y)


@family.form(lambda x, y: lsm(x, 1)[:, 0], classes("mild extreme saturated half"))
def softmax2d(x, y):
    return torch.log(nn.Softmax2d()(x.T.reshape(1, 5, 2, 2)))[0, 0].reshape(-1)


@family.form(cross_entropy, classes("mild extreme masked saturated half"))
def softmax_in_float(x, y):
    p = F.softmax(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32)).type_as(x)
    return ce(p, y)
