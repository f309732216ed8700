"""A skip is a transaction: the run ends as if the batch had never been in the data, bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from trainers import (
    OPTIMIZERS,
    Net,
    Run,
    Samples,
    assert_finite,
    assert_same,
    differences,
    fingerprint,
    fit,
    loader,
    policy,
    rows,
    without,
)

from nanguard import NonFiniteError

pytestmark = pytest.mark.filterwarnings("ignore::nanguard.NanGuardWarning")


def skipped(
    tmp: Path,
    make: Callable[[], Any] = Net,
    bad: tuple[int, ...] = (2,),
    kind: str = "nan",
    batches: int = 6,
    sections: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Run, Run]:
    """The run with the bad batches under the guard, and the run without them and without the guard."""
    data = rows(batches, bad, kind)
    guarded = fit(tmp, make, data, policy(tmp, **(sections or {})), **options)
    reference = fit(tmp, make, without(data, bad), **options)
    epochs = options.get("max_epochs", 1)
    assert [incident.action for incident in guarded.incidents] == ["skipped"] * len(bad) * epochs
    return guarded, reference


# -- everything at once, over optimizers, kinds of failure, places in the epoch


@pytest.mark.parametrize("kind", ["nan", "gradient"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_batch_never_was(tmp_path: Path, optimizer: str, kind: str) -> None:
    guarded, reference = skipped(tmp_path, lambda: Net(optimizer), kind=kind)
    assert guarded.incidents[0].trigger == ("loss" if kind == "nan" else "gradients")
    assert_same(guarded, reference)


@pytest.mark.parametrize("bad", [(0,), (5,), (2, 3), (0, 1), (4, 5), (0, 2, 5)], ids=str)
@pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])
def test_wherever_the_batch_stands(tmp_path: Path, optimizer: str, bad: tuple[int, ...]) -> None:
    guarded, reference = skipped(tmp_path, lambda: Net(optimizer, "step"), bad=bad, max_epochs=2)
    assert_same(guarded, reference)
    assert [(i.epoch, i.batch_idx) for i in guarded.incidents] == [(epoch, batch) for epoch in (0, 1) for batch in bad]


@pytest.mark.parametrize("schedule", ["step", "epoch", "onecycle", "plateau"])
@pytest.mark.parametrize("bad", [(1,), (5,)], ids=str)
def test_schedules(tmp_path: Path, schedule: str, bad: tuple[int, ...]) -> None:
    guarded, reference = skipped(tmp_path, lambda: Net("sgd", schedule), bad=bad, max_epochs=3)
    assert_same(guarded, reference)
    rates = [epoch["optimizers"][0]["param_groups"][0]["lr"] for epoch in guarded.epochs]
    assert len(set(rates)) > 1 or schedule == "plateau"  # a schedule that stood still would agree with anything


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-mixed", "gradient_clip_val": 0.1},
        {"precision": "64-true"},
        {"log_every_n_steps": 1},
        {"enable_progress_bar": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_trainer_options(tmp_path: Path, optimizer: str, options: dict[str, Any], capsys: Any) -> None:
    if options.get("precision") == "64-true":
        make: Any = lambda: Net64(optimizer)  # noqa: E731
    else:
        make = lambda: Net(optimizer)  # noqa: E731
    assert_same(*skipped(tmp_path, make, **options))


class Net64(Net):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return tuple(tensor.double() for tensor in batch)


@pytest.mark.parametrize("sections", [{"diagnosis": {"enabled": False}}, {"capture": {"enabled": False}}], ids=str)
def test_diagnosis_and_capture_change_nothing(tmp_path: Path, sections: dict[str, Any]) -> None:
    assert_same(*skipped(tmp_path, sections=sections, bad=(1, 2)))


@pytest.mark.parametrize("kind", ["nan", "inf", "gradient"])
def test_no_augmentation_two_epochs(tmp_path: Path, kind: str) -> None:
    data = rows(4, [1], kind)
    guarded = fit(tmp_path, Net, Samples(data, augment=False), policy(tmp_path), max_epochs=2)
    assert len(guarded.incidents) == 2
    assert_same(guarded, fit(tmp_path, Net, Samples(without(data, [1]), augment=False), max_epochs=2))


# -- global_step


@pytest.mark.parametrize(("hold", "steps"), [(False, 6), (True, 5)])
def test_global_step_counts_on_unless_held(tmp_path: Path, hold: bool, steps: int) -> None:
    guarded, reference = skipped(tmp_path, sections={"hold_global_step": hold})
    assert guarded.trainer.global_step == steps
    assert reference.trainer.global_step == 5
    assert_same(guarded, reference)


def test_max_steps_with_a_held_counter_takes_as_many_real_steps(tmp_path: Path) -> None:
    data = rows(6, [1])
    guarded = fit(tmp_path, Net, data, policy(tmp_path, hold_global_step=True), max_steps=4, max_epochs=-1)
    reference = fit(tmp_path, Net, without(data, [1]), max_steps=4, max_epochs=-1)
    assert guarded.trainer.global_step == reference.trainer.global_step == 4
    assert_same(guarded, reference)


# -- what follows a skipped batch


class Spy(Callback):
    """What other callbacks find when they are called."""

    def __init__(self) -> None:
        self.found: list[Any] = []

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.found.append(fingerprint(trainer, pl_module))


def test_validation_right_after_a_skipped_batch(tmp_path: Path) -> None:
    data, val = rows(6, [2]), rows(2)
    spy, again = Spy(), Spy()
    fit(tmp_path, Net, data, policy(tmp_path), val=val, callbacks=[spy], val_check_interval=3)
    fit(tmp_path, Net, without(data, [2])[:8], val=val, callbacks=[again])
    assert len(spy.found) == 2
    assert not differences(spy.found[0], again.found[0])
    assert spy.found[0]["attributes"][""]["training"] is False


def test_validation_at_an_epoch_end_that_was_skipped(tmp_path: Path) -> None:
    spies = Spy(), Spy()
    data, val = rows(4, [3]), rows(2)
    guarded = fit(tmp_path, Net, data, policy(tmp_path), val=val, callbacks=[spies[0]], max_epochs=2)
    reference = fit(tmp_path, Net, without(data, [3]), val=val, callbacks=[spies[1]], max_epochs=2)
    assert len(spies[0].found) == 2
    assert not differences(spies[0].found, spies[1].found)
    assert_same(guarded, reference)


@pytest.mark.parametrize("options", [{"every_n_train_steps": 1}, {"save_on_train_epoch_end": True}], ids=str)
def test_checkpoints_after_a_skipped_batch_are_finite(tmp_path: Path, options: dict[str, Any]) -> None:
    save = ModelCheckpoint(tmp_path / "ckpt", save_top_k=-1, **options)
    guarded = fit(tmp_path, Net, rows(4, [1, 3]), policy(tmp_path), callbacks=[save], enable_checkpointing=True)
    assert len(guarded.incidents) == 2
    found = sorted((tmp_path / "ckpt").glob("*.ckpt"))
    assert len(found) == (4 if "every_n_train_steps" in options else 1)
    for path in found:
        checkpoint = torch.load(path, weights_only=False)
        assert_finite(checkpoint["state_dict"])
        assert_finite(checkpoint["optimizer_states"])
        assert_finite(checkpoint["loops"])


def test_a_checkpoint_of_the_skipped_step_is_the_one_before_it(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path / "ckpt", save_top_k=-1, every_n_train_steps=1, filename="{step}")
    fit(tmp_path, lambda: Net("adam"), rows(4, [2]), policy(tmp_path), callbacks=[save], enable_checkpointing=True)
    two, three = (torch.load(tmp_path / "ckpt" / f"step={step}.ckpt", weights_only=False) for step in (2, 3))
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert not differences(two[key], three[key])


def test_early_stopping_on_a_logged_loss_does_not_see_the_batch(tmp_path: Path) -> None:
    stop = EarlyStopping("loss_epoch", check_finite=True, patience=10, check_on_train_epoch_end=True)
    guarded = fit(tmp_path, Net, rows(4, [3]), policy(tmp_path), callbacks=[stop], max_epochs=2)
    assert stop.stopped_epoch == 0
    assert guarded.trainer.current_epoch == 2


def test_the_logger_is_told_nothing_about_the_batch(tmp_path: Path) -> None:
    logger = pl.loggers.CSVLogger(tmp_path)
    fit(tmp_path, Net, rows(6, [2], "gradient"), policy(tmp_path), logger=logger, log_every_n_steps=1)
    logger.save()
    text = Path(logger.log_dir, "metrics.csv").read_text()
    assert "rare" not in text
    assert "loss_step" in text
    assert "nan" not in text


class NetWithHooks(Net):
    """Counts in the hooks around a batch, too."""

    def __init__(self) -> None:
        super().__init__("adam", "step")
        self.register_buffer("average", torch.zeros(1, 6))
        self.starts = self.ends = 0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.starts += 1
        self.draw = float(torch.rand(()))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.ends += 1
        self.average.mul_(0.9).add_(0.1 * self.head.weight.detach() * torch.rand(()))
        self.log("ends", float(self.ends), on_epoch=True, on_step=False)


@pytest.mark.parametrize("bad", [(1,), (0,), (5,), (2, 3)], ids=str)
def test_what_hooks_around_the_batch_do_is_undone_too(tmp_path: Path, bad: tuple[int, ...]) -> None:
    assert_same(*skipped(tmp_path, NetWithHooks, bad=bad, max_epochs=2))


# -- other modules


@dataclasses.dataclass
class Tracker:
    count: int = 0
    values: list[Tensor] = dataclasses.field(default_factory=list)


class Frozen(pl.LightningModule):
    """Parameters without gradients, frozen ones, sparse gradients, parameters of several groups, tied weights."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.sparse = sparse
        self.embedding = nn.Embedding(10, 4, sparse=sparse)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.out = nn.Linear(4, 10, bias=False)
        if not sparse:
            self.out.weight = self.embedding.weight
        self.tracker = Tracker()
        self.register_buffer("hidden", None)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        self.tracker.count += 1
        self.tracker.values.append(batch["scale"].sum())
        self.hidden = batch["scale"].clone()  # a buffer that is `None` at first
        out = self.out(self.frozen(self.embedding(batch["ids"])))
        loss = F.cross_entropy(out, batch["ids"]) * batch["scale"].mean()
        return {"loss": loss, "out": out.detach()}

    def configure_optimizers(self) -> Any:
        if self.sparse:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        groups = [{"params": list(self.out.parameters()), "lr": 0.1}, {"params": list(self.unused.parameters())}]
        return torch.optim.SGD(groups, lr=0.2, momentum=0.9)


