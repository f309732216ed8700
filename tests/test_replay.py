"""A replay runs the captured step as it was, says what it found, and leaves no trace."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from replay_models import Gan, Net, SingularGradient, a_batch
from torch import nn
from torchmetrics import MeanMetric

import nanguard
from nanguard import CaptureError, DidNotReproduce, Incident, Origin
from nanguard.capture import StepSnapshot, scalar_attributes, write_capture
from nanguard.rng import RngState


def capture(directory: Path, module: nn.Module, *args: Any, trigger: str = "loss", **options: Any) -> nanguard.Capture:
    written = {"module": options.pop("weights", True), "optimizer": options.pop("optimizer", False)}
    incident = options.pop("incident", None) or Incident(7, 2, 5, trigger=trigger)  # type: ignore[arg-type]
    snapshot = StepSnapshot(
        **{"step": 7, "epoch": 2, "batch_idx": 5, "args": args, "rng": RngState.save(), "module": module, **options}
    )
    return nanguard.load_capture(write_capture(directory, snapshot, incident, **written))


class Sum(nn.Module):
    """A step without Lightning."""

    def __init__(self, *, eps: float = 0.0, width: int = 2) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 1)
        self.eps = eps

    def training_step(self, batch: Any, batch_idx: int = 0) -> Any:
        return self.layer(batch["x"]).sum() / (batch["n"] + self.eps)


def test_a_failure_is_reproduced(tmp_path: Path) -> None:
    model = Net()
    found = capture(tmp_path, model, a_batch(scale=0.0), 5, loss=float("nan"))
    result = nanguard.replay(found, Net(), strict=True)
    assert not result.finite
    assert result.reproduced
    assert torch.isnan(result.loss) or torch.isinf(result.loss)
    assert result.loss is not None
    assert not result.loss.requires_grad
    incident = result.incident
    assert incident is not None
    assert (incident.step, incident.epoch, incident.batch_idx) == (7, 2, 5)
    assert (incident.trigger, incident.verdict) == ("loss", "reproduced")
    assert incident.capture == str(found.path)
    assert incident.render().splitlines()[-1] == f"nanguard replay {found.path} --module replay_models:Net"
    assert "nan when captured" in incident.detail


def test_a_step_that_failed_after_lbfgs_had_moved_the_parameters(tmp_path: Path) -> None:
    from trainers import fit, policy
    from zoo import BUGS

    bug = BUGS["LeapsWithinTheFirstStep"]
    guard = policy(tmp_path, "record", capture={"directory": str(tmp_path / "captures")})
    incident = fit(tmp_path, bug.make, bug.loader(), guard).incidents[0]
    assert incident.capture is not None
    assert nanguard.replay(incident.capture, bug.make(), strict=True).reproduced


def test_a_path_will_do(tmp_path: Path) -> None:
    path = capture(tmp_path, Net(), a_batch(scale=0.0), 5).path
    assert nanguard.replay(str(path), Net()).reproduced


def test_the_same_bits_each_time(tmp_path: Path) -> None:
    found = capture(tmp_path, Net(), a_batch(), 5)
    losses = [nanguard.replay(found, Net()).loss for _ in range(3)]
    assert losses[0] is not None
    assert all(torch.equal(losses[0], loss) for loss in losses[1:])
    again = Net()
    torch.rand(5), random.random(), np.random.rand()
    assert torch.equal(losses[0], nanguard.replay(found, again).loss)


def test_the_captured_weights_are_used_unless_told(tmp_path: Path) -> None:
    batch = {"x": torch.ones(3, 2), "n": torch.tensor(1.0)}
    old, new = Sum(), Sum()
    found = capture(tmp_path, old, batch)
    captured, current = nanguard.replay(found, new), nanguard.replay(found, new, weights="current")
    assert torch.equal(captured.loss, old.training_step(batch).detach())
    assert torch.equal(current.loss, new.training_step(batch).detach())
    assert not torch.equal(captured.loss, current.loss)


def state_of(module: nn.Module) -> dict[str, Any]:
    return {
        "tensors": {
            k: (id(v), v.dtype, v.stride(), v.requires_grad, v.detach().clone()) for k, v in tensors(module).items()
        },
        "grads": {k: (id(p.grad), None if p.grad is None else p.grad.clone()) for k, p in module.named_parameters()},
        "training": {k: m.training for k, m in module.named_modules()},
        "dict": {k: {n: v for n, v in m.__dict__.items()} for k, m in module.named_modules()},  # noqa: C416
        "inside": {k: {n: repr(v) for n, v in m.__dict__.items()} for k, m in module.named_modules()},
        "random": (random.getstate(), repr(np.random.get_state()), torch.get_rng_state()),
        "settings": (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()),
    }


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (tuple, list)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one is other or one == other


@pytest.mark.parametrize("options", [{}, {"weights": "current"}, {"attributes": "current"}], ids=str)
@pytest.mark.parametrize("scale", [0.0, 1.0])
@pytest.mark.parametrize("make", [Net, Gan, lambda: Gan(closures=True)], ids=["net", "gan", "closures"])
def test_no_trace_is_left(tmp_path: Path, make: Any, scale: float, options: dict[str, str]) -> None:
    then = make()
    then.eval()
    with torch.no_grad():
        for tensor in tensors(then).values():
            tensor.add_(1)
    found = capture(tmp_path, then, a_batch(scale=scale), 5, precision={"autocast_dtype": "bfloat16"})
    now = make()
    now.train()
    next(iter(now.parameters())).requires_grad_(False)
    for parameter in now.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.rand(3), np.random.randn(), random.random()
    before = state_of(now)
    with torch.no_grad():
        nanguard.replay(found, now, **options)  # type: ignore[arg-type]
    assert_same(before, state_of(now))


class Rude(Net):
    """Does to itself whatever Python allows, and then raises."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.body[0].weight = nn.Parameter(torch.zeros(8, 4))
        self.body[1].running_mean = torch.full((8,), float("nan"))
        self.body[0].bias.data = torch.zeros(8, dtype=torch.float64)
        self.extra = nn.Linear(1, 1)
        self.register_buffer("new", torch.ones(1))
        self.body.register_forward_hook(lambda *args: None)
        self.history.append(1.0)
        self.eval()
        del self.temperature
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        torch.set_default_dtype(torch.float64)
        raise KeyError("the user's own")


