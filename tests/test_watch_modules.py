"""Watched modules: what the hooks see in real runs, what they leave alone, and that none of them stays."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from trainers import Net, assert_same, fit, loader, make_trainer, policy, rows, seed
from watched import Bulk, Masked, Pair, Parts, Reused, Sealed, hooks_of

from nanguard import NanGuard, NanGuardWarning, NonFiniteError, PolicyError
from nanguard.watching.matching import matched_modules
from nanguard.watching.rows import measure

ALL = {"modules": ["*"], "every_n_steps": 1}


def watched(tmp: Path, action: str = "record", watch: Any = ALL, **sections: Any) -> Any:
    return policy(tmp, action, watch=watch, **sections)


# -- what is measured

values = st.sampled_from([math.nan, math.inf, -math.inf, 0.0]) | st.floats(-1e4, 1e4, width=16)


@given(st.lists(values, min_size=1, max_size=40), st.sampled_from([torch.float16, torch.float32, torch.float64]))
def test_the_numbers_are_those_of_the_tensor(found, dtype):
    tensor = torch.tensor(found, dtype=dtype)
    row = measure(tensor)
    assert row is not None
    row.values = row.device.tolist()
    stats = row.stats("x")
    finite = [value for value in tensor.tolist() if math.isfinite(value)]
    assert (stats.min, stats.max) == ((min(finite), max(finite)) if finite else (None, None))
    counts = [sum(map(test, found)) for test in (math.isnan, lambda v: v == math.inf, lambda v: v == -math.inf)]
    assert [stats.nan, stats.posinf, stats.neginf] == counts
    assert stats.zeros == finite.count(0.0)
    bad = [row.bad(kinds) for kinds in ("none", "positive", "all")]
    assert bad == [counts[0] > 0, counts[0] + counts[1] > 0, sum(counts) > 0]


def test_what_cannot_be_measured_is_left_alone():
    assert measure(torch.zeros(0)) is None
    assert measure(torch.ones(2, dtype=torch.long)) is None
    assert measure(torch.ones(2, device="meta")) is None
    seen = []
    torch.vmap(lambda x: (seen.append(measure(x)), x * 2)[1])(torch.ones(2, 3))
    assert seen == [None]
    row = measure(torch.tensor([1 + 2j, complex(math.nan, 1)]))
    assert row is not None
    assert row.device.tolist()[:3] == [1.0, 2.0, 1.0]


# -- which modules


def test_patterns():
    root = Net()
    assert list(matched_modules(root, ["block.*"])) == ["block.linear", "block.norm", "block.drop"]
    assert list(matched_modules(root, ["head", "block"])) == ["block", "head"]
    assert list(matched_modules(root, ["*"])) == ["", "block", "block.linear", "block.norm", "block.drop", "head"]
    assert list(matched_modules(root, ["mean"])) == ["mean"]  # a metric, by its exact name


def test_what_is_inside_compiled_code_is_watched_at_its_edge():
    root = Net()
    root.block = torch.compile(root.block, backend="eager")
    found = matched_modules(root, ["block.lin*"])
    assert list(found) == ["block"]
    assert found["block"] is root.block


@pytest.mark.parametrize(
    ("pattern", "parts"),
    [("blok.*", ["'blok.*'", "no module of Net", "Close names: block"]), ("zzz", ["Some names: block, block.linear"])],
)
def test_a_pattern_that_matches_nothing_is_an_error(tmp_path: Path, pattern: str, parts: list[str]) -> None:
    with pytest.raises(PolicyError) as caught:
        fit(tmp_path, Net, rows(2), watched(tmp_path, watch={"modules": ["head", pattern]}))
    assert all(part in str(caught.value) for part in ["watch.modules", *parts])


# -- activations that are bad although the loss is finite


def test_a_bad_activation_that_never_reaches_the_loss_is_an_incident_where_it_is_watched(tmp_path: Path) -> None:
    data = rows(4, [2])
    assert fit(tmp_path, Masked, data, policy(tmp_path)).incidents == []
    (incident,) = fit(tmp_path, Masked, data, watched(tmp_path)).incidents
    assert (incident.trigger, incident.batch_idx, incident.verdict) == ("activations", 2, "reproduced")
    assert (incident.origin.module, incident.origin.phase, incident.samples) == ("inverse", "forward", (2,))
    assert incident.origin.operands[0].nan == 0
    assert "first non-finite output of a watched module: `inverse`" in incident.detail
    names = [stats.name for stats in incident.activations]
    assert names == ["one", "inverse", "two"]
    assert incident.activations[0].max < 10 < incident.activations[1].posinf + 20
    assert "an activation of a watched module at step 2" in str(incident)


def test_the_rules_decide(tmp_path: Path) -> None:
    guard = watched(tmp_path)
    data = guard.model_dump()
    data["rules"] = [{"when": {"trigger": ["activations"]}, "action": "skip_step"}, {"action": "raise"}]
    run = fit(tmp_path, Masked, rows(4, [2]), type(guard)(**data))
    assert [(incident.trigger, incident.action) for incident in run.incidents] == [("activations", "skipped")]
    assert_same(run, fit(tmp_path, Masked, [row for i, row in enumerate(rows(4, [2])) if i // 4 != 2]))


@pytest.mark.parametrize(
    ("infinities", "kinds"), [("none", []), ("positive", [math.inf]), ("all", [math.inf, -math.inf])]
)
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinities_count_as_the_policy_says(tmp_path: Path, infinities: str, kinds: list[float], value: float) -> None:
    run = fit(tmp_path, lambda: Masked(value), rows(2, [1]), watched(tmp_path, watch={**ALL, "infinities": infinities}))
    assert len(run.incidents) == (value in kinds)


def test_every_so_many_steps(tmp_path: Path) -> None:
    data = rows(7, [0, 1, 2, 3, 4, 5, 6])
    run = fit(tmp_path, Masked, data, watched(tmp_path, watch={"modules": ["*"], "every_n_steps": 3}))
    assert [incident.batch_idx for incident in run.incidents] == [0, 3, 6]
    run = fit(tmp_path, Masked, data[:24], watched(tmp_path), accumulate_grad_batches=3)
    assert [incident.batch_idx for incident in run.incidents] == [0, 3]  # once in a window, at its first


# -- where the step is not run again


@pytest.mark.parametrize("make", [Bulk, lambda: Bulk(fetching=True)], ids=["manual", "dataloader_iter"])
@pytest.mark.parametrize(
    ("failure", "module", "phase"),
    [("inner", "net.1", "forward"), ("root", "", "forward"), ("backward", "net.1", "backward")],
)
def test_the_hooks_name_the_module(tmp_path: Path, make: Any, failure: str, module: str, phase: str) -> None:
    def built() -> Any:
        model = make()
        model.failure = failure
        return model

    data = rows(4, [2], "gradient")
    run = fit(tmp_path, built, data, watched(tmp_path, "skip_step"))
    (incident,) = run.incidents
    assert (incident.origin.module, incident.origin.phase) == (module, phase)
    assert incident.origin.operands
    assert incident.verdict == "not_replayed"


def test_a_bad_input_is_still_named(tmp_path: Path) -> None:
    (incident,) = fit(tmp_path, Bulk, rows(4, [2]), watched(tmp_path)).incidents[:1]
    assert (incident.cause, incident.origin.tensor) == ("bad_input", "batch[0]")


# -- runs that are watched are the same runs


class Checkpointed(Net):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_() if self.reentrant else x
        return self.head(checkpoint(self.block, x, use_reentrant=self.reentrant))


class Reentrant(Checkpointed):
    reentrant = True


class Compiled(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head = torch.compile(self.head, backend="eager")
        self.block.norm.compile(backend="eager")


class CompiledStep(Net):
    """A compiled function that calls modules: the hooks stand inside compiled code."""

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(type(self), "whole"):
            type(self).whole = staticmethod(torch.compile(lambda m, x: m.head(m.block.linear(x)), backend="eager"))
        return type(self).whole(self, x)


MODELS = [Net, Parts, Pair, Reused, Masked, Bulk, Sealed, Checkpointed, Reentrant, Compiled, CompiledStep]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("stabilize", [False, True])
def test_a_watched_run_is_bit_identical(tmp_path: Path, make: Any, stabilize: bool) -> None:
    torch._dynamo.reset()
    guard = watched(tmp_path, watch={**ALL, "every_n_steps": 2}, stabilize={"enabled": stabilize})
    run = fit(tmp_path, make, rows(5), guard)
    assert run.incidents == []
    assert hooks_of(run.model) == []
    assert_same(run, fit(tmp_path, make, rows(5), policy(tmp_path, stabilize={"enabled": stabilize})))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", MODELS)
def test_every_kind_of_module_is_seen(tmp_path: Path, make: Any) -> None:
    torch._dynamo.reset()
    run = fit(tmp_path, make, rows(3, [2]), watched(tmp_path))
    assert run.incidents
    ranges = {stats.name: stats for stats in run.incidents[0].activations}
    expected = {
        Parts: ["parts[0]", 'parts[1]["half"]', 'parts[1]["rest"].value', "parts"],
        Reused: ["layer", "layer (call 2)", "layer (call 3)"],
        Sealed: ["scripted", "teacher"],
        Compiled: ["head", "block.norm"],
        CompiledStep: ["(root)"],
        Checkpointed: ["block.linear", "block"],
        Reentrant: ["block.linear", "block"],
    }.get(make, [])
    assert [name for name in expected if name not in ranges] == ([] if make is not Parts else ["parts"])
    assert all(name.count("call") == 0 for name in ranges) or make is Reused


# -- nothing stays


class Failing(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.copies = [copy.deepcopy(self.block)]
        self.out = self.block(batch[0])
        if batch_idx == 1:
            raise RuntimeError("in the step")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("action", ["raise", "skip_step"])
def test_no_hook_stays(tmp_path: Path, action: str) -> None:
    seed()
    model, guard = Failing(), NanGuard(watched(tmp_path, action))
    with pytest.raises(RuntimeError, match="in the step"):
        make_trainer(tmp_path, [guard]).fit(model, loader(rows(3)))
    assert hooks_of(model) == []
    assert all(hook.__name__ == "_nothing" for hook in hooks_of(model.copies[0]))
    model.copies[0](torch.ones(4, 4))
    assert hooks_of(model.copies[0]) == []
    model.out.sum().backward()  # the graph is free of hooks, too
    seed()
    model = Net()
    with pytest.raises(NonFiniteError) if action == "raise" else pytest.warns(NanGuardWarning):
        make_trainer(tmp_path, [NanGuard(watched(tmp_path, action))]).fit(model, loader(rows(3, [1])))
    assert hooks_of(model) == []


@pytest.mark.parametrize(
    "options",
    [{"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.5, "max_epochs": 2}],
    ids=["bf16", "accumulation", "clipping"],
)
def test_watched_runs_of_every_kind_are_bit_identical(tmp_path: Path, options: dict[str, Any]) -> None:
    for optimizer in ("sgd", "lbfgs")[: 1 if "gradient_clip_val" not in options else 2]:
        run = fit(
            tmp_path, lambda kind=optimizer: Net(kind, "step"), rows(5, [3]), watched(tmp_path, "skip_step"), **options
        )
        reference = fit(tmp_path, lambda kind=optimizer: Net(kind, "step"), rows(5, [3]), policy(tmp_path), **options)
        assert len(run.incidents) == len(reference.incidents) > 0
        assert_same(run, reference)


def test_the_diagnosis_finds_what_it_finds_without_hooks(tmp_path: Path) -> None:
    (with_hooks,) = fit(tmp_path, Net, rows(4, [2], "gradient"), watched(tmp_path, "skip_step")).incidents
    (without,) = fit(tmp_path, Net, rows(4, [2], "gradient"), policy(tmp_path)).incidents
    for incident in (with_hooks, without):
        assert (incident.origin.op, incident.cause, incident.samples) == ("aten.sqrt", without.cause, (2,))
    assert "first non-finite gradient" in with_hooks.detail
    assert without.activations == ()
    assert dataclasses.replace(with_hooks, activations=(), detail="").origin == without.origin