def tokens(bad: tuple[int, ...]) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for position in range(20):
        scale = float("nan") if position // 4 in bad and position % 4 == 1 else 1.0
        found.append({"ids": torch.randint(10, (), generator=generator), "scale": torch.tensor(scale)})
    return found


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("bad", [(0,), (2,), (4,)], ids=str)
def test_sparse_frozen_unused_and_tied_parameters(tmp_path: Path, sparse: bool, bad: tuple[int, ...]) -> None:
    make = lambda: Frozen(sparse)  # noqa: E731
    data = tokens(bad)
    guarded = fit(tmp_path, make, loader(Samples(data, augment=False)), policy(tmp_path))
    reference = fit(tmp_path, make, loader(Samples(without(data, bad), augment=False)))
    assert [incident.cause for incident in guarded.incidents] == ["bad_input"]
    assert guarded.incidents[0].origin.tensor == 'batch["scale"]'
    assert_same(guarded, reference)


class Compiled(Net):
    """A submodule compiled, as far as this pair of versions can."""

    def __init__(self) -> None:
        super().__init__("adam")
        self.block = torch.compile(self.block, backend="eager")


def test_a_compiled_submodule(tmp_path: Path) -> None:
    guarded, reference = skipped(tmp_path, Compiled, bad=(2,))
    assert_same(guarded, reference)
    assert guarded.incidents[0].verdict == "reproduced"


