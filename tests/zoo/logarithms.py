"""The logarithm of an exact 0."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Beta, Dirichlet, Normal

from zoo.base import Small, bug, push


@bug("aten.log", "log_of_zero")
class CrossEntropyByHand(Small):
    def loss(self, h, y, s):
        p = torch.softmax(h + (1 - s) * F.one_hot((y + 1) % 4, 4) * 300, dim=1)
        return -torch.log(p[torch.arange(len(y)), y]).mean()  # <- here


@bug("aten.log", "log_of_zero")
class LogOfSigmoid(Small):
    def loss(self, h, y, s):
        p = torch.sigmoid(h[:, 0] - 200 * (1 - s[:, 0]))
        return -p.log().mean()  # <- here


class Entropy(nn.Module):
    def forward(self, p):
        return -(p * torch.log(p)).sum(-1)  # <- here


@bug("aten.log", "log_of_zero", module="entropy", source=Entropy)
class EntropyByHand(Small):
    def __init__(self):
        super().__init__()
        self.entropy = Entropy()

    def loss(self, h, y, s):
        return self.entropy((h + push(s, 200)).softmax(-1)).mean()


@bug("aten.log", "log_of_zero")
class DivergenceByHand(Small):
    def loss(self, h, y, s):
        p = h.softmax(-1)
        q = (h.flip(-1) + push(s, 500)).softmax(-1)
        return (p * (p.log() - q.log())).sum(-1).mean()  # <- here


@bug("aten.log", "log_of_zero")
class BinaryCrossEntropyByHand(Small):
    def loss(self, h, y, s):
        target = (y % 2 == 0).float()
        p = torch.sigmoid(h[:, 0] + 40 * (1 - s[:, 0]))
        positive = target * torch.log(p)
        negative = (1 - target) * torch.log(1 - p)  # <- here
        return -(positive + negative).mean()


@bug("aten.log", "log_of_zero")
class GatheredProbabilities(Small):
    def loss(self, h, y, s):
        p = h.softmax(1) * s
        picked = p.gather(1, y[:, None])
        return picked.log().neg().sum()  # <- here


@bug("aten.log2", "log_of_zero")
class InformationGain(Small):
    def loss(self, h, y, s):
        p = h.sigmoid() * s
        bits = torch.log2(p)  # <- here
        return -bits.mean()


@bug("aten.log10", "log_of_zero")
class DecibelsOfSilence(Small):
    def loss(self, h, y, s):
        power = (h * s).square().mean(1)
        return (10 * torch.log10(power)).mean()  # <- here


@bug("aten.xlogy", "log_of_zero")
class SoftTargets(Small):
    def loss(self, h, y, s):
        target = torch.full_like(h, 0.25)
        p = torch.softmax(h, -1) * s
        return -torch.xlogy(target, p).sum(-1).mean()  # <- here


@bug("aten.log", "log_of_zero")
class PoissonRate(Small):
    def loss(self, h, y, s):
        rate = F.softplus(h).sum(1) * s[:, 0]
        return (rate - (y + 1) * torch.log(rate)).mean()  # <- here


@bug("aten.log", "log_of_zero")
class GaussianWithoutVariance(Small):
    def loss(self, h, y, s):
        mean, variance = h[:, :2], h[:, 2:].square() * s
        error = (y[:, None] - mean).square()
        return (0.5 * torch.log(variance) + error / (2 * variance)).mean()  # <- here


@bug("aten._linalg_slogdet", "log_of_zero")
class SingularCovariance(Small):
    def loss(self, h, y, s):
        factor = h.view(-1, 2, 2) * s[:, :, None]
        return torch.logdet(factor @ factor.mT + 0.1 * s[:, :, None] * torch.eye(2)).mean()  # <- here


@bug("aten.log", "log_of_zero")
class InPlaceLogarithm(Small):
    def loss(self, h, y, s):
        p = h.sigmoid() * s
        p.log_()  # <- here
        return -p.mean()


@bug("aten.log", "log_of_zero", phase="backward")
class OtherClassesUnderflow(Small):
    """The target's logarithm is finite, so the loss is; the derivative at the others is 0 / 0."""

    def loss(self, h, y, s):
        p = F.softmax(h + (1 - s) * F.one_hot(y, 4) * 300, dim=-1)
        scores = torch.log(p)  # <- here
        return F.nll_loss(scores, y)