def test_no_trace_is_left_by_a_step_that_raises(tmp_path: Path) -> None:
    found = capture(tmp_path, Net(), a_batch(), 5)
    now = Rude()
    before = state_of(now)
    with pytest.raises(KeyError, match="the user's own"):
        nanguard.replay(found, now)
    assert_same(before, state_of(now))


def test_views_of_the_weights_stay_views(tmp_path: Path) -> None:
    found = capture(tmp_path, Sum(), {"x": torch.ones(1, 2), "n": torch.tensor(1.0)})
    now = Sum()
    view = now.layer.weight.detach()[0]
    nanguard.replay(found, now)
    with torch.no_grad():
        now.layer.weight.fill_(5)
    assert view.tolist() == [5, 5]


def test_finite_losses_with_gradients_that_are_not(tmp_path: Path) -> None:
    found = capture(tmp_path, SingularGradient(), torch.zeros(1, 2), 0, trigger="gradients")
    result = nanguard.replay(found, SingularGradient(), strict=True)
    assert result.incident is not None
    assert result.incident.trigger == "gradients"
    assert "layer.weight" in result.incident.detail
    assert result.loss == 0


def test_another_trigger_is_not_the_same_failure(tmp_path: Path) -> None:
    found = capture(tmp_path, SingularGradient(), torch.zeros(1, 2), 0, trigger="loss")
    result = nanguard.replay(found, SingularGradient())
    assert not result.finite
    assert not result.reproduced


