"""Samples that fail alone, together, or in company only."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from zoo.base import Small, bug

ALL = tuple(range(8))


@bug("aten.log", "log_of_zero", bad=(7,))
class TheLast(Small):
    def loss(self, h, y, s):
        return torch.log(h.sigmoid() * s).mean()  # <- here


@bug("aten.log", "log_of_zero", bad=(0, 1, 6))
class ThreeAlone(Small):
    def loss(self, h, y, s):
        return torch.log(h.sigmoid() * s).mean()  # <- here


@bug("aten.log", "log_of_zero", bad=ALL)
class Everyone(Small):
    def loss(self, h, y, s):
        return torch.log(h.sigmoid() * s).mean()  # <- here


@bug("aten.sqrt", "singular_gradient", phase="backward")
class DuplicatesInAContrastiveLoss(Small):
    """Two samples that are alike have a distance of 0; each alone has nobody to be like."""

    def loss(self, h, y, s):
        h = h * s + (1 - s)
        difference = h[:, None] - h[None]
        squared = difference.square().sum(-1)
        upper = torch.triu_indices(len(h), len(h), 1)
        distance = squared[upper[0], upper[1]].sqrt()  # <- here
        return F.relu(distance + 1).sum()


@bug("aten.sum", "overflow")
class TwoTogetherOverflow(Small):
    def loss(self, h, y, s):
        weights = h[:, 0].abs() + 2e38 * (1 - s[:, 0])
        return weights.sum().log()  # <- here


@bug("aten.div", "division_by_zero", bad=(3,))
class ThroughABatchNorm(Small):
    """BatchNorm does not run on one sample, so another one has to come along."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(4)

    def loss(self, h, y, s):
        return (self.norm(h) / s).square().mean()  # <- here


@bug("aten.log", "log_of_zero", bad=(2, 5))
class TwoRowsForEachSample(Small):
    """Two views of each sample, flattened into one batch."""

    def loss(self, h, y, s):
        views = torch.stack([h, -h], 1).flatten(0, 1)
        scale = s.repeat_interleave(2, 0)
        return torch.log(views.sigmoid() * scale).mean()  # <- here
