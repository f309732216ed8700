"""Division by an exact 0."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, default_collate

from zoo.base import SIZE, Small, Whole, bug, rows

ALL = tuple(range(8))


@bug("aten.div", "division_by_zero")
class NormaliseByHand(Small):
    def loss(self, h, y, s):
        h = h * s
        unit = h / h.norm(dim=1, keepdim=True)  # <- here
        return unit.sum()


@bug("aten.div", "division_by_zero")
class CosineByHand(Small):
    def loss(self, h, y, s):
        a, b = h * s, h.roll(1, 1)
        cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))  # <- here
        return 1 - cosine.mean()


@bug("aten.div", "division_by_zero")
class SoftmaxByHandUnderflows(Small):
    def loss(self, h, y, s):
        e = torch.exp(h - 300 * (1 - s))
        p = e / e.sum(1, keepdim=True)  # <- here
        return p.square().mean()


@bug("aten.reciprocal", "division_by_zero")
class InverseVariance(Small):
    def loss(self, h, y, s):
        precision = 1 / (h.square().sum(1) * s[:, 0])  # <- here
        return precision.mean()


@bug("aten.pow", "division_by_zero")
class MinusOneAsPower(Small):
    def loss(self, h, y, s):
        width = h.abs().sum(1) * s[:, 0]
        return (width**-1).mean()  # <- here


@bug("aten.div", "division_by_zero", bad=ALL)
class MaskedMeanOfNothing(Small):
    def loss(self, h, y, s):
        error = (h.sum(1) - y).square()
        mask = s[:, 0]
        return (error * mask).sum() / mask.sum()  # <- here


@bug("aten.div", "division_by_zero", bad=ALL)
class CountIsAPythonZero(Small):
    def loss(self, h, y, s):
        count = int((s > 0).sum())
        return h.square().sum() / count  # <- here


@bug("aten.div", "division_by_zero")
class NormaliseWithoutEpsilon(Small):
    def loss(self, h, y, s):
        return F.normalize(h * s, eps=0.0).sum()  # <- here


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4, eps=0.0)

    def forward(self, h):
        return self.norm(h)  # <- here


@bug("aten.native_layer_norm", "division_by_zero", module="tail.norm", source=Norm)
class LayerNormWithoutEpsilon(Small):
    def __init__(self):
        super().__init__()
        self.tail = Norm()

    def loss(self, h, y, s):
        return self.tail(h * s).square().mean()


@bug("aten.div", "division_by_zero")
class IntersectionOverUnion(Small):
    def loss(self, h, y, s):
        p, t = h.sigmoid() * s, F.one_hot(y, 4) * s
        inter = (p * t).sum(1)
        union = (p + t - p * t).sum(1)
        return 1 - (inter / union).mean()  # <- here


@bug("aten.div", "division_by_zero")
class Dice(Small):
    def loss(self, h, y, s):
        p, t = h.sigmoid() * s, F.one_hot(y, 4) * s
        score = 2 * (p * t).sum(1)
        score = score / (p.sum(1) + t.sum(1))  # <- here
        return (1 - score).mean()


@bug("aten.div", "division_by_zero")
class SignByHand(Small):
    def loss(self, h, y, s):
        h = h * s
        return (h / h.abs()).mean() + h.mean()  # <- here


@bug("aten.remainder", "division_by_zero")
class RemainderOfZero(Small):
    def loss(self, h, y, s):
        period = 2 * s
        return (h % period).sum()  # <- here


@bug("aten.fmod", "division_by_zero")
class WrappedPhase(Small):
    def loss(self, h, y, s):
        return torch.fmod(h, 3.14 * s).square().mean()  # <- here


@bug("aten.div", "division_by_zero")
class DivisionInPlace(Small):
    def loss(self, h, y, s):
        weights = h + 1
        weights /= s  # <- here
        return weights.mean()


@bug("aten.div", "division_by_zero")
class WeightedMeanWithoutWeight(Small):
    def loss(self, h, y, s):
        weights = h.sigmoid().detach() * s
        return ((weights * h).sum(1) / weights.sum(1)).mean()  # <- here


@bug("aten.div", "division_by_zero", bad=ALL)
class FScore(Small):
    def loss(self, h, y, s):
        p = h.sigmoid()[:, 0] * s[:, 0]
        hit = (p * s[:, 0]).sum()
        precision = hit / p.sum()  # <- here
        recall = hit / (s.sum() + 1e-6)
        return 1 - 2 * precision * recall / (precision + recall + 1e-6)


@bug("aten.div", "division_by_zero", bad=ALL)
class StandardisedBatch(Small):
    """All samples of the batch are alike. Any two of them do it."""

    def loss(self, h, y, s):
        value = h[:, 0] * s[:, 0]
        z = (value - value.mean()) / value.std()  # <- here
        return z.square().mean() + h.mean()


@bug("aten.div", "division_by_zero", samples=None, count=None)
class TemperatureReachesZero(Small):
    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))

    def loss(self, h, y, s):
        return F.cross_entropy(h / self.temperature, y)  # <- here

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx == 0:
            with torch.no_grad():
                self.temperature.zero_()


@bug("aten.div", "division_by_zero", samples=None, count=None, batch_idx=0)
class TemperatureStartsAtZero(Small):
    """No batch has ever been well; but what is divided by depends on none."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.zeros(()))

    def loss(self, h, y, s):
        scaled = h / self.temperature  # <- here
        return F.cross_entropy(scaled, y)


