"""Means of nothing."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from zoo.base import Small, bug

ALL = tuple(range(8))


@bug("aten.mean", "empty_reduction", bad=ALL)
class NoPositives(Small):
    def loss(self, h, y, s):
        chosen = h[s[:, 0] > 0]
        return chosen.square().mean() + 0 * h.sum()  # <- here


@bug("aten.nll_loss_forward", "empty_reduction", bad=ALL)
class AllTargetsIgnored(Small):
    def loss(self, h, y, s):
        target = torch.where(s[:, 0] > 0, y, -100)
        return F.cross_entropy(h, target)  # <- here


@bug("aten.mse_loss", "empty_reduction", bad=ALL)
class ErrorOfNothing(Small):
    def loss(self, h, y, s):
        keep = s[:, 0] > 0
        return F.mse_loss(h[keep, 0], y[keep].float())  # <- here


@bug("aten.mean", "empty_reduction", bad=ALL)
class MaskedSelectOfNothing(Small):
    def loss(self, h, y, s):
        return torch.masked_select(h, s > 0).abs().mean()  # <- here


@bug("aten.binary_cross_entropy", "empty_reduction", bad=ALL)
class NoCandidates(Small):
    def loss(self, h, y, s):
        p = h.sigmoid()[s[:, 0] > 0]
        return F.binary_cross_entropy(p, torch.ones_like(p))  # <- here


@bug("aten.smooth_l1_loss", "empty_reduction", bad=ALL)
class NoBoxes(Small):
    def loss(self, h, y, s):
        boxes = h[(s > 0).squeeze(1)]
        return F.smooth_l1_loss(boxes, torch.zeros_like(boxes)) + h.mean()  # <- here


@bug("aten.std", "empty_reduction", bad=tuple(range(1, 8)), samples=ALL)
class DeviationOfOne(Small):
    """One sample is left. Each alone is too few, the good one and the bad ones."""

    def loss(self, h, y, s):
        left = h[s[:, 0] > 0]
        return left.std(dim=0).mean() + h.mean()  # <- here


@bug("aten.var", "empty_reduction", samples=ALL, bad=tuple(range(1, 8)))
class VarianceOfOne(Small):
    def loss(self, h, y, s):
        left = h[s[:, 0] > 0, 0]
        return h.square().mean() - left.var()  # <- here


@bug("aten.median", "empty_reduction", bad=ALL)
class MedianOfNothing(Small):
    def loss(self, h, y, s):
        errors = h.abs()[s[:, 0] > 0]
        return errors.median() + 0 * h.sum()  # <- here


@bug("aten.nll_loss_forward", "empty_reduction", bad=ALL)
class ClassesWithoutWeight(Small):
    def loss(self, h, y, s):
        weight = torch.tensor([1.0, 1.0, 1.0, 0.0])
        target = torch.where(s[:, 0] > 0, y, 3)
        return F.cross_entropy(h, target, weight=weight)  # <- here


@bug("aten.nll_loss2d_forward", "empty_reduction", bad=ALL)
class SegmentationWithoutLabels(Small):
    def loss(self, h, y, s):
        maps = h[:, :, None, None].expand(-1, -1, 2, 2)
        target = torch.where(s[:, :, None] > 0, y[:, None, None], 255).expand(-1, 2, 2)
        return F.cross_entropy(maps, target, ignore_index=255)  # <- here


@bug("aten.mean", "empty_reduction", bad=ALL)
class NoKeypoints(Small):
    def loss(self, h, y, s):
        seen = (s > 0).expand(-1, 4)
        return torch.nn.L1Loss()(h[seen], torch.ones(int(seen.sum())))  # <- here


@bug("aten.std", "empty_reduction")
class DeviationOfOneColumn(Small):
    def loss(self, h, y, s):
        columns = 1 if bool((s == 0).any()) else 4
        return h[:, :columns].std(1).mean() + h.mean()  # <- here


@bug("aten.mean", "empty_reduction", bad=ALL)
class NoPairs(Small):
    def loss(self, h, y, s):
        label = y * s[:, 0].long()
        other = label[:, None] != label[None]
        distance = torch.cdist(h, h)
        return distance[other].mean()  # <- here


@bug("aten.binary_cross_entropy_with_logits", "empty_reduction", samples=tuple(range(8)), bad=tuple(range(8)))
class NoAnchorIsPositive(Small):
    def loss(self, h, y, s):
        positive = s[:, 0] > 0
        target = torch.ones_like(h[positive])
        return F.binary_cross_entropy_with_logits(h[positive], target) + 0.1 * h.square().mean()  # <- here
