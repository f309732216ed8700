"""Softmax, then log: where it stands, and every spelling of the log."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from forms.exact import (
    cross_entropy,
    nll,
)
from forms.inputs import TARGET, classes
from forms.registry import Family

family = Family("softmax by hand, then log", classes())


class Classifier(nn.Module):
    """Probabilities come out of the model."""

    def __init__(self):
        super().__init__()
        self.body = nn.Identity()
        self.head = nn.Sequential(nn.Identity(), nn.Softmax(dim=-1))

    def forward(self, x):
        """Probabilities and features."""
        return {"probs": self.head(self.body(x)), "features": x}


class Criterion(nn.Module):
    """The log stands in the loss."""

    def forward(self, outputs, target):
        """The loss."""
        return F.nll_loss(torch.log(outputs["probs"]), target)


@family.form(cross_entropy)
def across_modules(x, y):
    return Criterion()(Classifier()(x), y)


@family.form(nll)
def nll_without_reduction(x, y):
    return F.nll_loss(F.softmax(x, 1).log(), y, reduction="none")


@family.form(cross_entropy)
def nll_module(x, y):
    return nn.NLLLoss()(torch.log(nn.Softmax(1)(x)), y)


LOGS = {
    "torch_log": torch.log,
    "method_log": lambda p: p.log(),
    "tensor_log": torch.Tensor.log,
    "log2": lambda p: torch.log2(p) * math.log(2),
    "log10": lambda p: p.log10() * math.log(10),
    "log_in_place": lambda p: (p * 1.0).log_(),
    "log_in_place_function": lambda p: torch.log_(p * 1.0),
    "log1p_of_p_minus_one": lambda p: torch.log1p(p - 1),
    "xlogy_of_one": lambda p: torch.xlogy(torch.ones_like(p), p),
    "special_xlogy_number": lambda p: torch.special.xlogy(1.0, p),
    "minus_log_of_reciprocal": lambda p: -torch.log(1 / p),
    "half_the_log_of_the_square": lambda p: 0.5 * torch.log(p**2),
    "twice_the_log_of_the_root": lambda p: 2 * torch.log(p.sqrt()),
    "log_through_out_list": lambda p: torch.stack([q.log() for q in p.unbind(0)]),
}
for title, log in LOGS.items():
    family.form(cross_entropy, classes("mild extreme masked saturated"), name=f"softmax_then_{title}")(
        lambda x, y, log=log: -log(F.softmax(x, 1)[torch.arange(4), TARGET]).mean()
    )
