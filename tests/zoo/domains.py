"""Arguments outside the domain, poles, and infinities that were meant but met 0 or each other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.distributions import Normal

from zoo.base import Small, bug, push


@bug("aten.sqrt", "invalid_domain")
class Discriminant(Small):
    def loss(self, h, y, s):
        d = 1 + h.square().sum(1) - 50 * (1 - s[:, 0])
        return torch.sqrt(d).mean()  # <- here


@bug("aten.sqrt", "invalid_domain")
class VarianceByMoments(Small):
    """E[x**2] - E[x]**2 cancels, and may come out negative."""

    def loss(self, h, y, s):
        wide = h.square().mean(1) - h.mean(1).square()
        variance = wide * s[:, 0] - 1e-7 * (1 - s[:, 0])
        return variance.sqrt().mean()  # <- here


@bug("aten.log", "invalid_domain")
class LogOfNegative(Small):
    def loss(self, h, y, s):
        margin = F.softplus(h) - 20 * (1 - s)
        return torch.log(margin).mean()  # <- here


@bug("aten.acos", "invalid_domain")
class AngleOfRounding(Small):
    def loss(self, h, y, s):
        cosine = F.cosine_similarity(h, h.roll(1, 1)) * 0.9 + 2 * (1 - s[:, 0])
        return torch.acos(cosine).mean()  # <- here


@bug("aten.asin", "invalid_domain")
class ArcSine(Small):
    def loss(self, h, y, s):
        return torch.asin(h.tanh() * 0.9 - 3 * (1 - s)).mean()  # <- here


@bug("aten.acosh", "invalid_domain")
class Hyperbolic(Small):
    def loss(self, h, y, s):
        return torch.acosh(1 + h.square() - (1 - s) * 9).clamp(max=9).sum()  # <- here

    def configure_optimizers(self):
        torch.nn.init.constant_(self.body.bias, 1.0)
        return super().configure_optimizers()


@bug("aten.atanh", "invalid_domain")
class FisherTransform(Small):
    def loss(self, h, y, s):
        correlation = h.tanh() * 0.9 * s + (1 - s)
        return torch.atanh(correlation).mean()  # <- here


@bug("aten.erfinv", "invalid_domain")
class GaussianQuantile(Small):
    def loss(self, h, y, s):
        level = h.sigmoid() * s + (1 - s)
        return torch.erfinv(level).mean()  # <- here


@bug("aten.erfinv", "invalid_domain")
class NormalQuantile(Small):
    def loss(self, h, y, s):
        u = 0.5 * s[:, 0] + (1 - s[:, 0])
        return Normal(h[:, 0], 1.0).icdf(u).mean()  # <- here


@bug("aten.logit", "invalid_domain")
class LogitOfOne(Small):
    def loss(self, h, y, s):
        p = torch.sigmoid(h) * s + (1 - s)
        return torch.logit(p).mean()  # <- here


@bug("aten.log1p", "invalid_domain")
class LogOnePlusMinusOne(Small):
    def loss(self, h, y, s):
        return torch.log1p(h.sigmoid() * s - (1 - s)).mean()  # <- here


@bug("aten.pow", "invalid_domain")
class GammaCorrection(Small):
    def loss(self, h, y, s):
        image = h.sigmoid() - 2 * (1 - s)
        return image.pow(1 / 2.2).mean()  # <- here


@bug("aten.pow", "invalid_domain")
class LearnedExponent(Small):
    def __init__(self):
        super().__init__()
        self.exponent = torch.nn.Parameter(torch.tensor(1.7))

    def loss(self, h, y, s):
        pooled = (h.abs() - 9 * (1 - s)) ** self.exponent  # <- here
        return pooled.mean()


@bug("aten.lgamma", "invalid_domain")
class LogGammaAtZero(Small):
    def loss(self, h, y, s):
        return torch.lgamma(F.softplus(h) * s).mean()  # <- here


@bug("aten.digamma", "invalid_domain")
class DigammaAtZero(Small):
    def loss(self, h, y, s):
        alpha = F.softplus(h) * s
        return torch.digamma(alpha).mean()  # <- here


@bug("aten.rsqrt", "invalid_domain")
class RootMeanSquareNorm(Small):
    def loss(self, h, y, s):
        h = h * s
        scale = torch.rsqrt(h.pow(2).mean(-1, keepdim=True))  # <- here
        return (h * scale).square().sum()


@bug("aten.sub", "invalid_domain")
class InfinityMinusInfinity(Small):
    def loss(self, h, y, s):
        one, other = h.masked_fill(s == 0, float("-inf")), h.flip(1).masked_fill(s == 0, float("-inf"))
        return torch.exp(one - other).mean()  # <- here


@bug("aten.sub", "invalid_domain")
class MinusTheMaximumOfAnother(Small):
    """Both are masked altogether, but neither is normalised by its own maximum."""

    def loss(self, h, y, s):
        one, other = h.masked_fill(s == 0, float("-inf")), (h + 1).masked_fill(s == 0, float("-inf"))
        other = torch.where(torch.arange(4) == 3, other, other + 1)
        return torch.exp(one - other.amax(1, keepdim=True)).mean()  # <- here


@bug("aten.sub", "invalid_domain")
class MinusItsMinimum(Small):
    """One row is masked altogether, but in the other, too, -inf meets -inf."""

    def loss(self, h, y, s):
        z = h.masked_fill((s == 0) & ((torch.arange(4) < 2) | (y[:, None] == 1)), float("-inf"))
        return torch.exp(z.amin(1, keepdim=True) - z).mean()  # <- here


@bug("aten.mul", "invalid_domain")
class MaskedTwice(Small):
    def loss(self, h, y, s):
        scores = h.masked_fill(s == 0, float("-inf"))
        return (scores * s).sum()  # <- here


@bug("aten._ctc_loss", "invalid_domain")
class ImpossibleAlignment(Small):
    """More labels than frames."""

    def loss(self, h, y, s):
        frames = h.unsqueeze(0).repeat(3, 1, 1).log_softmax(-1)
        labels = torch.ones(len(h), 5, dtype=torch.long)
        lengths = torch.where(s[:, 0] > 0, 1, 5)
        return F.ctc_loss(frames, labels, torch.full((len(h),), 3), lengths, reduction="sum")  # <- here


@bug("aten._ctc_loss", "invalid_domain", module="ctc", samples=(6,), bad=(6,))
class ImpossibleAlignmentOfOne(Small):
    def __init__(self):
        super().__init__()
        self.ctc = torch.nn.CTCLoss()

    def loss(self, h, y, s):
        frames = h.unsqueeze(0).repeat(4, 1, 1).log_softmax(-1)
        labels = torch.ones(len(h), 3, dtype=torch.long)
        lengths = torch.where(s[:, 0] > 0, 2, 3)
        return self.ctc(frames, labels, torch.full((len(h),), 4), lengths)  # <- here


@bug("aten.log", "invalid_domain")
class NegativeRate(Small):
    def loss(self, h, y, s):
        rate = h.square().sum(1) + 1 - 100 * (1 - s[:, 0])
        return F.poisson_nll_loss(rate, y.float(), log_input=False)  # <- here


@bug("aten.div", "invalid_domain")
class InfinityOverInfinity(Small):
    def loss(self, h, y, s):
        far = h.masked_fill(s == 0, float("inf"))
        return (far / far.amax(1, keepdim=True).clamp(min=1)).mean()  # <- here


@bug("aten.pow", "invalid_domain")
class FocalTerm(Small):
    def loss(self, h, y, s):
        p = torch.sigmoid(h) + push(s, 0.9, 1) + push(s, 0.9, 2)
        return ((1 - p) ** 1.5).mean()  # <- here


@bug("aten.mul", "invalid_domain")
class MaskTimesInfinity(Small):
    """Meant to be 0 or -inf; but 0 * -inf is NaN."""

    def loss(self, h, y, s):
        bias = s.expand(-1, 4) * float("-inf")  # <- here
        return F.softmax(h + bias.clamp(min=-1e4), -1)[:, 0].mean()


@bug("aten.linalg_inv_ex", "invalid_domain")
class SingularMatrix(Small):
    def loss(self, h, y, s):
        matrix = (h.view(-1, 2, 2) + 3 * torch.eye(2)) * s[:, :, None]
        inverse, _ = torch.linalg.inv_ex(matrix)  # <- here
        return inverse.square().sum()


@bug("aten.special_ndtri", "invalid_domain")
class QuantileOfZero(Small):
    def loss(self, h, y, s):
        return torch.special.ndtri(h.sigmoid() * s).mean()  # <- here


@bug("aten.special_bessel_y0", "invalid_domain")
class BesselOfNegativeNumbers(Small):
    def loss(self, h, y, s):
        return (h * torch.special.bessel_y0(2 * s - 1)).mean()  # <- here
