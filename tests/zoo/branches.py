"""The gradient of a branch that was not taken: 0 * inf."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from zoo.base import Small, bug

TRAP = {"phase": "backward"}


@bug("aten.log", "masked_branch", **TRAP)
class WhereLog(Small):
    def loss(self, h, y, s):
        p = h.sigmoid() * s
        return torch.where(p > 0, torch.log(p), torch.zeros_like(p)).mean()  # <- here


@bug("aten.sqrt", "masked_branch", **TRAP)
class WhereRoot(Small):
    def loss(self, h, y, s):
        squared = (h * s).square().sum(1)
        length = torch.sqrt(squared)  # <- here
        return torch.where(squared > 0, length, 0.0).mean()


@bug("aten.div", "masked_branch", **TRAP)
class WhereRatio(Small):
    def loss(self, h, y, s):
        total = h.exp().sum(1) * s[:, 0]
        share = h.exp()[:, 0] / total  # <- here
        return torch.where(total > 0, share, torch.zeros_like(share)).sum()


@bug("aten.div", "masked_branch", **TRAP)
class SincByHand(Small):
    def loss(self, h, y, s):
        z = h * s
        sinc = torch.sin(z) / z  # <- here
        return torch.where(z == 0, torch.ones_like(z), sinc).mean()


@bug("aten.exp", "masked_branch", **TRAP)
class SoftplusWithThreshold(Small):
    def loss(self, h, y, s):
        z = h + 200 * (1 - s)
        soft = torch.log1p(torch.exp(z))  # <- here
        return torch.where(z > 20, z, soft).mean()


class Elu(nn.Module):
    def forward(self, z):
        return torch.where(z > 0, z, torch.exp(z) - 1)  # <- here


@bug("aten.exp", "masked_branch", module="act", source=Elu, **TRAP)
class EluByHand(Small):
    def __init__(self):
        super().__init__()
        self.act = Elu()

    def loss(self, h, y, s):
        return self.act(h + 300 * (1 - s)).mean()


@bug("aten.acos", "masked_branch", **TRAP)
class WhereAngle(Small):
    def loss(self, h, y, s):
        cosine = h.tanh() * 0.5 * s + (h * 0 + 1) * (1 - s)
        angle = torch.acos(cosine)  # <- here
        return torch.where(cosine < 1, angle, torch.zeros_like(angle)).mean()


@bug("aten.pow", "masked_branch", **TRAP)
class WherePower(Small):
    """The conversion of linear light to sRGB."""

    def loss(self, h, y, s):
        linear = h.sigmoid() * s
        high = 1.055 * linear.pow(1 / 2.4) - 0.055  # <- here
        return torch.where(linear <= 0.0031308, 12.92 * linear, high).mean()


@bug("aten.sqrt", "masked_branch", **TRAP)
class MultipliedByAMask(Small):
    def loss(self, h, y, s):
        length = (h * s).square().sum(1).sqrt()  # <- here
        return (length * (s[:, 0] > 0).float()).mean()


@bug("aten.log", "masked_branch", **TRAP)
class FilledAfterwards(Small):
    def loss(self, h, y, s):
        p = h.sigmoid() * s
        logs = p.log()  # <- here
        return logs.masked_fill(p == 0, 0.0).mean()


@bug("aten.sqrt", "masked_branch", **TRAP)
class SelectedAfterwards(Small):
    def loss(self, h, y, s):
        length = torch.sqrt((h * s).square().sum(1))  # <- here
        return length[s[:, 0] > 0].sum() / len(h)


@bug("aten.div", "masked_branch", **TRAP)
class TemperatureAfterTheMask(Small):
    """-inf / t is -inf, and its derivative with respect to t is 0 * inf. Each masked sample does it."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))

    def loss(self, h, y, s):
        hidden = (1 - s).bool() & (torch.arange(4) > 1)
        scores = h.masked_fill(hidden, float("-inf"))
        return F.softmax(scores / self.temperature, -1).square().sum()  # <- here


@bug("aten.log", "masked_branch", **TRAP)
class GradientThroughAWeight(Small):
    """The product with a learned weight fails first on the way back, but the logarithm made what it fails with."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def loss(self, h, y, s):
        p = h.sigmoid() * s
        logs = torch.log(p)  # <- here
        return torch.where(s > 0, logs * self.weight, torch.zeros_like(p)).mean()


@bug("aten.reciprocal", "masked_branch", **TRAP)
class WhereInverse(Small):
    def loss(self, h, y, s):
        depth = h.exp() * s
        disparity = 1.0 / depth  # <- here
        return torch.where(depth > 0, disparity, torch.zeros_like(depth)).mean()


@bug("aten.sqrt", "masked_branch", **TRAP)
class NegativeInTheOtherBranch(Small):
    def loss(self, h, y, s):
        z = h.square() + 0.1 - 50 * (1 - s)
        root = torch.sqrt(z)  # <- here
        return torch.where(z > 0, root, torch.zeros_like(z)).mean()


@bug("aten.rsqrt", "masked_branch", **TRAP)
class WhereReciprocalRoot(Small):
    def loss(self, h, y, s):
        power = (h * s).square().mean(1)
        scale = power.rsqrt()  # <- here
        return torch.where(power > 0, scale, torch.ones_like(scale)).mean()


@bug("aten.sqrt", "masked_branch", **TRAP)
class OverwrittenAfterwards(Small):
    def loss(self, h, y, s):
        length = torch.sqrt((h * s).square().sum(1))  # <- here
        length = length.clone()
        length[s[:, 0] == 0] = 0.0
        return length.mean()


@bug("aten.sqrt", "masked_branch", samples=tuple(range(2)), bad=tuple(range(2)), **TRAP)
class OverwrittenThroughAView(Small):
    def loss(self, h, y, s):
        length = torch.sqrt((h * s).square().sum(1)) * 1.0  # <- here
        length[: int((s == 0).sum())] = 0.0
        return length.mean()


@bug("aten.sqrt", "masked_branch", samples=tuple(range(8)), batch_idx=0, count=None, **TRAP)
class DiagonalOfDistances(Small):
    def loss(self, h, y, s):
        distances = (h[:, None] - h).square().sum(-1).sqrt()  # <- here
        return torch.triu(distances, diagonal=1).mean()


@bug("aten.log", "masked_branch", **TRAP)
class PickedAfterwards(Small):
    def loss(self, h, y, s):
        logs = torch.log(h.sigmoid() * s)  # <- here
        return logs.index_select(0, s[:, 0].nonzero()[:, 0]).sum() / len(h)


@bug("aten.log", "masked_branch", **TRAP)
class NumbersInPlaceOfNan(Small):
    def loss(self, h, y, s):
        p = h.sigmoid() * s
        return torch.nan_to_num(p * p.log()).sum()  # <- here


@bug("aten.sqrt", "masked_branch", **TRAP)
class MultipliedByAShare(Small):
    def loss(self, h, y, s):
        length = (h * s).square().sum(1).sqrt()  # <- here
        kept = (s[:, 0] > 0).float()
        return (length * (kept / kept.sum())).sum()