def test_an_infinite_norm_of_finite_gradients_is_finite(tmp_path: Path) -> None:
    class Steep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4))

        def training_step(self, batch: torch.Tensor) -> torch.Tensor:
            return (self.weight * batch).sum()

    found = capture(tmp_path, Steep(), torch.full((4,), 1e30))
    result = nanguard.replay(found, Steep())
    assert result.finite
    assert result.gradients["weight"].tolist() == pytest.approx([1e30] * 4)


def test_the_loss_scale_is_part_of_the_failure(tmp_path: Path) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, dtype=torch.float16))

        def training_step(self, batch: torch.Tensor) -> torch.Tensor:
            return (self.weight * batch).sum().float()

    batch = torch.full((1,), 100.0, dtype=torch.float16)
    assert nanguard.replay(capture(tmp_path, Half(), batch, scale=65536.0), Half()).incident is not None
    mild = nanguard.replay(capture(tmp_path, Half(), batch, scale=4.0), Half())
    assert mild.finite
    assert mild.gradients["weight"].item() == 100


def test_a_different_origin_is_not_the_same_failure(tmp_path: Path) -> None:
    def captured_as(op: str) -> nanguard.Capture:
        incident = Incident(7, 2, 5, trigger="loss", origin=Origin(op, "forward", ""))
        return capture(tmp_path, Net(), a_batch(scale=0.0), 5, incident=incident)

    same = nanguard.replay(captured_as("aten.div"), Net())
    assert same.reproduced
    assert same.incident is not None
    assert (same.incident.origin.op, same.incident.cause) == ("aten.div", "division_by_zero")
    assert same.incident.samples == tuple(range(6))
    other = nanguard.replay(captured_as("aten.log"), Net())
    assert not other.reproduced
    assert other.incident is not None
    assert other.incident.origin.op == "aten.div"
    assert nanguard.replay(captured_as("aten.log"), Net(), diagnose=False).reproduced


def test_the_diagnosis_leaves_no_trace(tmp_path: Path) -> None:
    found = capture(tmp_path, Net(), a_batch(scale=0.0), 5)
    now = Net()
    before = state_of(now)
    nanguard.replay(found, now)
    assert_same(before, state_of(now))


def test_did_not_reproduce_says_what_was_found(tmp_path: Path) -> None:
    found = capture(tmp_path, Sum(), {"x": torch.ones(1, 2), "n": torch.tensor(1.0)})
    with pytest.raises(DidNotReproduce) as caught:
        nanguard.replay(found, Sum(), strict=True)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{found.path}: the captured step did not fail in the same way."
    assert lines[1].startswith("  found: a finite step (loss=")
    assert lines[2] == "  expected: non-finite values in the loss at step 7, epoch 2, batch 5 (recorded)"


def test_assert_finite_step(tmp_path: Path) -> None:
    batch = {"x": torch.ones(1, 2), "n": torch.tensor(0.0)}
    found = capture(tmp_path, Sum(), batch, loss=float("inf"))
    with pytest.raises(AssertionError) as caught:
        nanguard.assert_finite_step(Sum(), found)
    lines = str(caught.value).splitlines()
    assert lines[0] == "the captured step is not finite:"
    assert lines[1].startswith("non-finite values in the loss at step 7")
    assert "inf when captured" in lines[2]
    assert lines[-1] == f"nanguard replay {found.path} --module {Sum.__module__}:Sum"


def test_a_fix_in_a_setting_counts_as_a_fix(tmp_path: Path) -> None:
    batch = {"x": torch.ones(1, 2), "n": torch.tensor(0.0)}
    old = Sum()
    found = capture(tmp_path, old, batch, initial_attributes=scalar_attributes(old))
    nanguard.assert_finite_step(Sum(eps=1.0), found)
    [note] = nanguard.replay(found, Sum(eps=1.0)).notes
    assert note == "eps: 1.0 as the module has it was used, it was 0.0 when captured"


