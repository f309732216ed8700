"""The steps before a failure: what is followed, through every kind of step, and what is said of it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.plugins.precision import MixedPrecision
from test_trainer_manual import Gan
from torch import nn
from trainers import BATCH, Net, Run, fit, policy, rows

from nanguard import Incident, NanGuard, NonFiniteError, load_capture
from nanguard.guard import Guard, Moment
from nanguard.history import StepHistory
from nanguard.lead_up import LeadUp, trend_of
from nanguard.policy import Policy
from nanguard.reading import Reading

# -- the rule

USUAL = [2.3, 2.2, 2.35, 2.25, 2.31, 2.29, 2.28]


def lead_up(loss: list[float | None], norms: list[float | None], skipped: tuple[int, ...] = ()) -> LeadUp:
    history = StepHistory()
    for step, (value, norm) in enumerate(zip(loss, norms, strict=True)):
        history.begin(step)
        history.note(Reading(False, value, norm))
        history.end(skipped=step in skipped)
    return history.lead_up()


@pytest.mark.parametrize(
    ("values", "kind", "steps"),
    [
        ([], "unknown", 0),
        ([3.0], "usual", 0),
        (USUAL, "usual", 0),
        ([*USUAL, 2.3, 2.35], "usual", 0),  # it climbs, but not beyond what is usual
        ([*USUAL, 30.0], "jump", 0),  # one increase is no climb
        ([1.1, 48.0, 9.7e12], "growth", 2),
        ([*USUAL, 2.2, 9.0, 40.0, 41.0], "growth", 3),
        ([*USUAL, 9.0, 40.0, 25.0], "jump", 0),  # high, but not by an increase
        ([5.0, 4.0, 3.0, 2.0], "usual", 0),
        ([-2.0, -2.1, -1.9, -2.05, 4.0, 9.0], "growth", 2),
    ],
)
def test_the_rule(values, kind, steps):
    assert (trend_of(values).kind, trend_of(values).steps) == (kind, steps)


@given(
    st.lists(st.floats(1.0, 1.4), min_size=5, max_size=200),
    st.floats(3.0, 100.0),
    st.integers(2, 30),
    st.floats(1e-3, 1e3),
)
def test_exponential_growth_is_growth_whatever_the_unit(noise, factor, steps, unit):
    """And noise alone is neither growth nor a jump."""
    assert trend_of([unit * value for value in noise]).kind == "usual"
    climb = [1.5 * factor**power for power in range(1, steps + 1)]
    found = trend_of([unit * value for value in (*noise, *climb)])
    assert found.kind == "growth"
    assert found.steps >= steps
    assert found.last == unit * climb[-1]


def test_a_spike_and_a_bolt_out_of_the_blue_are_told_apart():
    nan = math.nan
    spike = lead_up([2.3, 2.2, 2.31, 2.29, 2.35, nan], [1.2, 1.2, 1.1, 48.0, 9.7e12, nan])
    assert spike.summary() == (
        "loss 2.31 -> 2.29 -> 2.35 -> nan; gradient norm 1.1 -> 48 -> 9.7e+12 -> nan over 4 steps: "
        "the gradient norm grew for 2 steps (usual 1.2)"
    )
    bolt = lead_up([*USUAL, nan], [1.0, 1.2, 1.1, 1.0, 1.3, 1.1, 1.05, nan])
    assert bolt.summary() == (
        "a bolt out of the blue: loss and gradient norm were as usual (median 2.29, 1.1) up to the step before"
    )
    jump = lead_up([*USUAL, 90.0, 80.0, nan], [*([1.0] * 9), nan])
    assert "the loss jumped to 80 in the step before (usual 2.29)" in jump.summary()
    assert lead_up([nan], [nan]).summary() == "none: it was the first step that was seen"
    assert "non-finite already" in lead_up([1.0, nan, nan], [1.0, nan, nan]).summary()
    assert "no step before it had" in lead_up([None, None], [None, nan]).summary()


@pytest.mark.parametrize("values", [[0.632, 1.39], [1.1, 48.0, 9.7e12], [1.0, 1.1, 1.0, 50.0]])
def test_a_few_steps_are_too_few_to_speak_of_growth_or_a_jump(values: list[float]) -> None:
    summary = lead_up([*values, math.nan], [*([1.0] * len(values)), math.nan]).summary()
    assert summary.endswith("too few steps to judge by")
    assert "-> nan" in summary
    longer = lead_up([*([values[0]] * 4), *values, math.nan], [*([1.0] * (len(values) + 4)), math.nan])
    assert "grew" in longer.summary() or "jumped" in longer.summary()


@pytest.mark.parametrize("climb", [[30.0], [9.0, 40.0, 41.0]])
def test_what_is_back_to_the_usual_is_no_growth_and_no_jump(climb: list[float]) -> None:
    """The failing step may have a finite loss: an activation beside it was bad."""
    still = [1.0] * (len(USUAL) + len(climb))
    back = lead_up([*USUAL, *climb, 2.3], [*still, 1.0])
    assert back.summary().endswith("over 4 steps: the loss is back to the usual (2.29)")
    high = lead_up([*USUAL, *climb, 2.3 + climb[-1]], [*still, 1.0])
    assert "the loss grew" in high.summary() or "the loss jumped" in high.summary()
    other = lead_up([*USUAL, *climb, 2.3], [*USUAL, *climb, math.nan])
    assert "the gradient norm" in other.summary().split(":")[1]
    assert "the loss" not in other.summary()


def test_what_was_left_out_does_not_count():
    found = lead_up([*USUAL, 1e9, math.nan, math.nan], [1.0] * 10, skipped=(7, 8))
    assert found.trend("loss").kind == "usual"
    assert found.skipped[7:] == (True, True, False)


# -- the record

columns = st.none() | st.floats(allow_nan=True)
entries = st.lists(
    st.tuples(st.integers(0, 2**40), columns, columns, columns, st.lists(st.floats(0, 1), max_size=3), st.booleans()),
    max_size=6,
)


@given(entries)
def test_json_there_and_back(found):
    steps, loss, gradient, weights, rates, skipped = ([entry[i] for entry in found] for i in range(6))
    one = LeadUp(
        *(tuple(column) for column in (steps, loss, gradient, weights)),
        tuple(tuple(entry) for entry in rates),
        tuple(loss),
        tuple(skipped),
    )
    incident = Incident(1, 0, 1, lead_up=one)
    again = Incident.from_json(incident.to_json())
    assert again == incident
    assert hash(again.lead_up) == hash(one)
    assert str(again) == str(incident)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": [1, 2]}, r"columns of unequal lengths \(steps 2, loss 1"),
        ({"colour": [1]}, "expected the columns steps, loss"),
        ({"loss": 3}, "expected a list of numbers in each column"),
        ({"loss": ["much"]}, "could not convert"),
    ],
)
def test_damage_is_told(change, message):
    good = dataclasses.asdict(lead_up([1.0], [1.0]))
    assert LeadUp.from_dict(json.loads(json.dumps(good))) == lead_up([1.0], [1.0])
    with pytest.raises(ValueError, match=message):
        LeadUp.from_dict({**good, **change})


def test_the_ring_holds_the_last_500_steps():
    found = lead_up([float(step) for step in range(700)], [1.0] * 700)
    assert found.steps == tuple(range(200, 700))
    assert found.loss[0] == 200.0


# -- real steps


def follow(run: Run) -> LeadUp:
    found = run.incidents[-1].lead_up
    assert found is not None
    return found


class Plain(pl.LightningModule):
    """Notes for each optimizer step what the guard should have seen."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))
        self.noted: list[tuple[float, float, float]] = []
        self.losses: list[float] = []

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), "interval": "step"}]

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = (self.net(batch[0]).float() - batch[1]).square().mean()
        self.losses.append(float(loss.detach()))
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        norms = [sum(float(t.detach().double().square().sum()) for t in group) ** 0.5 for group in self._groups()]
        self.noted.append((sum(self.losses) / len(self.losses), *norms))
        self.losses.clear()

    def _groups(self) -> Any:
        return [p.grad for p in self.parameters()], list(self.parameters())


