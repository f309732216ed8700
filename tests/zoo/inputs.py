"""Bad values in the data, in batches of every shape."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from zoo.base import SIZE, Whole, bug, changed

NAN, INF = float("nan"), float("inf")


def spoiled(x, s, value=NAN):
    if float(s) == 0:
        x[1] = value
    return x


@bug("aten.addmm", "bad_input", module="body", tensor="batch[0]", data=lambda: changed(lambda x, s: (spoiled(x, s), s)))
class NanPixel(Whole):
    def loss_of(self, batch):
        x, s = batch
        return self.body(x).square().mean() + s.mean()  # <- here


@bug("aten.addmm", "bad_input", module="body", tensor="batch", data=lambda: changed(lambda x, s: spoiled(x, s, INF)))
class InfinitePixel(Whole):
    def loss_of(self, batch):
        out = self.body(batch)  # <- here
        return out.sigmoid().mean()


@bug(
    "aten.mse_loss",
    "bad_input",
    tensor='batch["target"]',
    data=lambda: changed(lambda x, s: {"x": x, "target": spoiled(x * 2, s)}),
)
class NanTarget(Whole):
    def loss_of(self, batch):
        return F.mse_loss(self.body(batch["x"]), batch["target"])  # <- here


def _nested(x, s):
    return {"image": {"left": x, "right": spoiled(x.clone(), s)}, "meta": {"id": 1, "name": "a"}}


@bug("aten.addmm", "bad_input", module="net.0", tensor='batch["image"]["right"]', data=lambda: changed(_nested))
class NestedDictionary(Whole):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1))

    def loss_of(self, batch):
        left, right = batch["image"]["left"], batch["image"]["right"]
        return (self.net(left) - self.net(right)).square().mean()  # <- here


Pair = namedtuple("Pair", "features weight")


@bug("aten.mul", "bad_input", tensor="batch.weight", data=lambda: changed(lambda x, s: Pair(x, 1 / s)))
class InfiniteSampleWeight(Whole):
    def loss_of(self, batch):
        per_sample = self.body(batch.features).square().mean(1, keepdim=True)
        return (per_sample * batch.weight).mean()  # <- here


@dataclass
class Record:
    x: Tensor
    y: Tensor


def _records():
    def collate(samples):
        return Record(torch.stack([x for x, _ in samples]), torch.stack([y for _, y in samples]))

    return DataLoader(changed(lambda x, s: (x, spoiled(x + 1, s, -INF))), batch_size=SIZE, collate_fn=collate)


@bug("aten.sub", "bad_input", tensor="batch.y", data=_records)
class DataclassBatch(Whole):
    def loss_of(self, batch):
        return (self.body(batch.x) - batch.y).square().sum()  # <- here


def _lists():
    def collate(samples):
        return {"sequences": [x for x, _ in samples], "scale": torch.stack([s for _, s in samples])}

    data = changed(lambda x, s: (spoiled(x, s).repeat(1 + int(abs(float(x[0])) * 3))[:, None], s))
    return DataLoader(data, batch_size=SIZE, collate_fn=collate)


@bug("aten.mean", "bad_input", tensor='batch["sequences"][2]', data=_lists)
class SequencesOfAnyLength(Whole):
    def loss_of(self, batch):
        pooled = torch.stack([sequence.mean() for sequence in batch["sequences"]])  # <- here
        return (self.body.weight.sum() * pooled).square().mean()


def _uncollated():
    data = changed(lambda x, s: {"x": spoiled(x, s), "y": torch.tensor(1.0)})
    return DataLoader(data, batch_size=SIZE, collate_fn=list)


@bug("aten.stack", "bad_input", tensor='batch[2]["x"]', data=_uncollated)
class ListOfSamples(Whole):
    def loss_of(self, batch):
        x = torch.stack([sample["x"] for sample in batch])  # <- here
        return self.body(x).square().mean()


def _time_first():
    def collate(samples):
        return {"frames": torch.stack([x.repeat(3, 1) for x in samples], 1), "weight": torch.ones(len(samples))}

    return DataLoader(changed(spoiled), batch_size=SIZE, collate_fn=collate)


@bug("aten.mm", "bad_input", module="rnn", tensor='batch["frames"]', data=_time_first)
class TimeFirst(Whole):
    def __init__(self):
        super().__init__()
        self.rnn = nn.Linear(4, 2, bias=False)

    def loss_of(self, batch):
        out = self.rnn(batch["frames"])  # <- here
        return (out.mean(0).mean(1) * batch["weight"]).square().mean()


@bug("aten.sub", "bad_input", tensor="batch[0]", data=lambda: changed(lambda x, s: (spoiled(x, s), s)))
class Normalised(Whole):
    """The first use is the normalisation, not the model."""

    def loss_of(self, batch):
        x = (batch[0] - 0.5) / 0.2  # <- here
        return self.body(x).square().mean()


@bug(
    "aten.convolution",
    "bad_input",
    module="conv",
    tensor="batch",
    data=lambda: changed(lambda x, s: spoiled(x, s)[None]),
)
class ConvolutionOfNan(Whole):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 3)

    def loss_of(self, batch):
        return self.conv(batch).relu().mean()  # <- here


@bug(
    "aten.binary_cross_entropy_with_logits",
    "bad_input",
    tensor="batch[1]",
    samples=(1,),
    bad=(1,),
    data=lambda: changed(lambda x, s: (x, s / s), (1,)),
)
class NanLabel(Whole):
    def loss_of(self, batch):
        x, label = batch
        return F.binary_cross_entropy_with_logits(self.body(x)[:, :1], label)  # <- here


@bug("aten.native_batch_norm", "bad_input", module="norm", tensor="batch", data=lambda: changed(spoiled))
class NormalisedFirst(Whole):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def loss_of(self, batch):
        return self.body(self.norm(batch)).square().mean()  # <- here


@bug("aten.addmm", "bad_input", module="body", tensor="batch[0]", data=lambda: changed(lambda x, s: (spoiled(x, s), s)))
class BesideAMaskedMetric(Whole):
    """A metric that is NaN as well, and earlier, is not to blame."""

    def loss_of(self, batch):
        x, s = batch
        with torch.no_grad():
            self.log("ratio", (s - s).mean() / (s - s).sum())
        return self.body(x).square().mean()  # <- here


@bug(
    "aten.mkldnn_rnn_layer",
    "bad_input",
    module="rnn",
    tensor="batch",
    data=lambda: changed(lambda x, s: spoiled(x, s, INF)[:, None]),
)
class SequenceOfInfinities(Whole):
    """The gates swallow the infinity, the weights' gradient does not."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(1, 3, batch_first=True)

    def loss_of(self, batch):
        out, _ = self.rnn(batch)  # <- here
        return out.square().mean()


@bug("aten.mm", "bad_input", module="rnn", tensor="batch", data=lambda: changed(lambda x, s: spoiled(x, s)[:, None]))
class SequenceOfNan(Whole):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(1, 3, batch_first=True)

    def loss_of(self, batch):
        out, _ = self.rnn(batch)  # <- here
        return out.square().mean()


@bug(
    "aten.addmm",
    "bad_input",
    module="body",
    tensor="batch",
    data=lambda: changed(spoiled),
    trainer={"precision": "bf16-mixed"},
)
class NanUnderAutocast(Whole):
    """The cast that autocast inserts is not what the user wrote."""

    def loss_of(self, batch):
        return self.body(batch).float().square().mean()  # <- here