def test_attributes_of_unknown_history_are_replayed_and_said(tmp_path: Path) -> None:
    found = capture(tmp_path, Sum(), {"x": torch.ones(1, 2), "n": torch.tensor(0.0)})
    result = nanguard.replay(found, Sum(eps=1.0))
    assert not result.finite
    assert result.notes == (
        "eps: 0.0 as captured was used, the module has 1.0; attributes='current' keeps the module's own",
    )
    assert nanguard.replay(found, Sum(eps=1.0), attributes="current").finite


def test_counters_that_moved_are_replayed(tmp_path: Path) -> None:
    model = Net()
    initial = scalar_attributes(model)
    model.seen = 41
    found = capture(tmp_path, model, a_batch(), 5, initial_attributes=initial)
    seen = []

    def step(module: Any, batch: Any, batch_idx: int) -> Any:
        seen.append(module.seen)

    assert nanguard.replay(found, Net(), step=step).notes == ()
    assert seen == [41]


def test_training_flags_and_requires_grad_are_replayed(tmp_path: Path) -> None:
    model = Net()
    model.body[1].eval()
    model.body[0].weight.requires_grad_(False)
    found = capture(tmp_path, model, a_batch(), 5)
    result = nanguard.replay(found, Net())
    assert "body.0.weight" not in result.gradients
    flags = []
    nanguard.replay(found, Net(), step=lambda m, *args: flags.append((m.training, m.body[1].training)))
    assert flags == [(True, False)]


def test_buffers_from_before_the_step_override_the_poisoned_ones(tmp_path: Path) -> None:
    model = Net()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.body[1].running_mean.fill_(float("nan"))
    model.cache.fill_(float("nan"))
    model.body[1].eval()
    found = capture(tmp_path, model, a_batch(), 5, buffers=before)
    assert torch.equal(found.module_state["body.1.running_mean"], torch.zeros(8))
    assert "cache" not in found.module_state
    assert nanguard.replay(found, Net()).finite


def test_module_state_is_a_state_dict(tmp_path: Path) -> None:
    model = Net()
    found = capture(tmp_path, model, a_batch(), 5)
    fresh = Net()
    fresh.load_state_dict(found.module_state, strict=True)
    assert_same({k: v for k, v in model.state_dict().items()}, {k: v for k, v in fresh.state_dict().items()})  # noqa: C416


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
            self.two.weight = self.one.weight

        def training_step(self, batch: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(batch)).sum()

    model = Tied()
    before = {"one.weight": torch.full((2, 2), 2.0)}
    found = capture(tmp_path, model, torch.ones(1, 2), buffers=before)
    assert found.module_state["one.weight"] is found.module_state["two.weight"]
    assert nanguard.replay(found, Tied()).loss == 4 * 2 * 2 * 2


def test_strides_and_dtypes_of_weights_are_those_of_the_run(tmp_path: Path) -> None:
    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 3)

        def training_step(self, batch: torch.Tensor) -> torch.Tensor:
            seen.append((self.conv.weight.stride(), self.conv.weight.dtype))
            return self.conv(batch).sum()

    seen: list[Any] = []
    then = Conv().to(torch.float64).to(memory_format=torch.channels_last)
    found = capture(tmp_path, then, torch.randn(1, 2, 5, 5, dtype=torch.float64))
    now = Conv()
    before = state_of(now)
    result = nanguard.replay(found, now)
    assert seen == [(then.conv.weight.stride(), torch.float64)]
    assert result.gradients["conv.weight"].dtype is torch.float64
    assert_same(before, state_of(now))