@bug("aten.log", "log_of_zero", phase="backward")
class ClampedTooLate(Small):
    def loss(self, h, y, s):
        p = torch.sigmoid(h) * s
        return -torch.log(p).clamp(min=-100).mean()  # <- here


@bug("aten.log", "log_of_zero", phase="backward")
class GeometricMean(Small):
    """exp(-inf) is 0, so the loss is finite."""

    def loss(self, h, y, s):
        logs = torch.log(h.abs() * s)  # <- here
        return logs.mean(1).exp().mean()


@bug("aten.log", "log_of_zero")
class NormalWithoutScale(Small):
    def loss(self, h, y, s):
        scale = F.softplus(h[:, 0]) * s[:, 0]
        return -Normal(h[:, 1], scale, validate_args=False).log_prob(y.float()).mean()  # <- here


@bug("aten.xlogy", "log_of_zero")
class DirichletAtTheBorder(Small):
    def loss(self, h, y, s):
        share = torch.full((len(h), 4), 0.25) * s
        found = Dirichlet(F.softplus(h) + 1.5, validate_args=False).log_prob(share)  # <- here
        return -found.mean()


@bug("aten.xlogy", "log_of_zero")
class BetaAtZero(Small):
    def loss(self, h, y, s):
        value = 0.5 * s[:, 0]
        concentration = F.softplus(h) + 1.5
        beta = Beta(concentration[:, 0], concentration[:, 1], validate_args=False)
        return -beta.log_prob(value).mean()  # <- here


@bug("aten.nll_loss_forward", "log_of_zero")
class TargetIsMasked(Small):
    """The -inf of an illegal action is meant; that it is the target is the bug."""

    def loss(self, h, y, s):
        illegal = (1 - s).bool() & F.one_hot(y, 4).bool()
        return F.cross_entropy(h.masked_fill(illegal, float("-inf")), y)  # <- here


class Mixture(nn.Module):
    def forward(self, h, s):
        weights = h.softmax(-1) * s
        density = torch.exp(-0.5 * h.square())
        likelihood = (weights * density).sum(-1)
        return torch.log(likelihood)  # <- here


@bug("aten.log", "log_of_zero", module="parts.1", source=Mixture)
class MixtureDensity(Small):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([nn.Identity(), Mixture()])

    def loss(self, h, y, s):
        return -self.parts[1](self.parts[0](h), s).mean()


@bug("aten.log", "log_of_zero", bad=(0,))
class InfoNceByHand(Small):
    def loss(self, h, y, s):
        positive = torch.exp(h[:, 0]) * s[:, 0]
        negative = torch.exp(h[:, 1:]).sum(1)
        return -torch.log(positive / (positive + negative)).mean()  # <- here


@bug("aten.log", "log_of_zero")
class SpectrumOfSilence(Small):
    def loss(self, h, y, s):
        return torch.fft.rfft(h * s).abs().log().mean()  # <- here


@bug("aten.log", "log_of_zero")
class OneHotTargets(Small):
    """0 log 0 of hard labels among smoothed ones."""

    def loss(self, h, y, s):
        hard = F.one_hot(y, 4).float()
        target = torch.where(s > 0, hard * 0.9 + 0.025, hard)
        return (target * (target.log() - h.log_softmax(1))).sum(1).mean()  # <- here


@bug("aten.log", "log_of_zero", trainer={"precision": "bf16-true"})
class TrueHalf(Small):
    def training_step(self, batch, batch_idx):
        x, _, s = batch
        p = torch.softmax(self.body(x.bfloat16()), -1) * s.bfloat16()
        return torch.log(p).float().mean()  # <- here
