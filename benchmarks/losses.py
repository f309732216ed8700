"""The losses of the stabiliser's benchmark: as people write them by hand, and as torch has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["LOSSES", "Loss", "Size"]

Size = tuple[int, int]
Function = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Loss:
    """A loss that is written by hand, and torch's own.

    Attributes:
        name: what it is, and how it is written.
        by_hand: the loss of inputs and targets, as people write it.
        built_in: the same number, as it is meant to be computed.
        inputs: makes what is differentiated by; mild numbers, for which the loss by hand is finite.
        targets: makes what comes with it.
        sizes: the default sizes.
        judged: whether the bars of the contract are about it.
    """

    name: str
    by_hand: Function
    built_in: Function
    inputs: Callable[[Size], Tensor]
    targets: Callable[[Size], Tensor]
    sizes: tuple[Size, ...]
    judged: bool = False

    def batch(self, size: Size) -> tuple[Tensor, Tensor]:
        """Inputs that want a gradient, and targets."""
        torch.manual_seed(0)
        return self.inputs(size).requires_grad_(), self.targets(size)


def _softmax_then_log(logits: Tensor, target: Tensor) -> Tensor:
    p = torch.softmax(logits, dim=1)
    return -torch.log(p[torch.arange(len(target)), target]).mean()


def _exp_then_log(logits: Tensor, target: Tensor) -> Tensor:
    e = torch.exp(logits)
    p = e / e.sum(dim=1, keepdim=True)
    return -torch.log(p[torch.arange(len(target)), target]).mean()


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target)


def _info_nce(features: Tensor, other: Tensor) -> Tensor:
    similar = torch.exp(_similarities(features, other))
    return -torch.log(similar.diag() / similar.sum(dim=1)).mean()


def _contrastive(features: Tensor, other: Tensor) -> Tensor:
    return F.cross_entropy(_similarities(features, other), torch.arange(len(features)))


def _similarities(features: Tensor, other: Tensor) -> Tensor:
    return F.normalize(features, dim=1) @ F.normalize(other, dim=1).T / 0.1


def _binary_by_hand(logits: Tensor, target: Tensor) -> Tensor:
    p = torch.sigmoid(logits)
    return -(target * torch.log(p) + (1 - target) * torch.log(1 - p)).mean()


def _binary(logits: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, target)


def _random(size: Size) -> Tensor:
    return torch.randn(size)


def _classes(size: Size) -> Tensor:
    return torch.randint(0, size[1], (size[0],))


def _bits(size: Size) -> Tensor:
    return torch.randint(0, 2, size).float()


CLASSIFICATIONS = ((32, 10), (256, 1000), (1024, 32000), (4096, 50257))

LOSSES = (
    Loss(
        "cross-entropy, softmax then log", _softmax_then_log, _cross_entropy, _random, _classes, CLASSIFICATIONS, True
    ),
    Loss("cross-entropy, exp then log", _exp_then_log, _cross_entropy, _random, _classes, CLASSIFICATIONS, True),
    # The size of a batch, and of a feature.
    Loss("InfoNCE", _info_nce, _contrastive, _random, _random, ((512, 128),)),
    Loss(
        "binary cross-entropy",
        _binary_by_hand,
        _binary,
        _random,
        _bits,
        ((4096, 1000),),
    ),
)