@pytest.mark.parametrize(
    ("now", "problem"),
    [
        (lambda: Sum(width=3), r"captured shape -> shape here: layer.weight \(1, 2\) -> \(1, 3\)"),
        (lambda: nn.ModuleDict({"other": nn.Linear(2, 1)}), r"only in the capture: layer.weight, layer.bias"),
        (lambda: nn.ModuleDict({"other": nn.Linear(2, 1)}), r"only in the module: other.weight, other.bias"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path: Path, now: Any, problem: str) -> None:
    found = capture(tmp_path, Sum(), {"x": torch.ones(1, 2), "n": torch.tensor(1.0)})
    with pytest.raises(CaptureError, match=problem) as caught:
        nanguard.replay(found, now(), step=lambda *args: None)
    assert "weights='current'" in str(caught.value)
    assert nanguard.replay(found, now(), step=lambda *args: None, weights="current").finite


def test_without_weights_the_modules_own_are_used_and_said(tmp_path: Path) -> None:
    found = capture(tmp_path, Sum(), {"x": torch.ones(1, 2), "n": torch.tensor(1.0)}, weights=False)
    assert found.module_state is None
    assert nanguard.replay(found, Sum()).notes == ("the capture holds no weights: the module's own were used",)


def test_compiled_parts_have_the_same_names(tmp_path: Path) -> None:
    model = Sum()
    model.layer = torch.compile(model.layer, backend="eager")  # type: ignore[assignment]
    found = capture(tmp_path, model, {"x": torch.ones(1, 2), "n": torch.tensor(1.0)})
    now = Sum()
    assert nanguard.replay(found, now).finite
    assert list(found.module_state) == ["layer.weight", "layer.bias"]


def test_manual_optimization_steps_the_first_and_fails_at_the_second(tmp_path: Path) -> None:
    model = Gan()
    found = capture(tmp_path, model, a_batch(scale=0.0), 5, trigger="loss")
    result = nanguard.replay(found, Gan(), strict=True)
    assert result.incident is not None
    assert not torch.isfinite(result.loss).all()
    healthy = nanguard.replay(capture(tmp_path, model, a_batch(), 5), Gan())
    assert healthy.finite
    assert healthy.gradients


def test_the_state_of_optimizers_is_replayed(tmp_path: Path) -> None:
    model = Gan()
    optimizers, _ = model.configure_optimizers()
    optimizers[0].param_groups[0]["lr"] = 0.5
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    model.zero_grad()
    seen: list[Any] = []

    class Looking(Gan):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()[0]
            seen.append((len(optimizer.state), optimizer.param_groups[0]["lr"]))

    whole = capture(tmp_path, model, a_batch(), 5, optimizers=optimizers, optimizer=True)
    groups = capture(tmp_path, model, a_batch(), 5, optimizers=optimizers)
    assert len(whole.optimizer_state[0]["state"]) == 4
    assert groups.optimizer_state is None
    nanguard.replay(whole, Looking())
    nanguard.replay(groups, Looking())
    nanguard.replay(whole, Looking(), optimizer="current")
    assert seen == [(4, 0.5), (0, 0.5), (0, 0.1)]


def test_another_number_of_optimizers_is_an_error(tmp_path: Path) -> None:
    model = Gan()
    found = capture(tmp_path, model, a_batch(), 5, optimizers=model.configure_optimizers()[0][:1])
    with pytest.raises(CaptureError, match="returns 2 optimizers here, and the capture holds 1"):
        nanguard.replay(found, Gan())


def test_parameters_that_a_step_ruins_are_a_failure(tmp_path: Path) -> None:
    class Wild(Gan):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=float("inf"))

        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = self.generator(batch["x"]).sum()
            self.manual_backward(loss)
            self.optimizers().step()

    result = nanguard.replay(capture(tmp_path, Wild(), a_batch(), 5, trigger="parameters"), Wild(), strict=True)
    assert result.incident is not None
    assert result.incident.trigger == "parameters"


def test_what_the_trainer_is_asked_for(tmp_path: Path) -> None:
    class Asking(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            asked.append((self.current_epoch, self.global_step, self.trainer.max_steps, self.trainer.world_size))
            asked.append(self.trainer.nice)
            return self.all_gather(super().training_step(batch, batch_idx))

    asked: list[Any] = []
    found = capture(tmp_path, Asking(), a_batch(), 5, trainer={"max_steps": 100, "weird": object()})
    with pytest.raises(
        AttributeError, match=r"asks for `trainer.nice`; give it with replay\(..., trainer=\{'nice': value\}\)"
    ):
        nanguard.replay(found, Asking())
    assert nanguard.replay(found, Asking(), trainer={"nice": 3}).finite
    assert asked == [(2, 7, 100, 1), (2, 7, 100, 1), 3]


def test_missing_leaves_stop_a_replay_until_they_are_given(tmp_path: Path) -> None:
    class Parsing(Sum):
        def training_step(self, batch: Any, batch_idx: int = 0) -> Any:
            return super().training_step(batch) * batch["meta"]["parse"]()

    batch = {"x": torch.ones(1, 2), "n": torch.tensor(1.0), "meta": {"parse": lambda: 2.0, "id": 3}}
    found = capture(tmp_path, Parsing(), batch)
    assert [entry["path"] for entry in found.missing] == ['batch["meta"]["parse"]']
    assert found.batch["meta"]["id"] == 3
    with pytest.raises(CaptureError) as caught:
        nanguard.replay(found, Parsing())
    assert str(caught.value).splitlines() == [
        f"{found.path}: 1 of the batch's entries could not be stored:",
        '  batch["meta"]["parse"] (builtins.function): captures do not know this type',
        """  give what the step needs, such as replay(..., fill={'batch["meta"]["parse"]': value})""",
    ]
    for fill in ({'batch["meta"]["parse"]': lambda: 2.0}, {'batch["meta"]': {"parse": lambda: 2.0}}):
        assert nanguard.replay(found, Parsing(), fill=fill).finite
    with pytest.raises(CaptureError, match=r"fill names 'batch\[\"nothing\"\]', which is no entry"):
        nanguard.replay(found, Parsing(), fill={'batch["meta"]': None, 'batch["nothing"]': 1})


def test_a_step_may_edit_its_batch(tmp_path: Path) -> None:
    class Editing(Sum):
        def training_step(self, batch: Any, batch_idx: int = 0) -> Any:
            batch["x"].mul_(2)
            return super().training_step(batch)

    found = capture(tmp_path, Editing(), {"x": torch.ones(1, 2), "n": torch.tensor(1.0)})
    assert found.batch["x"].tolist() == [[1, 1]]
    losses = [nanguard.replay(found, Editing()).loss for _ in range(2)]
    assert torch.equal(losses[0], losses[1])
    assert found.batch["x"].tolist() == [[1, 1]]


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Linear(1, 1), "found Linear, which has no training_step; expected a LightningModule, or a function"),
        (Net, "it is a class: call it"),
        (3, "found 3; expected a LightningModule"),
    ],
)
def test_what_is_no_training_module(tmp_path: Path, module: Any, message: str) -> None:
    found = capture(tmp_path, Net(), a_batch(), 5)
    with pytest.raises(CaptureError, match=message):
        nanguard.replay(found, module)


