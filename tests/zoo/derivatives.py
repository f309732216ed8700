"""Losses that hold derivatives themselves: the line is that of the function that was differentiated."""

from __future__ import annotations

import torch
from torch import nn

from zoo.base import Whole, bug

PART = {"phase": "backward"}


class Root(nn.Module):
    def __init__(self, power):
        super().__init__()
        self.power = power

    def forward(self, z):
        return z.abs() ** self.power  # <- here


class Field(Whole):
    """A function of the place x, that is exactly 0 for the bad samples."""

    power = 1.5

    def __init__(self):
        super().__init__()
        self.act = Root(self.power)

    def loss_of(self, batch):
        x, _, s = batch
        return self.loss_at(x.clone().requires_grad_(), s)

    def value(self, x, s):
        h = self.body(x)
        return self.act(h - h.detach() * (1 - s))


@bug("aten.pow", "singular_gradient", module="act", source=Root, **PART)
class FirstDerivativeIsFinite(Field):
    """1.5 * z ** 0.5 is 0 at 0, and its derivative infinite."""

    def loss_at(self, x, s):
        (slope,) = torch.autograd.grad(self.value(x, s).sum(), x, create_graph=True)
        return (slope + 1).square().mean()


@bug("aten.pow", "singular_gradient", module="act", source=Root, **PART)
class DerivativeForEachSample(Field):
    power = 0.5

    def loss_at(self, x, s):
        slopes = torch.vmap(torch.func.grad(lambda row, scale: self.value(row, scale).sum()))(x, s)
        return slopes.square().mean()


@bug("aten.pow", "singular_gradient", module="act", source=Root, **PART)
class Jacobians(Field):
    power = 0.5

    def loss_at(self, x, s):
        return torch.vmap(torch.func.jacrev(self.value))(x, s).square().mean()
