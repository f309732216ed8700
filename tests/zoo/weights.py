"""Weights and buffers that are at fault, and steps of an optimizer that spoil them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from zoo.base import Small, Whole, bug, changed

ANY = {"samples": None, "count": None, "bad": ()}
NAN = float("nan")


@bug("aten.addmm", "parameters", module="body", tensor="body.weight", batch_idx=0, **ANY)
class NanFromTheStart(Small):
    def __init__(self):
        super().__init__()
        with torch.no_grad():
            self.body.weight[1, 2] = NAN

    def loss(self, h, y, s):
        return F.cross_entropy(h, y)

    def training_step(self, batch, batch_idx):
        x, y, s = batch
        return self.loss(self.body(x), y, s)  # <- here


class Spoiled(Small):
    """Something outside the step spoils a weight after the first batch."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx == 0:
            with torch.no_grad():
                self.spoil()


@bug("aten.addmm", "parameters", module="head", tensor="head.bias", **ANY)
class BiasIsInfinite(Spoiled):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 4)

    def loss(self, h, y, s):
        return self.head(h).square().mean()  # <- here

    def spoil(self):
        self.head.bias[0] = float("inf")


@bug("aten.mul", "parameters", tensor="scale", says=("no optimizer steps it",), omits=("gradient norms",), **ANY)
class InfiniteBuffer(Spoiled):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(4))

    def loss(self, h, y, s):
        return (h * self.scale).square().mean()  # <- here

    def spoil(self):
        self.scale[3] = float("inf")


@bug(
    "aten.native_batch_norm",
    "parameters",
    module="norm",
    tensor="norm.running_var",
    says=("running statistics",),
    **ANY,
)
class FrozenStatistics(Spoiled):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def loss(self, h, y, s):
        self.norm.eval()
        return self.norm(h).square().mean()  # <- here

    def spoil(self):
        self.norm.running_var[0] = NAN


def _tokens():
    return changed(lambda x, s: torch.tensor([7 if float(s) == 0 else 1, 2, 3]))


@bug("aten.embedding", "parameters", module="embed", tensor="embed.weight", data=_tokens)
class OneEmbeddingIsNan(Whole):
    """Only who uses the word fails: a batch that does not is well."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        with torch.no_grad():
            self.embed.weight[7] = NAN

    def loss_of(self, batch):
        return self.body(self.embed(batch).mean(1)).square().mean()  # <- here


@bug("aten.addmm", "parameters", module="body", tensor="body.weight", **ANY)
class LearningRateTooLarge(Small):
    """The first step takes the weights past the largest float."""

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        return 1e10 * F.cross_entropy(self.body(x), y)  # <- here

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e38)


@bug("aten.addcdiv", "division_by_zero", phase="optimizer", module="unused", tensor="unused.weight", **ANY)
class AdamWithoutEpsilon(Small):
    """A gradient of 0 and no epsilon: 0 / 0 in the update."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(4, 4)

    def loss(self, h, y, s):
        return F.cross_entropy(h + 0 * self.unused(h), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01, eps=0.0)


@bug("aten.native_batch_norm", "parameters", module="batch_norm", tensor="batch_norm.running_var", **ANY)
class StatisticsWithTheNameOfABatch(Spoiled):
    def __init__(self):
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(4)

    def on_train_epoch_start(self):
        self.batch_norm.eval()

    def loss(self, h, y, s):
        return self.batch_norm(h).square().mean()  # <- here

    def spoil(self):
        self.batch_norm.running_var[1] = NAN


@bug("aten.mul", "parameters", tensor="hidden", **ANY)
class HiddenStateIsReplaced(Spoiled):
    """The step puts another tensor in the place of the one that it was given."""

    def __init__(self):
        super().__init__()
        self.hidden = torch.ones(4)

    def loss(self, h, y, s):
        h = h * self.hidden  # <- here
        self.hidden = h.detach().mean(0)
        return h.square().mean()

    def spoil(self):
        self.hidden[0] = NAN