def test_unknown_choices_are_refused(tmp_path: Path) -> None:
    found = capture(tmp_path, Net(), a_batch(), 5)
    with pytest.raises(CaptureError, match="weights: found 'none'; expected 'captured' or 'current'"):
        nanguard.replay(found, Net(), weights="none")  # type: ignore[arg-type]


def test_a_step_that_returns_nothing_is_finite(tmp_path: Path) -> None:
    found = capture(tmp_path, Net(), a_batch(), 5)
    result = nanguard.replay(found, Net(), step=lambda *args: None)
    assert (result.loss, result.finite, result.reproduced, result.incident) == (None, True, False, None)
    with pytest.raises(CaptureError, match="returned str; expected a tensor"):
        nanguard.replay(found, Net(), step=lambda *args: "loss")


def test_the_stabiliser_is_as_it_was_unless_told(tmp_path: Path) -> None:
    class Naive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def training_step(self, batch: torch.Tensor) -> torch.Tensor:
            return -torch.log(torch.softmax(self.weight * batch, dim=0)[1])

    batch = torch.tensor([1000.0, 0.0])
    off = capture(tmp_path, Naive(), batch)
    on = capture(tmp_path, Naive(), batch, stabilize={"enabled": True, "epsilon": "keep"})
    assert not nanguard.replay(off, Naive()).finite
    assert nanguard.replay(on, Naive()).loss == 1000
    assert nanguard.replay(off, Naive(), stabilize=True).loss == 1000
    assert not nanguard.replay(on, Naive(), stabilize=False).finite


