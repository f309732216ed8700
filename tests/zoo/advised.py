"""Bugs whose advice depends on where the value comes from that is to blame."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal

from zoo.base import Small, bug

NEVER = float("-inf")
# What only helps where there are logits.
LOGITS = ("logits", "log_softmax", "F.softmax", "NG")
WEIGHTS = {"samples": None, "count": None, "bad": ()}


# -- rows that are masked altogether, by hand


@bug("aten.sub", "fully_masked", says=("A row is masked altogether",), omits=("masked_fill",))
class SoftmaxByHand(Small):
    def loss(self, h, y, s):
        z = h.masked_fill(s == 0, NEVER)
        e = (z - z.max(1, keepdim=True).values).exp()  # <- here
        return (e / e.sum(1, keepdim=True)).square().sum()


@bug("aten.sub", "fully_masked")
class SoftmaxByHandInPlace(Small):
    def loss(self, h, y, s):
        z = h.masked_fill(s == 0, NEVER)
        z -= z.detach().amax(1)[:, None]  # <- here
        return (z.exp() / z.exp().sum(1, keepdim=True)).square().sum()


@bug("aten.sub", "fully_masked")
class SoftmaxByHandWithCasts(Small):
    def loss(self, h, y, s):
        z = h.masked_fill(s == 0, NEVER)
        most = z.amax(1, keepdim=True).clone().double()
        return (z.double() - most).exp().square().mean()  # <- here


@bug("aten.div", "division_by_zero", says=("A row is masked altogether",), omits=("clamp", "NG201"))
class MaskedExponentials(Small):
    def loss(self, h, y, s):
        e = h.masked_fill(s == 0, NEVER).exp()
        return (e / e.sum(1, keepdim=True)).square().mean()  # <- here


@bug("aten.log", "log_of_zero", says=("A row is masked altogether",), omits=("NG103)",))
class MaskedLogSumExp(Small):
    def loss(self, h, y, s):
        e = h.masked_fill(s == 0, NEVER).exp()
        return e.sum(-1).log().mean()  # <- here


@bug("aten.div", "division_by_zero", says=("NG201",), omits=("masked",))
class ExponentialsOfPartlyMasked(Small):
    """Every row has an entry left: the others have underflowed."""

    def loss(self, h, y, s):
        e = (h - 300 * (1 - s)).masked_fill(torch.arange(4) < 2, NEVER).exp()
        return (e / e.sum(1, keepdim=True)).square().mean()  # <- here


# -- logarithms without logits


@bug("aten.log", "log_of_zero", says=("clamp(min=eps)",), omits=LOGITS)
class PowerOfASpectrum(Small):
    def loss(self, h, y, s):
        z = torch.fft.fft(h * s)
        power = z.real**2 + z.imag**2
        return 10 * torch.log(power).mean()  # <- here


@bug("aten.log", "log_of_zero", says=("clamp(min=eps)",), omits=LOGITS)
class Vectorised(Small):
    def loss(self, h, y, s):
        return torch.func.vmap(lambda row: row.abs().log().sum())(h * s).mean()  # <- here


@bug("aten.log", "log_of_zero", says=("clamp(min=eps)",), omits=LOGITS)
class OddsOfFeatures(Small):
    def loss(self, h, y, s):
        p = h.abs() * s
        p = p / (1 + p)
        return -p.log().mean()  # <- here


@bug("aten.log", "log_of_zero", says=("clamp(min=eps)",), omits=LOGITS)
class BehindAnAttention(Small):
    """There is a softmax upstream, but this is no logarithm of what came out of it."""

    def loss(self, h, y, s):
        tokens = h.view(-1, 2, 2)
        attended = (tokens @ tokens.mT).softmax(-1) @ tokens
        return torch.log(attended.abs().sum((1, 2)) * s[:, 0]).mean()  # <- here


@bug("aten.log", "log_of_zero", says=("the argument of exp itself",), omits=LOGITS)
class ScaleUnderflows(Small):
    def loss(self, h, y, s):
        scale = (h - 200 * (1 - s)).exp()
        return -Normal(h, scale, validate_args=False).log_prob(y[:, None] + 9).mean()  # <- here


@bug("aten.log", "log_of_zero", says=("tanh has saturated", "F.softplus(-2 * x)"))
class SquashedLogProbability(Small):
    def loss(self, h, y, s):
        action = torch.tanh(h + 30 * (1 - s))
        return -torch.log(1 - action.pow(2)).sum(1).mean()  # <- here


@bug("aten.log1p", "invalid_domain", says=("tanh has saturated", "F.softplus(-2 * x)"))
class SquashedLogProbabilityByLog1p(Small):
    def loss(self, h, y, s):
        action = torch.tanh(h + 30 * (1 - s))
        return -torch.log1p(-action * action).sum(1).mean()  # <- here


# -- epsilons that are none


@bug(
    "aten.div",
    "division_by_zero",
    trainer={"precision": "16-true"},
    says=("1e-08 rounds to 0 in float16", "6.1e-05"),
)
class EpsilonOfHalf(Small):
    def training_step(self, batch, batch_idx):
        x, _, s = batch
        h = self.body(x.half()) * s.half()
        return (h / (h.norm(dim=1, keepdim=True) + 1e-8)).mean()  # <- here


@bug("aten.log", "log_of_zero", says=("0.99999999 rounds to 1 in float32",))
class ClampedToOne(Small):
    def loss(self, h, y, s):
        p = torch.sigmoid(h + 40 * (1 - s)).clamp(1e-8, 1 - 1e-8)
        return -torch.log(1 - p).mean()  # <- here


@bug("aten.log", "log_of_zero", omits=("rounds to",))
class EpsilonElsewhere(Small):
    """An epsilon that holds, and a 0 that comes after it."""

    def loss(self, h, y, s):
        return -torch.log((h.abs() + 1e-8) * s).mean()  # <- here


# -- powers


@bug("aten.pow", "singular_gradient", phase="backward", says=("(x + eps) ** 0.333",), omits=("sqrt",))
class ThirdRoot(Small):
    def loss(self, h, y, s):
        return (h.abs() * s).pow(1 / 3).mean()  # <- here


@bug("aten.pow", "singular_gradient", phase="backward", says=("(x + eps) ** 0.5",), omits=("sqrt",))
class FocalRoot(Small):
    def loss(self, h, y, s):
        p = torch.sigmoid(h + 80 * (1 - s))
        return ((1 - p) ** 0.5).mean()  # <- here


@bug("aten.pow", "division_by_zero", says=("the power -0.5",), omits=LOGITS)
class InverseRootOfTheDegree(Small):
    def loss(self, h, y, s):
        degree = (h * s).abs().sum(1)
        return degree.pow(-0.5).mean()  # <- here


@bug("aten.rsqrt", "invalid_domain", says=("an exact 0", "torch.rsqrt(x + eps)"), omits=("negative",))
class ReciprocalRootOfZero(Small):
    def loss(self, h, y, s):
        return torch.rsqrt(h.square().sum(1) * s[:, 0]).mean()  # <- here


@bug("aten.rsqrt", "invalid_domain", says=("negative",), omits=("an exact 0",))
class ReciprocalRootOfANegative(Small):
    def loss(self, h, y, s):
        return torch.rsqrt(h.square() + 0.1 - 50 * (1 - s)).mean()  # <- here


# -- weights and buffers


class Spoiled(Small):
    """Something outside the step spoils the state after the first batch."""

    def __init__(self):
        super().__init__()
        self.direction = nn.Parameter(torch.ones(4))
        self.register_buffer("spread", torch.ones(4))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx == 0:
            with torch.no_grad():
                self.spoil()


@bug("aten.div", "division_by_zero", says=("is made of the parameter direction alone",), **WEIGHTS)
class ZeroDirection(Spoiled):
    def loss(self, h, y, s):
        unit = self.direction / self.direction.norm()  # <- here
        return (h * unit).mean()

    def spoil(self):
        self.direction.zero_()


@bug("aten.sqrt", "invalid_domain", says=("is the buffer spread",), **WEIGHTS)
class NegativeVariance(Spoiled):
    def loss(self, h, y, s):
        return (h / torch.sqrt(self.spread)).mean()  # <- here

    def spoil(self):
        self.spread.fill_(-1)


@bug("aten.log", "log_of_zero", says=("the buffer spread",), **WEIGHTS)
class LogOfABuffer(Spoiled):
    def loss(self, h, y, s):
        return (h.square().mean() - torch.log(self.spread * 2)).mean()  # <- here

    def spoil(self):
        self.spread[1] = 0


@bug("aten.div", "division_by_zero", says=("an exact 0",), omits=("alone", "whatever the batch"))
class SpreadOfTheBatch(Small):
    def __init__(self):
        super().__init__()
        self.register_buffer("spread", torch.ones(4))

    def loss(self, h, y, s):
        return (h / (self.spread * s)).mean()  # <- here


@bug("aten.div", "division_by_zero", bad=tuple(range(8)), omits=("the buffer", "whatever the batch"))
class SpreadOfACount(Small):
    """Nothing but a number comes from the batch; but other batches are well."""

    def __init__(self):
        super().__init__()
        self.register_buffer("spread", torch.ones(4))

    def loss(self, h, y, s):
        return (h / (self.spread * int((s > 0).sum()))).mean()  # <- here


@bug("aten.add", "parameters", tensor="spread", says=("no optimizer steps it",), omits=("learning rate",), **WEIGHTS)
class InfiniteOffset(Spoiled):
    def loss(self, h, y, s):
        return (h + self.spread).square().mean()  # <- here

    def spoil(self):
        self.spread[1] = float("inf")


# -- precision


@bug("aten.exp", "overflow", says=("The code itself computes this in float32",), omits=("In float64",))
class CastToSingle(Small):
    def loss(self, h, y, s):
        wide = (h + 200 * (1 - s)).float()
        return F.relu(wide).exp().mean()  # <- here
