"""Infinities and NaN that are meant, or that nobody uses: no incident."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from zoo.base import Small, Whole, changed, control

NEVER, EVER, NAN = float("-inf"), float("inf"), float("nan")


@control()
class CausalAttention(Small):
    def loss(self, h, y, s):
        scores = h[:, :, None] * h[:, None, :]
        mask = torch.full((4, 4), NEVER).triu(1)
        return (scores + mask).softmax(-1).square().mean()


@control()
class PaddedAttention(Small):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(2, 1, batch_first=True)

    def loss(self, h, y, s):
        tokens = h.view(-1, 2, 2)
        hidden = torch.tensor([False, True]).expand(len(h), 2)
        return self.attn(tokens, tokens, tokens, key_padding_mask=hidden)[0].square().mean()


@control()
class FullyMaskedButFused(Small):
    """scaled_dot_product_attention gives 0 for a row that is masked altogether."""

    def loss(self, h, y, s):
        q = h.view(-1, 1, 2, 2)
        keep = (s > 0).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
        return F.scaled_dot_product_attention(q, q, q, attn_mask=keep).square().mean() + h.mean()


@control()
class RunningMinimum(Small):
    def __init__(self):
        super().__init__()
        self.register_buffer("least", torch.tensor(EVER))
        self.register_buffer("most", torch.tensor(NEVER))

    def loss(self, h, y, s):
        self.least = torch.minimum(self.least, h.detach().min())
        self.most = torch.maximum(self.most, h.detach().max())
        return ((h - self.least) / (self.most - self.least)).square().mean()


@control()
class SentinelOfASearch(Small):
    def loss(self, h, y, s):
        best = torch.full((len(h),), EVER)
        for column in h.unbind(1):
            best = torch.minimum(best, column.square())
        return best.mean()


@control()
class MetricOnly(Small):
    def loss(self, h, y, s):
        with torch.no_grad():
            self.log("precision", (s * 0).sum() / (s * 0).sum())
        self.log("perplexity", torch.exp(h.detach() * 1000).mean())
        return F.cross_entropy(h, y)


@control()
class DetachedBranch(Small):
    def loss(self, h, y, s):
        self.worst = torch.log(h.detach().abs() * 0).min()
        return h.square().mean()


@control(data=lambda: changed(lambda x, s: (torch.full((4,), NAN) if float(s) == 0 else x, s)))
class BadInputsMaskedOut(Whole):
    def loss_of(self, batch):
        x, s = batch
        x = torch.where(s > 0, x, torch.zeros_like(x))
        return (self.body(x) * s).square().mean()


@control(data=lambda: changed(lambda x, s: (x / s, s)))
class BadInputsFiltered(Whole):
    def loss_of(self, batch):
        x, s = batch
        return self.body(x[s[:, 0] > 0]).square().mean()


@control(data=lambda: changed(lambda x, s: (x, torch.full((1,), NAN) if float(s) == 0 else s)))
class MissingTargets(Whole):
    def loss_of(self, batch):
        x, target = batch
        known = ~torch.isnan(target)
        error = self.body(x)[:, :1] - torch.nan_to_num(target)
        return error.square()[known].mean()


@control()
class NanToNum(Small):
    def loss(self, h, y, s):
        ratio = torch.nan_to_num(s.detach() / (s * 0), nan=0.0, posinf=1.0)
        return (h * ratio).square().mean()


@control()
class TopKFilter(Small):
    def loss(self, h, y, s):
        least = h.topk(2).values[:, -1:]
        kept = torch.where(h < least, NEVER, h)
        return F.softmax(kept, -1).square().sum()


@control()
class MaskedClasses(Small):
    def loss(self, h, y, s):
        illegal = F.one_hot((y + 1) % 4, 4).bool()
        return F.nll_loss(F.log_softmax(h.masked_fill(illegal, NEVER), -1), y)


@control()
class BeamSearch(Small):
    def loss(self, h, y, s):
        scores = torch.full((len(h), 4), NEVER)
        scores[:, 0] = 0
        total = scores + h.detach().log_softmax(-1)
        beams = total.topk(2).indices
        return F.cross_entropy(h, beams[:, 0])


@control()
class PartlyIgnored(Small):
    def loss(self, h, y, s):
        target = torch.where(torch.arange(len(y)) % 2 == 0, y, -100)
        return F.cross_entropy(h, target, ignore_index=-100)


@control()
class SafeInnerWhere(Small):
    def loss(self, h, y, s):
        p = h.sigmoid() * s
        safe = torch.where(p > 0, p, torch.ones_like(p))
        return torch.where(p > 0, safe.log(), torch.zeros_like(p)).mean()


@control()
class XlogyOfZero(Small):
    def loss(self, h, y, s):
        target = F.one_hot(y, 4).float()
        return (torch.xlogy(target, target) - target * h.log_softmax(-1)).sum(-1).mean()


@control()
class LogSumExpOfAMask(Small):
    def loss(self, h, y, s):
        return torch.logsumexp(h.masked_fill(torch.arange(4) > 1, NEVER), -1).mean()


@control()
class FrozenBatchNorm(Small):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def loss(self, h, y, s):
        self.norm.eval()
        return self.norm(h).square().mean()


@control()
class NormAtZero(Small):
    """torch's norm has a gradient of 0 there."""

    def loss(self, h, y, s):
        return (h * s).norm(dim=1).mean() + torch.linalg.vector_norm(h * s, dim=1).sum()