def test_captured_settings_hold_during_the_replay_only(tmp_path: Path) -> None:
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    seen = []
    try:
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float64)
        found = capture(tmp_path, Net(), a_batch(), 5)
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
    nanguard.replay(found, Net(), step=lambda *args: seen.append((torch.get_num_threads(), torch.get_default_dtype())))
    assert seen == [(1, torch.float64)]
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, dtype)


def test_the_backward_pass_is_outside_of_autocast(tmp_path: Path) -> None:
    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def training_step(self, batch: torch.Tensor) -> torch.Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))
            loss = (self.weight * batch).sum()
            loss.register_hook(lambda grad: seen.append(torch.is_autocast_enabled("cpu")))
            return loss

    seen: list[bool] = []
    found = capture(
        tmp_path, Asking(), torch.ones(1), precision={"autocast_device": "cpu", "autocast_dtype": "bfloat16"}
    )
    nanguard.replay(found, Asking())
    assert seen == [True, False]


def test_metrics_and_recurrent_layers(tmp_path: Path) -> None:
    class Both(Net):
        def __init__(self) -> None:
            super().__init__()
            self.mean = MeanMetric()
            self.lstm = nn.LSTM(4, 3)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.mean.update(batch["x"])
            self.log("mean", self.mean)
            return super().training_step(batch, batch_idx) + self.lstm(batch["x"])[0].sum() + self.mean.compute()

    found = capture(tmp_path, Both(), a_batch(), 5)
    now = Both()
    now.mean.update(3.0)
    before, value = state_of(now), float(now.mean.compute())
    now.mean._computed = None
    before = state_of(now)
    assert nanguard.replay(found, now).finite
    assert_same(before, state_of(now))
    assert float(now.mean.compute()) == value


def test_a_compiled_module_is_replayed_as_what_it_is(tmp_path: Path) -> None:
    found = capture(tmp_path, Sum(), {"x": torch.ones(1, 2), "n": torch.tensor(0.0)})
    assert nanguard.replay(found, torch.compile(Sum(), backend="eager")).reproduced  # type: ignore[arg-type]


def test_hostile_numbers_of_generators_are_errors(tmp_path: Path) -> None:
    found = capture(tmp_path, Net(), a_batch(), 5)
    broken = dataclasses.replace(found.rng, torch=torch.zeros(3, dtype=torch.uint8))
    found.__dict__["rng"] = broken
    with pytest.raises(CaptureError, match="entry 'rng' is damaged"):
        nanguard.replay(found, Net())


@pytest.mark.parametrize("place", ["samples", "dataset_indices"])
def test_numbers_of_samples_that_are_none_are_errors(tmp_path: Path, place: str) -> None:
    found = capture(tmp_path, Net(), a_batch(), 5)
    file = found.path / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["incident"][place] = [math.inf]
    file.write_text(json.dumps(manifest))
    with pytest.raises(CaptureError, match="entry 'incident' is damaged"):
        nanguard.load_capture(found.path)