@pytest.mark.parametrize("width", [4, 400])  # small tensors are read one by one, others fused
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_figures_are_those_of_the_run(tmp_path: Path, width: int, accumulate: int) -> None:
    data = rows(10, [9])
    width = width if accumulate == 1 else width * 500  # more than 65,536 elements
    run = fit(tmp_path, lambda: Plain(width), data, policy(tmp_path), accumulate_grad_batches=accumulate)
    found, healthy = follow(run), 10 // accumulate - 1
    assert found.steps == tuple(range(healthy + 1))
    assert found.skipped == (False,) * (healthy + 1)  # the last one is being judged
    loss, gradient, weights = zip(*run.model.noted[:healthy], strict=True)
    assert found.loss[:healthy] == pytest.approx(loss, rel=1e-5)
    assert found.gradient_norm[:healthy] == pytest.approx(gradient, rel=1e-5)
    assert math.isnan(found.loss[-1])
    assert found.parameter_norm[0] == pytest.approx(weights[0], rel=1e-5)
    assert found.parameter_norm[1:-1] == (None,) * (healthy - 1)
    assert found.parameter_norm[-1] is not None
    assert found.learning_rates == tuple((0.5**power,) for power in range(1, healthy + 2))
    assert found.loss_scale == (None,) * (healthy + 1)