# -- budget and actions


def test_consecutive_skips_beyond_the_budget_raise(tmp_path: Path) -> None:
    data = rows(6, [1, 2, 3])
    with pytest.raises(NonFiniteError) as caught:
        fit(tmp_path, Net, data, policy(tmp_path, budget={"consecutive": 2}))
    assert caught.value.incident.batch_idx == 3
    assert caught.value.incident.action == "raised"
    assert "budget of 2 skips in a row" in str(caught.value)


def test_a_healthy_step_between_resets_the_row(tmp_path: Path) -> None:
    skipped(tmp_path, bad=(0, 1, 3, 4), batches=6, sections={"budget": {"consecutive": 2}})


def test_all_skips_beyond_the_budget_raise(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="budget of 2 skips in all"):
        fit(tmp_path, Net, rows(8, [1, 3, 5, 7]), policy(tmp_path, budget={"consecutive": 1, "total": 2}))


def test_the_total_counts_over_epochs(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError) as caught:
        fit(tmp_path, Net, rows(3, [1]), policy(tmp_path, budget={"total": 2}), max_epochs=9)
    assert caught.value.incident.epoch == 2


def test_a_spent_budget_may_stop_instead(tmp_path: Path) -> None:
    data = rows(6, [1, 3])
    guarded = fit(tmp_path, Net, data, policy(tmp_path, budget={"total": 1, "then": "stop"}), max_epochs=3)
    assert [incident.action for incident in guarded.incidents] == ["skipped", "stopped"]
    assert_same(guarded, fit(tmp_path, Net, without(data[:16], [1, 3])))


