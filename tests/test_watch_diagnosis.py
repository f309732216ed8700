"""What is said of activations that do not reach the loss, and of batches that several optimizers share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trainers import assert_same, fit, policy, rows
from watched import Bulk, Masked, Simple, hooks_of

from nanguard import replay

ALL = {"modules": ["*"], "every_n_steps": 1}


class Ratio(nn.Module):
    def forward(self, x: Tensor, flag: Tensor) -> Tensor:
        ratio = x / flag
        return ratio


class Overwriting(nn.Module):
    """Gives what its child made, once that is repaired in place."""

    def __init__(self) -> None:
        super().__init__()
        self.ratio = Ratio()

    def forward(self, x: Tensor, flag: Tensor) -> Tensor:
        return self.ratio(x, flag).nan_to_num_(0.0, 0.0, 0.0)


class Beside(Simple):
    """A branch beside the loss, whose bad values are repaired before anybody could see them at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.side, self.main = Overwriting(), nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _, flag = batch
        self.shown = self.side(x.detach(), flag)
        return self.main(x).square().mean()


def test_an_activation_is_walked_back_from_although_it_was_overwritten(tmp_path: Path) -> None:
    run = fit(tmp_path, Beside, rows(5, [1, 3], "gradient"), policy(tmp_path, "record", watch=ALL))
    assert [(i.trigger, i.batch_idx) for i in run.incidents] == [("activations", 1), ("activations", 3)]
    for incident in run.incidents:
        origin = incident.origin
        assert (origin.op, origin.phase, origin.module, incident.verdict) == (
            "aten.div",
            "forward",
            "side.ratio",
            "reproduced",
        )
        assert origin.code == "ratio = x / flag"
        assert (incident.cause, incident.samples) == ("division_by_zero", (2,))
        assert incident.dataset_indices == (incident.batch_idx * 4 + 2,)
        assert "The divisor in `ratio = x / flag` is an exact 0" in incident.advice
    assert_same(run, fit(tmp_path, Beside, rows(5, [1, 3], "gradient"), policy(tmp_path, "record")))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["module", "call", "script"])
def test_modules_that_take_no_hooks_are_walked_back_from(tmp_path: Path, how: str) -> None:
    torch._dynamo.reset()

    def make() -> Beside:
        model = Beside()
        if how == "module":
            model.side = torch.compile(model.side.ratio, backend="eager")
        elif how == "call":
            model.side = model.side.ratio
            model.side.compile(backend="eager")
        else:
            model.side = torch.jit.script(model.side.ratio)
        return model

    data = rows(3, [1], "gradient")
    run = fit(tmp_path, make, data, policy(tmp_path, "record", watch=ALL))
    (incident,) = run.incidents
    assert (incident.origin.op, incident.origin.module, incident.samples) == ("aten.div", "side", (2,))
    assert hooks_of(run.model) == []
    again = replay(incident.capture, make())
    assert (again.reproduced, again.incident.samples) == (True, (2,))


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_was_put_there_on_purpose_is_named(tmp_path: Path, value: float) -> None:
    run = fit(tmp_path, lambda: Masked(value), rows(3, [2]), policy(tmp_path, "record", watch=ALL))
    (incident,) = run.incidents
    assert (incident.origin.op, incident.origin.module, incident.samples) == ("aten.masked_fill", "inverse", (2,))


class Poisoned(Simple):
    """A bad input that only a branch beside the loss reads."""

    def __init__(self) -> None:
        super().__init__()
        self.side, self.main = nn.Linear(4, 4), nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.side(batch[0])
        return self.main(batch[0].nan_to_num()).square().mean()


def test_a_bad_input_that_only_an_activation_reads(tmp_path: Path) -> None:
    (incident,) = fit(tmp_path, Poisoned, rows(3, [1]), policy(tmp_path, "record", watch=ALL)).incidents
    assert (incident.trigger, incident.cause, incident.origin.tensor) == ("activations", "bad_input", "batch[0]")
    assert (incident.origin.op, incident.origin.module, incident.samples) == ("aten.addmm", "side", (2,))


# -- several optimizers in one batch


class Two(Simple):
    """Two optimizers step after one backward pass."""

    def __init__(self, alone: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.one, self.two, self.alone = nn.Linear(4, 4), nn.Linear(4, 1), alone

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.one.parameters(), lr=0.1), torch.optim.Adam(self.two.parameters(), lr=0.01)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        if self.alone:
            self.one(batch[0].detach() * (math.nan if batch_idx == 2 else 1.0))
        self.manual_backward(F.mse_loss(self.two(self.one(batch[0])).tanh(), batch[1].tanh()))
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("watch", [{}, ALL])
def test_one_bad_batch_is_one_incident(tmp_path: Path, watch: Any) -> None:
    run = fit(tmp_path, Two, rows(4, [3]), policy(tmp_path, "record", watch=watch))
    (incident,) = run.incidents
    assert (incident.batch_idx, incident.cause, incident.trigger) == (3, "bad_input", "loss")
    assert incident.lead_up.learning_rates == ((0.1, 0.01),) * 4
    assert incident.origin.module == ("one" if watch else None)
    assert ("alone" in incident.advice, "and from the watched modules" in incident.advice) == (not watch, bool(watch))


def test_an_activation_does_not_hide_what_comes_after_it(tmp_path: Path) -> None:
    guard = policy(tmp_path, "record", watch=ALL)
    run = fit(tmp_path, lambda: Two(alone=True), rows(3), guard)
    assert [incident.trigger for incident in run.incidents] == ["activations"]
    run = fit(tmp_path, lambda: Two(alone=True), rows(3, [2]), guard)
    assert [incident.trigger for incident in run.incidents] == ["loss"]


def test_a_batch_that_was_recorded_is_no_healthy_one_to_compare_with(tmp_path: Path) -> None:
    class Twice(Simple):
        def __init__(self) -> None:
            super().__init__()
            self.main = nn.Linear(4, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            # A bad loss without a gradient: the weights stay as they are.
            return self.main(batch[0].nan_to_num()).square().mean() + (batch[0].sum(1) * 0).mean().detach()

    run = fit(tmp_path, Twice, rows(4, [1, 2]), policy(tmp_path, "record"))
    assert [(incident.batch_idx, incident.samples) for incident in run.incidents] == [(1, (2,)), (2, (2,))]


def test_a_module_that_fails_beside_a_bad_input_is_named(tmp_path: Path) -> None:
    def make() -> Any:
        model = Bulk()
        model.failure = "inner"
        return model

    (incident, *_) = fit(tmp_path, make, rows(3, [1], "gradient"), policy(tmp_path, "record", watch=ALL)).incidents
    assert incident.origin.module == "net.1"
    assert "and from the watched modules" in incident.advice