def test_skipped_steps_are_in_it_and_marked(tmp_path: Path) -> None:
    run = fit(tmp_path, Net, rows(6, [2, 3, 5]), policy(tmp_path))
    found = follow(run)
    assert found.skipped == (False, False, True, True, False, False)
    assert [math.isnan(loss) for loss in found.loss] == [False, False, True, True, False, True]
    assert [len(incident.lead_up) for incident in run.incidents] == [3, 4, 6]
    assert all("bolt out of the blue" in str(incident) for incident in run.incidents)


def test_a_loss_scale_is_taken_out_of_loss_and_gradients(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
    guard = policy(tmp_path, scaler={"max_consecutive_skips": 2})
    run = fit(tmp_path, Plain, rows(8, [3, 6, 7]), guard, plugins=plugins)
    found = follow(run)
    assert found.loss_scale[:4] == (1024.0, 1024.0, 2048.0, 2048.0)
    assert found.loss[:3] == pytest.approx([entry[0] for entry in run.model.noted[:3]], rel=1e-3)
    assert found.gradient_norm[:3] == pytest.approx([entry[1] for entry in run.model.noted[:3]], rel=1e-3)


def test_several_optimizers_in_one_step_are_one_entry(tmp_path: Path) -> None:
    found = follow(fit(tmp_path, Gan, rows(4, [3]), policy(tmp_path)))
    assert len(found) == 4
    assert found.steps == (0, 2, 4, 6)
    assert all(norm is not None and norm > 0 for norm in found.gradient_norm[:3])


def test_growth_is_told_of_a_run_that_diverges(tmp_path: Path) -> None:
    class Diverging(Plain):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=2.0)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.losses.append(0.0)
            return self.net[2](self.net[0](batch[0])).square().mean()

    guard = NanGuard(policy(tmp_path, "raise"))
    with pytest.raises(NonFiniteError, match=r"lead-up .*the gradient norm grew for \d+ steps"):
        fit(tmp_path, Diverging, rows(20), guard)


# -- where it ends up


def test_it_is_in_the_capture_and_captures_without_it_still_load(tmp_path: Path) -> None:
    run = fit(tmp_path, Net, rows(4, [2]), policy(tmp_path))
    path = Path(run.incidents[0].capture)
    assert load_capture(path).incident.lead_up == follow(run)
    manifest = path / "manifest.json"
    data = json.loads(manifest.read_text())
    assert len(data["incident"]["lead_up"]["loss"]) == 3
    for name in ("lead_up", "activations"):
        del data["incident"][name]
    manifest.write_text(json.dumps(data))
    assert load_capture(path).incident.lead_up is None


@pytest.mark.filterwarnings("ignore::nanguard.NanGuardWarning")
def test_the_guard_alone_follows_steps_without_an_optimizer() -> None:
    model = nn.Linear(4, 1)
    guard = Guard(Policy(rules=[{"action": "record"}], capture={"enabled": False}), model)
    for step in range(3):
        x = torch.full((BATCH, 4), math.nan if step == 2 else 1.0)
        guard.begin(Moment(step, 0, step), (x,))
        loss = model(x).sum()
        guard.saw_loss(loss)
        model.zero_grad()
        loss.backward()
        guard.judge(list(model.parameters()))
        guard.end_window()
    found = guard.incidents[0].lead_up
    assert found is not None
    assert found.loss[0] == pytest.approx(float(model(torch.ones(BATCH, 4)).sum().detach()), rel=1e-6)
    assert found.learning_rates == ((), (), ())
