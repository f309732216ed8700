"""Samples that fail alone, together, or in company only."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from zoo.base import Small, bug, rows

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


@bug("aten.log", "log_of_zero", samples=(2,), bad=(2, 5))
class TwoBugsInOneBatch(Small):
    """The samples are those of the first: the other one has another origin."""

    def loss(self, h, y, s):
        one = torch.where(y == 2, s[:, 0], torch.ones_like(s[:, 0]))
        two = torch.where(y == 2, torch.ones_like(s[:, 0]), s[:, 0])
        first = torch.log(h.sigmoid() * one[:, None])  # <- here
        return first.mean() + torch.acos(h.tanh() * 0.5 + 3 * (1 - two)[:, None]).mean()


@bug("aten.acos", "invalid_domain")
class BesideWhatIsMaskedOut(Small):
    """The same tensor holds -inf that nobody uses, from an earlier line."""

    def loss(self, h, y, s):
        with torch.no_grad():
            unused = torch.log(h.sigmoid() * s)
        angles = torch.acos(h.tanh() * 0.5 + 3 * (1 - s))  # <- here
        table = torch.stack([unused, angles])
        wanted = torch.tensor([False, True])[:, None, None]
        return torch.where(wanted, table, torch.zeros_like(table)).mean()


def _partly_missing():
    return [(x * float("nan") if position == 9 else x, s) for position, (x, _, s) in enumerate(rows())]


@bug("aten.sqrt", "invalid_domain", module="", data=_partly_missing)
class BesideBadInputsThatAreMaskedOut(Small):
    """A NaN of the data is left out of the loss, after it has run through the same layers as the bug."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(4, 4)

    def training_step(self, batch, batch_idx):
        x, s = batch
        present = ~torch.isnan(x).any(1, keepdim=True)
        h = self.body(x)
        z = torch.sqrt(h.square() + 0.1 - 9 * (1 - s))  # <- here
        out = F.softmax(self.head(torch.cat([z[:, :2], h[:, 2:]], 1)), -1)
        error = torch.where(present, out.square(), torch.zeros_like(out)).sum(1)
        return error.mean()


@bug("aten.div", "division_by_zero", samples=ALL, bad=ALL)
class ClassesThatNobodyHas(Small):
    """A row for each of eight classes, of which none is a row of the batch: each sample alone leaves seven empty, too."""

    def loss(self, h, y, s):
        classes = y * s[:, 0].long()
        totals = torch.zeros(8, 4).index_add(0, classes, h)
        counts = torch.zeros(8).index_add(0, classes, torch.ones(len(h))) + s.mean()
        means = totals / counts[:, None]  # <- here
        return means.square().mean()