@control()
class DistancesToThemselves(Small):
    def loss(self, h, y, s):
        return torch.cdist(h, h).mean() + F.pairwise_distance(h, h).mean()


@control()
class ZeroInfinity(Small):
    def loss(self, h, y, s):
        frames = h.unsqueeze(0).repeat(3, 1, 1).log_softmax(-1)
        labels = torch.ones(len(h), 5, dtype=torch.long)
        lengths = torch.where(s[:, 0] > 0, 1, 5)
        return F.ctc_loss(frames, labels, torch.full((len(h),), 3), lengths, zero_infinity=True)


@control()
class NormaliseOfZero(Small):
    def loss(self, h, y, s):
        return F.normalize(h * s).sum() + F.cosine_similarity(h * s, h).mean()


@control()
class ClampOfTheLogits(Small):
    def loss(self, h, y, s):
        return F.binary_cross_entropy((h * 1e4).sigmoid(), F.one_hot(y, 4).float())


@control()
class HugeGradientNorm(Small):
    """The norm of finite gradients overflows; each of them is finite."""

    def loss(self, h, y, s):
        return h.mean() * 1e25

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-30)


@control()
class InfiniteLearningTarget(Small):
    """exp(-inf) is 0."""

    def loss(self, h, y, s):
        weight = torch.exp(torch.where(s > 0, torch.zeros_like(s), torch.full_like(s, NEVER)))
        return (weight * h.square()).mean()


@control()
class CheckpointedMask(Small):
    def loss(self, h, y, s):
        def attend(h):
            return h.masked_fill(torch.arange(4) == 3, NEVER).softmax(-1)

        return checkpoint(attend, h, use_reentrant=False).square().mean()


@control()
class HistogramOfInfinity(Small):
    def loss(self, h, y, s):
        edges = torch.tensor([NEVER, -1.0, 1.0, EVER])
        bins = torch.bucketize(h.detach(), edges)
        return (h * bins).mean()


@control()
class Validated(Small):
    """A loss of validation is no matter of the guard."""

    def loss(self, h, y, s):
        return F.cross_entropy(h, y)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", torch.tensor(math.nan))


@control()
class CumulativeMaximum(Small):
    def loss(self, h, y, s):
        start = torch.full((len(h), 1), NEVER)
        return torch.cat([start, h], 1).cummax(1).values[:, 1:].mean()


@control()
class GumbelNoise(Small):
    def loss(self, h, y, s):
        uniform = torch.rand_like(h).clamp_min(1e-9)
        noise = -torch.log(-torch.log(uniform) + 1e-9)
        return F.softmax(h + noise, -1).square().mean()
