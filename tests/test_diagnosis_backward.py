"""The backward pass of a step that is run again happens where it did in the run: outside of autocast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trainers import Net, fit, policy, rows


class Difference(torch.autograd.Function):
    """Its derivative divides by what is 0 in float32, and is not in half precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, flag: Tensor) -> Tensor:
        ctx.save_for_backward(flag)
        return x * 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (flag,) = ctx.saved_tensors
        value = torch.full((1, 1), 1.001)
        difference = torch.mm(value, torch.ones(1, 1)).float() - value
        return torch.where(flag, gradient / difference, gradient), None


class Divides(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        weight = self.head.weight.float().mean().expand(len(batch[0]))
        flag = torch.arange(len(batch[0])) == (2 if batch_idx == 3 else -1)
        return loss + Difference.apply(weight * batch[0].float().mean(1), flag).mean()


def test_the_backward_pass_is_outside_of_autocast(tmp_path: Path) -> None:
    run = fit(tmp_path, Divides, rows(5), policy(tmp_path, capture={"enabled": False}), precision="bf16-mixed")
    (incident,) = run.incidents
    assert (incident.trigger, incident.verdict, incident.batch_idx) == ("gradients", "reproduced", 3)
    assert (incident.origin.op, incident.origin.phase) == ("Difference", "backward")
