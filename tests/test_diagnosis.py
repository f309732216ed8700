"""The autopsy: the operation, the cause, the samples; and nothing is left behind by the second runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trainers import Net, assert_same, fit, policy, rows, without

from nanguard.diagnosis import batch_size
from nanguard.diagnosis.samples import failing_samples, take
from nanguard.incident import Incident

# -- a zoo of bugs: `h` is a healthy activation of shape (8, 4), `s` a column of ones that is 0 for the bad samples


@dataclass(frozen=True)
class Bug:
    """One line that fails for the bad samples, and what should be said about it."""

    line: Callable[[Tensor, Tensor], Tensor]
    cause: str
    op: str
    phase: str = "forward"
    samples: tuple[int, ...] | None = (2, 5)
    single: bool = False


ZOO: dict[str, Bug] = {
    "log of 0": Bug(lambda h, s: torch.log(h.sigmoid() * s), "log_of_zero", "aten.log"),
    "log2 of 0": Bug(lambda h, s: torch.log2(h.sigmoid() * s), "log_of_zero", "aten.log2"),
    "log1p of -1": Bug(lambda h, s: torch.log1p(h.sigmoid() * 0.5 * s - (1 - s)), "invalid_domain", "aten.log1p"),
    "log of a negative": Bug(lambda h, s: torch.log(h.sigmoid() + 3 * (s - 1)), "invalid_domain", "aten.log"),
    "exp": Bug(lambda h, s: torch.exp(h + 200 * (1 - s)), "overflow", "aten.exp"),
    "power": Bug(lambda h, s: (h.sigmoid() + 1e30 * (1 - s)) ** 2, "overflow", "aten.pow"),
    "product": Bug(lambda h, s: (h.sigmoid() + 1e30 * (1 - s)) * (1 + 1e30 * (1 - s)), "overflow", "aten.mul"),
    "division": Bug(lambda h, s: h / s, "division_by_zero", "aten.div"),
    "reciprocal": Bug(lambda h, s: h * s.reciprocal(), "division_by_zero", "aten.reciprocal"),
    "square root": Bug(lambda h, s: (h * s).square().sum(1).sqrt(), "singular_gradient", "aten.sqrt", "backward"),
    "square root of a negative": Bug(lambda h, s: (h.sigmoid() + 5 * (s - 1)).sqrt(), "invalid_domain", "aten.sqrt"),
    "deviation": Bug(lambda h, s: (h * s).var(1).sqrt(), "singular_gradient", "aten.sqrt", "backward"),
    "power of 0": Bug(lambda h, s: (h.abs() * s).pow(0.5), "singular_gradient", "aten.pow", "backward"),
    "where": Bug(
        lambda h, s: torch.where(s > 0, torch.log(h.sigmoid() * s), torch.zeros_like(h)),
        "masked_branch",
        "aten.log",
        "backward",
    ),
    "where and power": Bug(
        lambda h, s: torch.where(s > 0, (h.abs() * s).pow(0.5), torch.zeros_like(h)),
        "masked_branch",
        "aten.pow",
        "backward",
    ),
    "where and root": Bug(
        lambda h, s: torch.where(s > 0, (h.square() * s).sum(1, keepdim=True).sqrt(), torch.zeros_like(s)),
        "masked_branch",
        "aten.sqrt",
        "backward",
    ),
    "quotient": Bug(lambda h, s: (h * s).sum(1) / (h * s).abs().sum(1), "division_by_zero", "aten.div"),
    "tiny divisor": Bug(lambda h, s: h / (s + 1e-35) / (s + 1e-35), "overflow", "aten.div"),
    "rsqrt": Bug(lambda h, s: h * (h.square() * s).mean(1, keepdim=True).rsqrt(), "invalid_domain", "aten.rsqrt"),
    "a mask, multiplied": Bug(lambda h, s: h.masked_fill(s == 0, float("-inf")) * s, "invalid_domain", "aten.mul"),
    "a mask, subtracted": Bug(
        lambda h, s: (lambda m: m - m.amax(1, keepdim=True))(h.masked_fill(s == 0, float("-inf"))),
        "fully_masked",
        "aten.sub",
    ),
    "softmax": Bug(lambda h, s: F.softmax(h.masked_fill(s == 0, float("-inf")), -1), "fully_masked", "aten._softmax"),
    "log_softmax": Bug(
        lambda h, s: -F.log_softmax(h.masked_fill(s == 0, float("-inf")), -1)[:, 0], "fully_masked", "aten._log_softmax"
    ),
    "acos": Bug(lambda h, s: torch.acos(h.tanh() * 0.9 + 3 * (1 - s)), "invalid_domain", "aten.acos"),
    "atanh": Bug(lambda h, s: torch.atanh(h.tanh() * 0.5 + 3 * (1 - s)), "invalid_domain", "aten.atanh"),
}


class Zoo(pl.LightningModule):
    """Runs one bug in a submodule."""

    def __init__(self, line: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.critic = Critic(line)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, s = batch
        return self.critic(self.body(x), s).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Critic(nn.Module):
    def __init__(self, line: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.line = line

    def forward(self, h: Tensor, s: Tensor) -> Tensor:
        return self.line(h, s)


SIZE = 8


def samples(bad: tuple[int, ...] = (2, 5), batches: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Three batches; the samples at the positions `bad` of the second are bad."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for position in range(SIZE * batches):
        x, s = torch.randn(4, generator=generator), torch.ones(1)
        if position // SIZE == 1 and position % SIZE in bad:
            s = torch.zeros(1)
        found.append((x, s))
    return found


def incident_of(tmp: Path, make: Callable[[], Any], data: Any, **sections: Any) -> Incident:
    """The one incident of a run in which bad steps are left out."""
    guard = policy(tmp, capture={"enabled": False}, **sections)
    run = fit(tmp, make, torch.utils.data.DataLoader(data, batch_size=SIZE) if isinstance(data, list) else data, guard)
    assert len(run.incidents) == 1, run.incidents
    return run.incidents[0]


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo(tmp_path: Path, name: str) -> None:
    bug = ZOO[name]
    incident = incident_of(tmp_path, lambda: Zoo(bug.line), samples())
    origin = incident.origin
    assert (incident.cause, origin.op, origin.phase) == (bug.cause, bug.op, bug.phase)
    assert incident.batch_idx == 1
    assert incident.samples == bug.samples
    assert incident.dataset_indices == tuple(SIZE + position for position in bug.samples)
    assert incident.verdict == "reproduced"
    assert origin.module == "critic"
    assert origin.file == __file__
    first = inspect.getsourcelines(bug.line)[1]
    assert first <= origin.line <= first + 6
    assert origin.code
    assert incident.advice


@pytest.mark.parametrize("bad", [(0,), (7,), (0, 7), (1, 2, 3), tuple(range(8))], ids=str)
@pytest.mark.parametrize("name", ["log of 0", "square root"])
def test_all_samples_at_fault_are_found(tmp_path: Path, name: str, bad: tuple[int, ...]) -> None:
    assert incident_of(tmp_path, lambda: Zoo(ZOO[name].line), samples(bad)).samples == bad


def test_a_mask_that_reaches_the_loss(tmp_path: Path) -> None:
    incident = incident_of(tmp_path, lambda: Zoo(lambda h, s: h.masked_fill(s == 0, float("-inf"))), samples())
    assert (incident.origin.op, incident.origin.code) == ("aten.mean", "return self.critic(self.body(x), s).mean()")
    assert incident.origin.operands[0].neginf == 8
    assert incident.samples == (2, 5)


def test_with_batch_norm_which_cannot_run_one_sample(tmp_path: Path) -> None:
    class Normed(Zoo):
        def __init__(self) -> None:
            super().__init__(ZOO["log of 0"].line)
            self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    assert incident_of(tmp_path, Normed, samples((3,))).samples == (3,)


def test_samples_may_be_left_unsearched(tmp_path: Path) -> None:
    incident = incident_of(tmp_path, lambda: Zoo(ZOO["log of 0"].line), samples(), diagnosis={"samples": False})
    assert incident.samples is None
    assert incident.cause == "log_of_zero"


def test_further_runs_give_evidence(tmp_path: Path) -> None:
    bug = ZOO["exp"]
    told = incident_of(tmp_path, lambda: Zoo(bug.line), samples())
    assert told.advice.endswith("In float64 the same step is finite.")
    silent = incident_of(tmp_path, lambda: Zoo(bug.line), samples(), diagnosis={"counterfactuals": False})
    assert told.advice.startswith(silent.advice)
    assert "float64" not in silent.advice
    assert (silent.origin, silent.cause, silent.samples) == (told.origin, told.cause, told.samples)


def test_the_stabiliser_is_named_where_it_would_have_helped(tmp_path: Path) -> None:
    class ByHand(Zoo):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, s = batch
            p = torch.softmax(self.body(x) + 300 * (1 - s) * torch.eye(4)[0], dim=1)
            return -torch.log(p[:, 1]).mean()

    incident = incident_of(tmp_path, lambda: ByHand(lambda h, s: h), samples())
    assert incident.cause == "log_of_zero"
    assert "With the stabiliser the step is finite (NG102): write F.log_softmax(" in incident.advice


def test_what_overflows_in_float64_too_is_no_matter_of_precision(tmp_path: Path) -> None:
    incident = incident_of(tmp_path, lambda: Zoo(lambda h, s: torch.exp(h + 900 * (1 - s))), samples())
    assert incident.advice.endswith("In float64 it fails, too.")


def test_diagnosis_may_be_left_out(tmp_path: Path) -> None:
    incident = incident_of(tmp_path, lambda: Zoo(ZOO["log of 0"].line), samples(), diagnosis={"enabled": False})
    assert (incident.samples, incident.cause, incident.verdict) == (None, "unknown", "not_replayed")


# -- what comes from outside


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_bad_inputs(tmp_path: Path, value: str) -> None:
    data = samples(())
    data[SIZE + 6][0][1] = float(value)
    incident = incident_of(tmp_path, lambda: Zoo(lambda h, s: h.square() * s), data)
    assert (incident.cause, incident.samples) == ("bad_input", (6,))
    assert incident.origin.tensor == "batch[0]"
    assert incident.origin.op == "aten.addmm"
    assert incident.origin.module == "body"
    assert "batch[0]" in incident.advice


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_bad_parameters_and_buffers(tmp_path: Path, value: float, kind: str) -> None:
    class Poisoned(Zoo):
        def __init__(self) -> None:
            super().__init__(lambda h, s: h * s)
            self.register_buffer("scale", torch.ones(4))

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                with torch.no_grad():
                    (self.body.weight if kind == "parameter" else self.scale).view(-1)[2] = value

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.critic(self.body(batch[0]), batch[1] * self.scale).mean()

    with pytest.raises(FloatingPointError) as caught:
        fit(
            tmp_path,
            Poisoned,
            torch.utils.data.DataLoader(samples(()), batch_size=SIZE),
            policy(tmp_path, "raise", capture={"enabled": False}),
        )
    incident = caught.value.incident
    assert incident.cause == "parameters"
    assert incident.samples is None
    assert incident.origin.tensor == ("body.weight" if kind == "parameter" else "scale")


def test_weights_that_any_batch_fails_with(tmp_path: Path) -> None:
    """Finite weights that blow up whatever they are given: no sample is at fault."""

    class Blown(Zoo):
        def __init__(self) -> None:
            super().__init__(lambda h, s: torch.exp(h))

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                with torch.no_grad():
                    self.body.weight.zero_()
                    self.body.bias.fill_(500)

    incident = incident_of_raise(tmp_path, Blown, samples(()))
    assert incident.cause == "overflow"
    assert incident.samples is None


def incident_of_raise(tmp: Path, make: Callable[[], Any], data: list[Any]) -> Incident:
    with pytest.raises(FloatingPointError) as caught:
        fit(
            tmp,
            make,
            torch.utils.data.DataLoader(data, batch_size=SIZE),
            policy(tmp, "raise", capture={"enabled": False}),
        )
    return caught.value.incident


class Selecting(Zoo):
    """Averages a selection that may be empty."""

    def __init__(self, how: str) -> None:
        super().__init__(lambda h, s: h)
        self.how = how

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        h, s = self.body(batch[0]), batch[1]
        if self.how == "mean":
            return h[(s > 0).squeeze(1)].mean()
        targets = torch.where(s.squeeze(1) > 0, 1, -100)
        return F.cross_entropy(h, targets)


@pytest.mark.parametrize(("how", "op"), [("mean", "aten.mean"), ("cross entropy", "aten.nll_loss_forward")])
def test_the_mean_of_nothing(tmp_path: Path, how: str, op: str) -> None:
    incident = incident_of(tmp_path, lambda: Selecting(how), samples(tuple(range(8))))
    assert (incident.cause, incident.origin.op) == ("empty_reduction", op)


def test_a_transient(tmp_path: Path) -> None:
    class Flaky(Zoo):
        def __init__(self) -> None:
            super().__init__(lambda h, s: h)
            self.times = [0]  # nothing that can be put back knows how often it was called
            object.__setattr__(self, "count", lambda: calls.append(0) or len(calls))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if self.count() == 2 else loss

    calls: list[int] = []
    incident = incident_of(tmp_path, Flaky, samples(()))
    assert (incident.cause, incident.verdict) == ("transient", "transient")
    assert incident.samples is None
    assert incident.origin is None or incident.origin.op is None


def test_a_random_draw_is_drawn_again(tmp_path: Path) -> None:
    """Randomness from the streams that are put back is no transient."""

    class Unlucky(Zoo):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            h = self.body(batch[0])
            drawn = torch.rand(len(h), 1)
            return (h / torch.where((drawn <= drawn.min()) & (batch_idx == 1), 0.0, 1.0)).mean()

    incident = incident_of(tmp_path, lambda: Unlucky(lambda h, s: h), samples(()))
    assert (incident.cause, incident.verdict) == ("division_by_zero", "reproduced")


def test_a_custom_function_is_called_by_its_name(tmp_path: Path) -> None:
    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return gradient / (x.detach() * 0)

    incident = incident_of_raise(tmp_path, lambda: Zoo(lambda h, s: Breaks.apply(h)), samples(()))
    assert incident.origin.op == "Breaks"
    assert incident.origin.phase == "backward"


# -- what is meant, and what does no harm, is no incident


QUIET: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a mask of -inf": lambda h, s: F.softmax(h + torch.where(torch.arange(4) < 2, 0.0, float("-inf")), -1).square(),
    "masked_fill": lambda h, s: torch.logsumexp(h.masked_fill(torch.arange(4) > 1, float("-inf")), -1),
    "a running minimum": lambda h, s: torch.minimum(torch.full_like(h, float("inf")), h),
    "a metric": lambda h, s: (torch.log(s.detach() * 0).sum(), h)[1],
    "a branch not taken": lambda h, s: torch.where(s >= 0, h, torch.full_like(h, float("nan"))),
    "nan_to_num": lambda h, s: h + torch.nan_to_num(s / 0 * 0, nan=0.0),
    "isinf": lambda h, s: h * torch.isfinite(s / (s * 0)).float(),
    "clamp of an infinity": lambda h, s: h + torch.clamp(torch.log(s * 0), min=-5),
}


@pytest.mark.parametrize("name", QUIET)
def test_legitimate_infinities(tmp_path: Path, name: str) -> None:
    data = torch.utils.data.DataLoader(samples(), batch_size=SIZE)
    assert fit(tmp_path, lambda: Zoo(QUIET[name]), data, policy(tmp_path, "raise")).incidents == []


@pytest.mark.parametrize("name", QUIET)
def test_legitimate_infinities_beside_a_bug(tmp_path: Path, name: str) -> None:
    """They are not blamed for the failure of something else."""

    def both(h: Tensor, s: Tensor) -> Tensor:
        quiet = QUIET[name](h, s).sum(-1, keepdim=True)
        return quiet + torch.acos(h.tanh() * 0.9 + 3 * (1 - s))

    incident = incident_of(tmp_path, lambda: Zoo(both), samples())
    assert (incident.origin.op, incident.cause) == ("aten.acos", "invalid_domain")
    assert incident.samples == (2, 5)


# -- no trace


@pytest.mark.parametrize("kind", ["nan", "inf", "gradient"])
@pytest.mark.parametrize(
    ("optimizer", "precision"), [("adam", "32-true"), ("adam", "bf16-mixed"), ("lbfgs", "32-true")]
)
def test_a_diagnosis_changes_nothing(tmp_path: Path, kind: str, optimizer: str, precision: str) -> None:
    data = rows(5, [1, 3], kind)
    runs = [
        fit(
            tmp_path,
            lambda: Net(optimizer, "step"),
            data,
            policy(tmp_path, capture={"enabled": False}, diagnosis={"enabled": enabled}),
            precision=precision,
        )
        for enabled in (True, False)
    ]
    assert [incident.verdict for incident in runs[0].incidents] == ["reproduced"] * 2
    assert_same(*runs)


@pytest.mark.parametrize("kind", ["nan", "gradient"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_diagnosis_of_a_recorded_step_changes_nothing(tmp_path: Path, kind: str, accumulate: int) -> None:
    data = rows(4, [3], kind)
    runs = [
        fit(tmp_path, Net, data, guard, accumulate_grad_batches=accumulate)
        for guard in (policy(tmp_path, "record"), policy(tmp_path, "record", diagnosis={"enabled": False}), None)
    ]
    assert runs[0].incidents[0].verdict == "reproduced"
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])


def test_gradients_accumulated_before_are_kept(tmp_path: Path) -> None:
    data = rows(4, [3])
    guarded = fit(tmp_path, Net, data, policy(tmp_path), accumulate_grad_batches=2)
    assert_same(guarded, fit(tmp_path, Net, without(data, [2, 3]), accumulate_grad_batches=2))


# -- the search for the samples, by itself


@pytest.mark.parametrize("size", [1, 2, 3, 8, 17, 64])
def test_any_single_sample_is_found(size: int) -> None:
    for culprit in range(size):
        assert failing_samples(size, lambda positions, culprit=culprit: culprit in positions) == (culprit,)


@pytest.mark.parametrize("pair", [(0, 1), (0, 7), (3, 4), (2, 6)])
def test_samples_that_fail_only_together(pair: tuple[int, int]) -> None:
    assert failing_samples(8, lambda positions: set(pair) <= set(positions)) == pair


def test_sub_batches_that_cannot_be_run_are_filled_up() -> None:
    def fails(positions: Any) -> bool | None:
        return None if len(positions) < 2 else 5 in positions

    assert failing_samples(8, fails) == (5,)


def test_the_search_gives_up() -> None:
    runs = []

    def fails(positions: Any) -> bool:
        runs.append(positions)
        return len(positions) == 64

    failing_samples(64, fails, most_runs=20)
    assert len(runs) <= 20


def test_taking_samples_of_a_nested_batch() -> None:
    batch = {"x": torch.arange(12).reshape(4, 3), "pair": (torch.arange(4), torch.tensor(7)), "name": "same"}
    assert batch_size(batch) == 4
    picked = take(batch, [2, 0])
    assert picked["x"].tolist() == [[6, 7, 8], [0, 1, 2]]
    assert picked["pair"][0].tolist() == [2, 0]
    assert picked["pair"][1].item() == 7
    assert picked["name"] == "same"


@pytest.mark.parametrize("batch", [(), {}, "text", torch.tensor(1), {"a": torch.ones(2), "b": torch.ones(3)}], ids=str)
def test_batches_without_a_size(batch: Any) -> None:
    assert batch_size(batch) is None


def test_loaders_of_the_zoo_are_what_they_say() -> None:
    assert [position for position, (_, s) in enumerate(samples()[SIZE : 2 * SIZE]) if not s.item()] == [2, 5]