@pytest.mark.parametrize("max_epochs", [1, 3])
def test_stop_ends_the_run_in_order(tmp_path: Path, max_epochs: int) -> None:
    data = rows(6, [3])
    guarded = fit(tmp_path, lambda: Net("adam"), data, policy(tmp_path, "stop"), max_epochs=max_epochs)
    assert [incident.action for incident in guarded.incidents] == ["stopped"]
    assert guarded.trainer.state.finished
    assert_same(guarded, fit(tmp_path, lambda: Net("adam"), data[:12]))


def test_record_lets_the_step_happen(tmp_path: Path) -> None:
    data = rows(4, [3])
    guarded = fit(tmp_path, Net, data, policy(tmp_path, "record"))
    assert [incident.action for incident in guarded.incidents] == ["recorded"]
    assert not any(bool(parameter.isfinite().all()) for parameter in guarded.model.parameters())
    assert_same(guarded, fit(tmp_path, Net, data))


def test_rules_choose_by_trigger_and_step(tmp_path: Path) -> None:
    rules = [{"when": {"trigger": "loss", "steps": [0, 2]}, "action": "skip_step"}, {"action": "record"}]
    guarded = fit(tmp_path, Net, rows(4, [1, 3]), policy(tmp_path, rules=rules))
    assert [incident.action for incident in guarded.incidents] == ["skipped", "recorded"]


def test_skips_are_warned_about_at_the_line_at_fault(tmp_path: Path) -> None:
    import warnings

    from trainers import make_trainer, seed

    from nanguard import NanGuard, NanGuardWarning

    seed()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        make_trainer(tmp_path, [NanGuard(policy(tmp_path))]).fit(Net(), loader(rows(4, [1])))
    about = [entry for entry in said if entry.category is NanGuardWarning]
    assert len(about) == 1
    assert about[0].filename.endswith("trainers.py")
    assert "skipped" in str(about[0].message)


def test_parameters_are_compared_at_all(tmp_path: Path) -> None:
    """The reference differs from a run that kept the batch, so agreeing with it means something."""
    data = rows(6, [2])
    healthy = rows(6)
    assert differences(fit(tmp_path, Net, healthy).fingerprint(), fit(tmp_path, Net, without(data, [2])).fingerprint())


@pytest.mark.parametrize("action", ["skip_step", "record"])
def test_gradients_that_no_optimizer_sets_to_zero(tmp_path: Path, action: str) -> None:
    """They grow from step to step, and what a batch that is left out has added to them does not stay."""

    class Partly(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(list(self.parameters())[2:], lr=0.01)

    def strays(run: Run) -> list[Any]:
        return [parameter.grad for parameter in list(run.model.parameters())[:2]]

    data = rows(6, [0, 3])
    guarded = fit(tmp_path, Partly, data, policy(tmp_path, action))
    bare = fit(tmp_path, Partly, without(data, [0, 3]) if action == "skip_step" else data)
    assert strays(bare)[0] is not None
    assert differences(dict(enumerate(strays(guarded))), dict(enumerate(strays(bare)))) == []
