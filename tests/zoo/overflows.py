"""Finite numbers whose result is past the largest."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from zoo.base import Small, bug, push


class Sampler(nn.Module):
    def forward(self, mean, logvar):
        std = torch.exp(0.5 * logvar)  # <- here
        return mean + std * torch.randn_like(std)


@bug("aten.exp", "overflow", module="sampler", source=Sampler)
class LogVariance(Small):
    def __init__(self):
        super().__init__()
        self.sampler = Sampler()

    def loss(self, h, y, s):
        return self.sampler(h, h + 300 * (1 - s)).square().mean()


@bug("aten.exp", "overflow")
class PoissonLoss(Small):
    def loss(self, h, y, s):
        rate = h[:, 0] + 120 * (1 - s[:, 0])
        return F.poisson_nll_loss(rate, y.float(), log_input=True)  # <- here


@bug("aten.pow", "overflow")
class SquareOfLarge(Small):
    def loss(self, h, y, s):
        error = h.sum(1) + 1e20 * (1 - s[:, 0])
        return (error**2).mean()  # <- here


@bug("aten.cosh", "overflow")
class LogCosh(Small):
    def loss(self, h, y, s):
        error = h.sum(1) + 100 * (1 - s[:, 0])
        return torch.log(torch.cosh(error)).mean()  # <- here


@bug("aten.sinh", "overflow")
class SinhActivation(Small):
    def loss(self, h, y, s):
        return torch.sinh(h + 150 * (1 - s)).mean()  # <- here


@bug("aten.expm1", "overflow")
class ExpMinusOne(Small):
    def loss(self, h, y, s):
        return torch.expm1(h + 99 * (1 - s)).sum()  # <- here


@bug("aten.exp", "overflow")
class SoftplusByHand(Small):
    def loss(self, h, y, s):
        z = h + push(s, 120)
        return torch.log(1 + torch.exp(z)).mean()  # <- here


@bug("aten.exp", "overflow")
class LogSumExpByHand(Small):
    def loss(self, h, y, s):
        total = (h + push(s, 200)).exp().sum(1)  # <- here
        return total.log().mean()


@bug("aten.exp", "overflow", phase="backward")
class SigmoidByHand(Small):
    """1 / (1 + inf) is 0, so the loss is finite; its derivative is 0 * inf."""

    def loss(self, h, y, s):
        p = 1 / (1 + torch.exp(-(h - 200 * (1 - s))))  # <- here
        return p.mean()


class Coupling(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Linear(2, 2)

    def forward(self, a, b):
        log_scale = self.scale(a)
        return b * log_scale.exp(), log_scale.sum(1)  # <- here


@bug("aten.exp", "overflow", module="flow", source=Coupling)
class Flow(Small):
    def __init__(self):
        super().__init__()
        self.flow = Coupling()

    def loss(self, h, y, s):
        z, logdet = self.flow(h[:, :2] * (1 + 3e4 * (1 - s)), h[:, 2:])
        return z.square().mean() - logdet.mean()


@bug("aten.bmm", "overflow")
class ScoresOverflow(Small):
    def loss(self, h, y, s):
        q = (h * (1 + 1e25 * (1 - s))).view(-1, 2, 2)
        return torch.bmm(q, q).abs().mean()  # <- here


@bug("aten.cumprod", "overflow")
class CumulativeProduct(Small):
    def loss(self, h, y, s):
        return torch.cumprod(h.abs() + 1e20 * (1 - s), 1).mean()  # <- here


@bug("aten.prod", "overflow")
class ProductOfFactors(Small):
    def loss(self, h, y, s):
        factors = h.abs() + 1e12 * (1 - s)
        return factors.prod(1).mean()  # <- here


@bug("aten.sum", "overflow")
class SumOfLarge(Small):
    def loss(self, h, y, s):
        return (h.abs() + 2e38 * (1 - s)).sum(1).sum()  # <- here


@bug("aten.mul", "overflow")
class RecurrenceExplodes(Small):
    def loss(self, h, y, s):
        state = torch.ones(len(h), 4)
        for _ in range(40):
            state = state * (1 + 9 * (1 - s)) + h * 1e-3  # <- here
        return state.mean()


@bug("aten._to_copy", "overflow", says=("The code itself computes this in float16",), omits=("In float64",))
class CastToHalf(Small):
    def loss(self, h, y, s):
        return (h + 1e5 * (1 - s)).half().float().mean()  # <- here


@bug("aten.exp", "overflow")
class HalfExponential(Small):
    def loss(self, h, y, s):
        logits = (h + 12 * (1 - s)).half()
        return torch.exp(logits).float().mean()  # <- here


@bug("aten.pow", "overflow", says=("The code itself computes this in float16",), omits=("In float64",))
class HalfSquare(Small):
    def loss(self, h, y, s):
        error = (h + 400 * (1 - s)).half()
        return error.pow(2).mean(1).float().mean()  # <- here


@bug("aten.addmm", "overflow", module="head")
class HalfLinear(Small):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 4)
        nn.init.constant_(self.head.weight, 3.0)

    def loss(self, h, y, s):
        features = h.sigmoid() * (1 + 3e4 * (1 - s))
        with torch.autocast("cpu", dtype=torch.float16):
            out = self.head(features)  # <- here
        return out.float().mean()


@bug("aten._to_copy", "overflow")
class IntegersToHalf(Small):
    def loss(self, h, y, s):
        ids = y * 10 + (100_000 * (1 - s[:, 0])).long()
        return (h.sum(1) * ids.half().float()).mean()  # <- here


@bug("aten.linalg_vector_norm", "overflow")
class NormOfLarge(Small):
    def loss(self, h, y, s):
        return torch.linalg.vector_norm(h * (1 + 1e25 * (1 - s)), dim=1).log().mean()  # <- here


@bug("aten.mse_loss", "overflow", samples=(4,), bad=(4,))
class ErrorOfLarge(Small):
    def loss(self, h, y, s):
        return F.mse_loss(h * (1 + 1e22 * (1 - s)), torch.zeros_like(h))  # <- here


@bug("aten.div", "overflow")
class TinyDivisor(Small):
    def loss(self, h, y, s):
        rate = 1e-20 + s
        return (h / rate / rate.square()).mean()  # <- here


@bug("aten.div", "overflow", phase="backward")
class DerivativeOfARatio(Small):
    """h / d is finite, h / d ** 2 is not."""

    def loss(self, h, y, s):
        d = h.sigmoid() * (1e-25 + s)
        return (h[:, :1] / d).mean()  # <- here


@bug("aten.exp", "overflow", trainer={"precision": "bf16-mixed"})
class UnderMixedPrecision(Small):
    def loss(self, h, y, s):
        return torch.exp(h.float() + 100 * (1 - s)).mean()  # <- here


@bug("aten.exp", "overflow", samples=None, count=None)
class WeightsHaveGrown(Small):
    """Whatever the batch, the same weights do it."""

    def loss(self, h, y, s):
        return torch.exp(h).mean()  # <- here

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx == 0:
            with torch.no_grad():
                self.body.weight.zero_()
                self.body.bias.fill_(400.0)


@bug("aten.add", "overflow")
class HalfResidual(Small):
    def loss(self, h, y, s):
        stream = (h + 5e4 * (1 - s)).half()
        stream = stream + stream  # <- here
        return stream.float().mean()


@bug("aten.linalg_matrix_exp", "overflow")
class MatrixExponential(Small):
    def loss(self, h, y, s):
        generator = (h * (1 + 1e4 * (1 - s))).view(-1, 2, 2)
        return torch.matrix_exp(generator).sum()  # <- here


@bug("aten.exp", "overflow", phase="backward")
class ClampedExponential(Small):
    def loss(self, h, y, s):
        ratio = torch.exp(h + 200 * (1 - s))  # <- here
        return ratio.clamp(max=10).mean()


@bug("aten.exp", "overflow", samples=None, count=None)
class LearnedUncertainty(Small):
    def __init__(self):
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(()))

    def loss(self, h, y, s):
        return torch.exp(-self.log_variance) * h.square().mean() + self.log_variance  # <- here

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with torch.no_grad():
            self.log_variance.fill_(-200.0)


@bug("aten.pow", "overflow", samples=tuple(range(8)), batch_idx=0, count=None)
class NoBatchHasEverBeenWell(Small):
    """Each sample fails by itself, and no healthy batch is known that would show that all others do, too."""

    def loss(self, h, y, s):
        return ((h + 1e25) ** 2).mean()  # <- here


@bug("aten.native_layer_norm", "overflow", module="norm")
class NormOfHugeFeatures(Small):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def loss(self, h, y, s):
        return self.norm(h * (1 + 1e25 * (1 - s))).square().mean()  # <- here


@bug("aten.add", "unknown")
class InfiniteNumberInTheSource(Small):
    def loss(self, h, y, s):
        penalty = float("inf") if bool((s == 0).any()) else 0.0
        return h.square().mean() + penalty  # <- here


@bug("aten.mul", "unknown")
class NanInTheSource(Small):
    def loss(self, h, y, s):
        factor = torch.tensor(float("nan") if bool((s == 0).any()) else 1.0)
        return h.square().mean() * factor  # <- here