@bug("aten.div", "division_by_zero", samples=(3,), bad=(3,))
class SegmentMean(Small):
    """A sample without any tokens."""

    def loss(self, h, y, s):
        tokens = h.view(-1, 2, 2)
        mask = (s > 0).float().expand(-1, 2)
        total = torch.einsum("btd,bt->bd", tokens, mask)
        return (total / mask.sum(1, keepdim=True)).square().sum()  # <- here


@bug("aten.native_group_norm", "division_by_zero", module="norm")
class GroupNormWithoutEpsilon(Small):
    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(2, 4, eps=0.0)

    def loss(self, h, y, s):
        return self.norm(h * s).square().mean()  # <- here


@bug(
    "aten._weight_norm_interface", "division_by_zero", module="lin.parametrizations.weight.0", samples=None, count=None
)
class WeightNormOfZero(Small):
    def __init__(self):
        super().__init__()
        self.lin = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))

    def loss(self, h, y, s):
        return self.lin(h).square().mean()  # <- here

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with torch.no_grad():
            self.lin.parametrizations.weight.original1.zero_()


@bug("aten.div", "division_by_zero", phase="backward")
class ClampedRatio(Small):
    """The infinity is clamped, its derivative is not."""

    def loss(self, h, y, s):
        ratio = h[:, 0] / s[:, 0]  # <- here
        return ratio.clamp(-5, 5).mean()


@bug("aten.div", "division_by_zero", samples=(0, 4), bad=(0, 4))
class SaturatedRatio(Small):
    def loss(self, h, y, s):
        odds = h.sigmoid() / (s * (1 - h.sigmoid()))  # <- here
        return odds.log().mean()


@bug("aten.reciprocal", "division_by_zero")
class ComplexImpedance(Small):
    def loss(self, h, y, s):
        impedance = torch.complex(h, h + 1) * s
        return (1 / impedance).abs().mean()  # <- here


def _no_positives():
    return [(x, y * 0 if position < 8 else y) for position, (x, y, _) in enumerate(rows())]


@bug("aten.div", "division_by_zero", samples=tuple(range(8)), data=_no_positives, batch_idx=0, count=None)
class CountAsANumber(Whole):
    """The count is read out of the batch, and no longer a tensor when it divides."""

    def loss_of(self, batch):
        x, y = batch
        positives = int((y > 0).sum())
        return (self.body(x).square().sum(1) * (y > 0)).sum() / positives  # <- here


@bug("aten.div", "division_by_zero", samples=tuple(range(8)), batch_idx=0, count=None, data=lambda: rows((), 2))
class CountedInPython(Small):
    """The divisor is a number that was read from the batch: not even in the first step are the weights to blame."""

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        found = (x[:, 0] > 100).sum().item()
        return F.cross_entropy(self.body(x), y, reduction="sum") / found  # <- here


def _counted(samples):
    x, y, _ = default_collate(samples)
    return {"x": x, "y": y, "count": int((x[:, 0] > 100).sum())}


@bug(
    "aten.div",
    "division_by_zero",
    samples=tuple(range(8)),
    batch_idx=0,
    count=None,
    data=lambda: DataLoader(rows((), 2), batch_size=SIZE, collate_fn=_counted),
)
class CountInTheBatch(Whole):
    """The divisor is a number of the batch, and was never a tensor of it."""

    def loss_of(self, batch):
        return F.cross_entropy(self.body(batch["x"]), batch["y"], reduction="sum") / batch["count"]  # <- here


@bug("aten.pow", "division_by_zero")
class NormalisedSparseGraph(Small):
    """What is not finite goes on as the values of a sparse matrix."""

    def loss(self, h, y, s):
        edges = torch.arange(len(h)).expand(2, -1)
        weights = s[:, 0].pow(-0.5)  # <- here
        graph = torch.sparse_coo_tensor(edges, weights, (len(h), len(h)))
        return torch.sparse.mm(graph, h).square().mean()


@bug("aten.div", "division_by_zero", samples=tuple(range(8)), data=_no_positives, batch_idx=0, count=None)
class LengthOfASelection(Whole):
    """How many there are is known from the shape of what was chosen."""

    def loss_of(self, batch):
        x, y = batch
        positives = x[y > 0]
        return self.body(x).square().sum() / len(positives)  # <- here
