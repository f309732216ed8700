"""Captures of incidents about activations: they fail in a replay until the code is mended."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainers import fit, policy, rows
from watched import Simple, hooks_of

from nanguard import CaptureError, assert_finite_step, load_capture, replay

ALL = {"modules": ["*"], "every_n_steps": 1}


class Side(Simple):
    """A branch that is not part of the loss, with a layer whose result may be NaN."""

    offset = 0.0
    manual = False

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = not self.manual
        self.side, self.root, self.main = nn.Linear(4, 4), Root(), nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _, flag = batch
        self.root(self.side(x.detach()).abs() * flag - 1.0 + flag + self.offset)
        loss = self.main(x).square().mean()
        if self.manual:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss


class Root(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sqrt(x)


class Mended(Side):
    offset = 1.0


class Elsewhere(Simple):
    """The same parameters, and none of the modules that were watched by name."""

    def __init__(self) -> None:
        super().__init__()
        self.side, self.main = nn.Linear(4, 4), nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.main(batch[0]).square().mean()


class Manual(Side):
    manual = True


def captured(tmp: Path, make: Any = Side, modules: Any = ("*",), **watch: Any) -> Any:
    watch = {**ALL, "modules": list(modules), **watch}
    (incident,) = fit(tmp, make, rows(4, [2], "gradient"), policy(tmp, "record", watch=watch)).incidents
    assert incident.trigger == "activations"
    return incident


@pytest.mark.parametrize("modules", [["*"], ["root"], ["ro*", "main"]])
def test_it_fails_again_in_the_same_place_until_it_is_mended(tmp_path: Path, modules: list[str]) -> None:
    incident = captured(tmp_path, modules=modules)
    model = Side()
    result = replay(incident.capture, model, strict=True)
    assert (result.finite, result.reproduced, result.incident.trigger) == (False, True, "activations")
    for name in ("op", "phase", "module", "file", "line", "operands"):
        assert getattr(result.incident.origin, name) == getattr(incident.origin, name)
    assert result.incident.origin.op == "aten.sqrt"
    assert (
        (result.incident.cause, result.incident.samples)
        == (incident.cause, incident.samples)
        == ("invalid_domain", (2,))
    )
    assert "non-finite outputs of watched modules: root" in result.incident.detail
    assert torch.isfinite(result.loss)
    assert result.gradients
    assert hooks_of(model) == []
    with pytest.raises(AssertionError, match="an activation of a watched module"):
        assert_finite_step(Side(), incident.capture)
    assert_finite_step(Mended(), incident.capture)
    assert hooks_of(model) == []


def test_modules_that_are_gone_are_no_error(tmp_path: Path) -> None:
    assert_finite_step(Elsewhere(), captured(tmp_path, modules=["root"]).capture)


def test_a_step_with_manual_optimization(tmp_path: Path) -> None:
    incident = captured(tmp_path, Manual)
    result = replay(incident.capture, Manual())
    assert (result.reproduced, result.incident.trigger, result.incident.verdict) == (True, "activations", "reproduced")
    assert (incident.origin.module, incident.verdict) == ("root", "not_replayed")


@pytest.mark.parametrize(("infinities", "finite"), [("none", True), ("positive", False)])
def test_infinities_count_as_in_the_run(tmp_path: Path, infinities: str, finite: bool) -> None:
    class Infinite(Side):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, _, flag = batch
            self.root(1 / flag)
            self.side(x.detach() * (math.nan if batch_idx == 3 else 1.0))
            return self.main(x).square().mean()

    data = rows(4, [2], "gradient")
    incidents = fit(
        tmp_path, Infinite, data, policy(tmp_path, "record", watch={**ALL, "infinities": infinities})
    ).incidents
    assert [incident.batch_idx for incident in incidents] == ([3] if finite else [2, 3])
    assert load_capture(incidents[-1].capture).watch == {"modules": ["*"], "infinities": infinities}


def test_other_captures_are_judged_by_loss_and_gradients_alone(tmp_path: Path) -> None:
    class Failing(Side):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) / batch[2].mean()

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            batch[2][:] = 1 - batch_idx

    (incident,) = fit(tmp_path, Failing, rows(2), policy(tmp_path, "record", watch=ALL)).incidents
    assert incident.trigger == "loss"
    capture = load_capture(incident.capture)
    assert (capture.watch, capture.function) == (None, "training_step")
    assert not {"watch", "function"} & set(capture.manifest["step"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("watch", {"modules": "*", "infinities": "none"}),
        ("watch", {"modules": ["*"], "infinities": "some"}),
        ("watch", []),
        ("function", "eval"),
    ],
)
def test_damaged_entries_are_named(tmp_path: Path, key: str, value: Any) -> None:
    path = Path(captured(tmp_path).capture) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["step"][key] = value
    path.write_text(json.dumps(manifest))
    with pytest.raises(CaptureError, match=f"entry 'step.{key}': found "):
        load_capture(path.parent)