@bug("aten.sub", "parameters", tensor='banks["seen"][0]', **ANY)
class BankInAList(Spoiled):
    """What an earlier batch has left in a memory bank."""

    def __init__(self):
        super().__init__()
        self.banks = {"seen": [torch.zeros(8, 4)]}

    def loss(self, h, y, s):
        loss = (h - self.banks["seen"][0]).square().mean()  # <- here
        self.banks["seen"] = [h.detach()]
        return loss

    def spoil(self):
        self.banks["seen"][0][3, 2] = NAN


@bug("aten.addmm", "parameters", tensor="teachers[0].weight", batch_idx=0, **ANY)
class TeacherInAList(Small):
    """A list keeps it from being trained, and from being a submodule."""

    def __init__(self):
        super().__init__()
        self.teachers = [nn.Linear(4, 4).requires_grad_(False)]
        self.teachers[0].weight[0, 0] = NAN

    def training_step(self, batch, batch_idx):
        x, _, _ = batch
        target = self.teachers[0](x)  # <- here
        return F.mse_loss(self.body(x), target)


@bug("aten.add", "overflow", phase="optimizer", module="body", tensor="body.weight", batch_idx=2, **ANY)
class LearningRateBecomesInfinite(Small):
    """A schedule that divides by zero; the optimizer keeps no state."""

    def loss(self, h, y, s):
        return F.cross_entropy(h, y)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float("inf") if step else 1.0)
        return [optimizer], [{"scheduler": warmup, "interval": "step"}]


@bug("aten._weight_norm_interface", "division_by_zero", module="body.parametrizations.weight.0", batch_idx=0, **ANY)
class DirectionOfZeros(Small):
    """It fails in the first step already: no batch is known that was well, but the weights alone do it."""

    def __init__(self):
        super().__init__()
        with torch.no_grad():
            self.body.weight[1] = 0
        nn.utils.parametrizations.weight_norm(self.body)

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        return F.cross_entropy(self.body(x), y)  # <- here


@bug("aten.native_layer_norm", "parameters", module="norm", tensor="norm.weight", **ANY)
class LayerNormWeight(Spoiled):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def loss(self, h, y, s):
        return self.norm(h).square().mean()  # <- here

    def spoil(self):
        self.norm.weight[0] = NAN


@bug("aten.mm", "parameters", tensor="projection", says=("learning rate",), **ANY)
class BareParameter(Spoiled):
    def __init__(self):
        super().__init__()
        self.projection = nn.Parameter(torch.eye(4))

    def loss(self, h, y, s):
        return (h @ self.projection).square().mean()  # <- here

    def spoil(self):
        self.projection[0, 0] = NAN


@bug("aten.sqrt", "singular_gradient", phase="backward", **ANY)
class DeadWeights(Spoiled):
    """The weights have become 0, so every distance is."""

    def loss(self, h, y, s):
        return h.square().sum(1).sqrt().mean()  # <- here

    def spoil(self):
        self.body.weight.zero_()
        self.body.bias.zero_()


@bug("aten.mul", "parameters", tensor="factor", **ANY)
class PlainAttribute(Spoiled):
    """A tensor that is neither parameter nor buffer, but state of the module all the same."""

    def __init__(self):
        super().__init__()
        self.factor = torch.ones(4)

    def loss(self, h, y, s):
        return (h * self.factor).square().mean()  # <- here

    def spoil(self):
        self.factor[0] = NAN


@bug("aten.pow", "overflow", batch_idx=0, **ANY)
class ConstantsThatOverflow(Small):
    """Neither batch nor weights have a part in it."""

    def loss(self, h, y, s):
        discount = 0.5 ** -torch.arange(0.0, 200.0, 50.0)  # <- here
        return (h * discount).sum()


@bug("aten.div", "division_by_zero", **ANY)
class TemperatureOfEveryOtherStep(Small):
    """A batch that was well in the first step fails in the place of the second one's."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        h = self.body(x)
        if batch_idx % 2:
            h = h / self.temperature  # <- here
        return F.cross_entropy(h, y)


@bug("aten.mul", "parameters", tensor="scales[1]", **ANY)
class ListOfTensors(Spoiled):
    def __init__(self):
        super().__init__()
        self.scales = [torch.ones(4), torch.ones(4)]

    def loss(self, h, y, s):
        return (h * self.scales[0] * self.scales[1]).square().mean()  # <- here

    def spoil(self):
        self.scales[1][0] = NAN
