"""What fails in a run, fails in the replay of its capture, by the same hooks and for the same reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trainers import Net, fit, policy, rows

import nanguard


class SpoilsGradients(Net):
    """Its own hook makes a gradient NaN, for batches with a sample that it knows."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.marked = batch_idx == 2
        return super().training_step(batch, batch_idx)

    def on_after_backward(self) -> None:
        if self.marked:
            gradient = next(p.grad for p in self.parameters() if p.grad is not None)
            gradient.view(-1)[0] = float("nan")


class ScalesInBackward(Net):
    """Its own backward pass makes the gradients infinite."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.factor = 1e38 if batch_idx == 2 else 1.0
        return super().training_step(batch, batch_idx)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        (loss * self.factor * self.factor).backward()


class InfiniteRate(Net):
    """The optimizer itself makes the weights non-finite."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=float("inf"))


@pytest.mark.parametrize("make", [SpoilsGradients, ScalesInBackward, InfiniteRate])
def test_the_replay_fails_as_the_run_did(tmp_path: Path, make: Callable[[], Any]) -> None:
    settings = policy(tmp_path, "stop", capture={"directory": tmp_path / "captures"})
    incident = fit(tmp_path, make, rows(4), settings).incidents[0]
    assert incident.verdict == "reproduced"
    result = nanguard.replay(nanguard.load_capture(incident.capture), make(), strict=True)
    assert result.reproduced
    if make is InfiniteRate:
        assert (incident.origin.phase, result.incident.cause) == ("optimizer", "parameters")
    else:
        assert result.incident.origin.op == incident.origin.op
    with pytest.raises(AssertionError):
        nanguard.assert_finite_step(make(), incident.capture)
