"""Finite values with an infinite derivative."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from zoo.base import Small, Whole, bug

PART = {"phase": "backward"}


@bug("aten.sqrt", "singular_gradient", **PART)
class EuclideanByHand(Small):
    def loss(self, h, y, s):
        return (h * s).square().sum(1).sqrt().mean()  # <- here


@bug("aten.sqrt", "singular_gradient", **PART)
class DeviationByHand(Small):
    def loss(self, h, y, s):
        spread = torch.sqrt((h * s).var(1))  # <- here
        return spread.mean()


@bug("aten.pow", "singular_gradient", **PART)
class RootAsPower(Small):
    def loss(self, h, y, s):
        return ((h * s).abs() ** 0.5).mean()  # <- here


@bug("aten.pow", "singular_gradient", **PART)
class CubeRoot(Small):
    def loss(self, h, y, s):
        volume = h.abs().prod(1) * s[:, 0]
        return volume.pow(1 / 3).sum()  # <- here


@bug("aten.acos", "singular_gradient", **PART)
class AngleToItself(Small):
    def loss(self, h, y, s):
        cosine = h.tanh() * 0.5 * s + (1 - s) * (h * 0 + 1)
        return torch.acos(cosine).mean()  # <- here


@bug("aten.asin", "singular_gradient", **PART)
class ArcSineAtOne(Small):
    def loss(self, h, y, s):
        return torch.asin(torch.cos(h * s) * (0.5 * s + 1 - s)).mean()  # <- here


class Distance(nn.Module):
    def forward(self, a, b):
        squared = (a - b).pow(2).sum(-1)
        return torch.sqrt(squared)  # <- here


@bug("aten.sqrt", "singular_gradient", module="distance", source=Distance, **PART)
class DistanceToItself(Small):
    def __init__(self):
        super().__init__()
        self.distance = Distance()

    def loss(self, h, y, s):
        return self.distance(h, h.roll(1, 1) * s + h * (1 - s)).mean()


@bug("aten.sqrt", "singular_gradient", **PART)
class HingeOfADistance(Small):
    """The margin is kept, so the gradient that arrives is 0; the derivative is infinite all the same."""

    def loss(self, h, y, s):
        distance = (h * s).pow(2).sum(1).sqrt()  # <- here
        return F.relu(distance - 1e-3).mean()


@bug("aten.sqrt", "singular_gradient", **PART)
class HingeThatIsIndexed(Small):
    """What is indexed afterwards has no part in the gradient of 0."""

    def loss(self, h, y, s):
        distance = (h * s).pow(2).sum(1).sqrt()  # <- here
        hinge = F.relu(distance - 1e-3)
        return hinge[torch.arange(len(h))].mean() + torch.where(y > 9, 0.0, hinge).mean()


@bug("aten.sqrt", "singular_gradient", **PART)
class RootThatIsDropped(Small):
    """What a dropout leaves out this time it keeps the next."""

    def loss(self, h, y, s):
        length = (h * s).square().sum(1).sqrt()  # <- here
        return (length * (2 * s[:, 0])).mean()


@bug("aten.sqrt", "singular_gradient", **PART)
class SquaredRoot(Small):
    """The gradient that arrives is 0 by chance, not by a mask."""

    def loss(self, h, y, s):
        length = (h * s).square().sum(1).sqrt()  # <- here
        return length.square().mean()


@bug("aten.special_entr", "singular_gradient", **PART)
class EntropyAtZero(Small):
    def loss(self, h, y, s):
        p = h.softmax(-1) * s
        return torch.special.entr(p).sum(-1).mean()  # <- here


@bug("aten._linalg_eigh", "singular_gradient", **PART)
class DegenerateEigenvectors(Small):
    def loss(self, h, y, s):
        a = h.view(-1, 2, 2) * s[:, :, None]
        matrix = a + a.mT + torch.eye(2)
        _, vectors = torch.linalg.eigh(matrix)  # <- here
        return vectors[:, 0].square().sum()


@bug("aten._linalg_svd", "singular_gradient", **PART)
class RepeatedSingularValues(Small):
    def loss(self, h, y, s):
        matrix = h.view(-1, 2, 2) * s[:, :, None] + torch.eye(2)
        u, _, _ = torch.linalg.svd(matrix)  # <- here
        return u[:, 0, 0].abs().square().sum()


@bug("aten.sqrt", "singular_gradient", samples=(1, 3, 6), bad=(1, 3, 6), **PART)
class HellingerDistance(Small):
    def loss(self, h, y, s):
        p = h.softmax(-1) * s
        roots = torch.sqrt(p)  # <- here
        return (roots - 0.5).square().sum(-1).mean()


@bug("aten.sqrt", "singular_gradient", samples=tuple(range(8)), bad=tuple(range(8)), **PART)
class RootMeanSquareError(Small):
    """Every prediction of the batch is exact."""

    def loss(self, h, y, s):
        target = h.detach() * (1 - s) + y[:, None] * s
        return torch.sqrt(F.mse_loss(h, target))  # <- here


class Scale(torch.autograd.Function):
    """Its backward pass divides by what was 0."""

    @staticmethod
    def forward(ctx, x, s):
        ctx.save_for_backward(s)
        return x * s

    @staticmethod
    def backward(ctx, gradient):
        (s,) = ctx.saved_tensors
        return gradient / s, None


@bug("Scale", "division_by_zero", **PART)
class CustomBackward(Small):
    def loss(self, h, y, s):
        return Scale.apply(h, s).mean()  # <- here


class Inverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = 1 / x  # <- here
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        return -gradient * y * y


@bug("Inverse", "division_by_zero", source=Inverse)
class CustomForward(Small):
    def loss(self, h, y, s):
        return Inverse.apply(h.exp() * s).mean()


class Entropic(torch.autograd.Function):
    """p log p with a derivative that takes the logarithm of 0."""

    @staticmethod
    def forward(ctx, p):
        ctx.save_for_backward(p)
        return torch.xlogy(p, p)

    @staticmethod
    def backward(ctx, gradient):
        (p,) = ctx.saved_tensors
        return gradient * (torch.log(p) + 1)


class Head(nn.Module):
    def forward(self, p):
        return Entropic.apply(p).sum(-1)  # <- here


@bug("Entropic", "log_of_zero", module="head", source=Head, **PART)
class CustomDerivative(Small):
    def __init__(self):
        super().__init__()
        self.head = Head()

    def loss(self, h, y, s):
        return self.head(h.softmax(-1) * s).mean()


@bug("aten.sqrt", "singular_gradient", trainer={"gradient_clip_val": 1.0}, **PART)
class WithClipping(Small):
    def loss(self, h, y, s):
        return (h * s).square().sum(1).sqrt().sum()  # <- here


@bug("aten.linalg_cholesky_ex", "singular_gradient", **PART)
class CholeskyOfZero(Small):
    def loss(self, h, y, s):
        a = h.view(-1, 2, 2) * s[:, :, None]
        factor, _ = torch.linalg.cholesky_ex(a @ a.mT + s[:, :, None] * torch.eye(2))  # <- here
        return factor.diagonal(dim1=1, dim2=2).sum()


@bug("aten.div", "division_by_zero", module="body", **PART)
class HookOnAGradient(Small):
    def loss(self, h, y, s):
        h.register_hook(lambda gradient: gradient / s)  # <- here
        return h.square().mean()


@bug("aten.sqrt", "singular_gradient", **PART)
class SparseGradient(Small):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4, sparse=True)

    def loss(self, h, y, s):
        return ((self.embed(y) * s).square().sum(1)).sqrt().mean() + 0 * h.sum()  # <- here

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@bug("aten.mul", "overflow", **PART)
class GradientsThatAddUp(Small):
    """Each use of the tensor gives a finite gradient."""

    def loss(self, h, y, s):
        huge = 2e38 * (1 - s)
        difference = h - h.detach()
        return (difference * huge).sum() + (difference * huge * 2).sum() + h.mean()  # <- here


class NormByHand(nn.Module):
    def forward(self, z):
        spread = z.var(-1, keepdim=True, unbiased=False).sqrt()  # <- here
        return (z - z.mean(-1, keepdim=True)) / (spread + 1e-5)


@bug("aten.sqrt", "singular_gradient", module="norm", source=NormByHand, **PART)
class FirstOfSeveralTokens(Small):
    """All tokens of a sample fail, not only those that nobody uses."""

    def __init__(self):
        super().__init__()
        self.norm = NormByHand()

    def loss(self, h, y, s):
        tokens = torch.stack([h, 2 * h, 3 * h], 1) * s[:, None]
        return F.cross_entropy(self.norm(tokens)[:, 0], y)


@bug("aten.sqrt", "singular_gradient", phase="backward", bad=(2, 5))
class SparseGradientsThatAreAdded(Whole):
    """Two look-ups in one table, whose gradients are sparse, and the distance between what is the same."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(40, 4, sparse=True)

    def loss_of(self, batch):
        x, y, s = batch
        other = torch.where(s[:, 0] == 0, y, y + 4)
        distance = (self.table(y) - self.table(other)).square().sum(1).sqrt()  # <- here
        return distance.mean() + self.body(x).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)
