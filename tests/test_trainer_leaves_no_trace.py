"""After a fit, however it ended, the Trainer, the module, the loaders and torch are as they were found."""

from __future__ import annotations

import copy
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from trainers import Net, Samples, assert_same, differences, fit, frozen, loader, make_trainer, policy, rows, seed

from nanguard import NanGuard, NanGuardError, NanGuardWarning, NonFiniteError

pytestmark = pytest.mark.filterwarnings("ignore::nanguard.NanGuardWarning")


# -- what there is to find


def surroundings(trainer: pl.Trainer, model: Any, train: Any) -> dict[str, Any]:
    """Everything that a guard touches while it is at work."""
    hooks = torch.nn.modules.module
    return {
        "callbacks": (id(trainer.callbacks), [id(callback) for callback in trainer.callbacks]),
        "plugin": _own(trainer.precision_plugin),
        "strategy": _own(trainer.strategy),
        "fit_loop": _own(trainer.fit_loop),
        "epoch_loop": _own(trainer.fit_loop.epoch_loop),
        "val_loop": _own(trainer.fit_loop.epoch_loop.val_loop),
        "trainer": _own(trainer),
        "module": _own(model),
        "submodules": [sorted(vars(module)) for module in model.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "global hooks": [len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks)],
        "loader": {name: id(value) for name, value in vars(train).items() if "sampler" in name},
        "schedulers": [config.interval for config in trainer.lr_scheduler_configs],
        "filters": list(warnings.filters),
        "modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "grad": torch.is_grad_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
        "anomaly": torch.is_anomaly_enabled(),
        "stance": _stance(),
        "dtype": torch.get_default_dtype(),
        "path": list(sys.path),
    }


def _own(thing: Any) -> dict[str, Any]:
    """The names in an object, and what is callable in it: that is where a wrapper would hide."""
    return {
        name: id(value) if callable(value) and not isinstance(value, type) else None
        for name, value in vars(thing).items()
    }


def _stance() -> str:
    from torch._dynamo import eval_frame

    return repr(eval_frame._stance.stance)


class Watcher(Callback):
    """Looks once before the guard begins and once when the fit is under way."""

    def __init__(self, train: Any) -> None:
        self.train = train
        self.before: dict[str, Any] = {}
        self.under_way: list[str] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not self.before:
            self.before = {"callbacks": surroundings(trainer, pl_module, self.train)["callbacks"]}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.under_way = [type(callback).__name__ for callback in trainer.callbacks]


def left_behind(tmp: Path, make: Callable[[], Any], train: Any, guarded: bool, action: str, **options: Any) -> Any:
    """What there is after a fit, and how it ended."""
    seed()
    watcher, guard, model = Watcher(train), NanGuard(policy(tmp, action)), make()
    others = [watcher, *([guard] if guarded else []), *options.pop("callbacks", [])]
    trainer = make_trainer(tmp, others, **options)
    before = surroundings(trainer, model, train)
    ended: Any = None
    try:
        trainer.fit(model, train)
    except BaseException as error:
        ended = type(error)
    after = surroundings(trainer, model, train)
    assert after["callbacks"] == before["callbacks"] == watcher.before["callbacks"]
    for key in (
        "loader",
        "filters",
        "modes",
        "dispatch modes",
        "grad",
        "autocast",
        "anomaly",
        "stance",
        "dtype",
        "path",
    ):
        assert after[key] == before[key], key
    if guarded:
        assert guard._session is None
        if watcher.under_way:
            assert watcher.under_way[0] == "NanGuard"
        assert set(vars(guard)) - {"log", "log_dict"} == set(vars(NanGuard(policy(tmp))))  # these two are Lightning's
    shapes = {key: frozen_names(after[key]) for key in after if key not in ("callbacks", "loader")}
    return shapes, ended


def frozen_names(value: Any) -> Any:
    """Names without the identities, which differ between two runs."""
    return sorted(value) if isinstance(value, dict) else value


def agrees(
    tmp: Path, make: Callable[[], Any], data: Callable[[], Any], ended: Any, action: str = "raise", **options: Any
) -> None:
    """Asserts that a guarded run leaves behind what a run without the guard does."""
    guarded = left_behind(tmp, make, loader(data()), True, action, **options)
    assert guarded[1] is ended
    if ended is NonFiniteError or action != "raise":
        return  # nothing to compare with: without the guard the run goes on
    assert guarded == left_behind(tmp, make, loader(data()), False, action, **options)


# -- all the ways in which a fit ends


class StepFails(Net):
    failure: type[BaseException] = RuntimeError

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 2:
            raise self.failure("in the step")
        return super().training_step(batch, batch_idx)


class Interrupted(StepFails):
    failure = KeyboardInterrupt


class BackwardFails(Net):
    def on_after_backward(self) -> None:
        raise ValueError("after the backward pass")


class BadDataset(Samples):
    def __getitem__(self, index: int) -> Any:
        if index == 9:
            raise KeyError("in the dataset")
        return super().__getitem__(index)


class BadSetup(Callback):
    def setup(self, *_: Any, **__: Any) -> None:
        raise OSError("in the setup of another callback")


class BadStart(Callback):
    def on_fit_start(self, *_: Any) -> None:
        raise OSError("at the start")


class BadEnd(Callback):
    def on_train_end(self, *_: Any) -> None:
        raise OSError("at the end")


@pytest.mark.parametrize("action", ["raise", "skip_step"])
@pytest.mark.parametrize("schedule", [None, "step"])
def test_after_a_fit(tmp_path: Path, action: str, schedule: str | None) -> None:
    agrees(tmp_path, lambda: Net("adam", schedule), lambda: rows(4), None, action, max_epochs=2)


def test_after_a_fit_that_left_nothing_out_and_validated(tmp_path: Path) -> None:
    agrees(tmp_path, lambda: Net("adam", "step"), lambda: rows(4), None)


@pytest.mark.parametrize("bad", [0, 2, 3])
def test_after_skips(tmp_path: Path, bad: int) -> None:
    skipped = left_behind(tmp_path, lambda: Net("adam", "step"), loader(rows(4, [bad])), True, "skip_step")
    healthy = left_behind(tmp_path, lambda: Net("adam", "step"), loader(rows(4)), False, "raise")
    assert skipped == healthy


@pytest.mark.parametrize(
    ("make", "ended"),
    [(StepFails, RuntimeError), (Interrupted, SystemExit), (BackwardFails, ValueError)],
)
def test_after_an_error_in_the_module(tmp_path: Path, make: Any, ended: Any) -> None:
    agrees(tmp_path, make, lambda: rows(4), ended)


def test_after_an_error_in_the_dataset(tmp_path: Path) -> None:
    agrees(tmp_path, Net, lambda: BadDataset(rows(4)), KeyError)


@pytest.mark.parametrize("bad", [BadSetup, BadStart, BadEnd])
def test_after_an_error_in_another_callback(tmp_path: Path, bad: Any) -> None:
    agrees(tmp_path, Net, lambda: rows(4), OSError, callbacks=[bad()])


@pytest.mark.parametrize("kind", ["nan", "gradient"])
@pytest.mark.parametrize("optimizer", ["sgd", "lbfgs"])
def test_after_raising(tmp_path: Path, kind: str, optimizer: str) -> None:
    raised = left_behind(tmp_path, lambda: Net(optimizer), loader(rows(4, [2], kind)), True, "raise")
    failed = left_behind(tmp_path, lambda: StepFails(optimizer), loader(rows(4)), False, "raise")
    assert raised[1] is NonFiniteError
    assert raised[0] == failed[0]


def test_after_an_error_right_after_a_skip(tmp_path: Path) -> None:
    class Fails(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                raise OSError("after the skipped batch")

    model = Net("adam", "step")
    train = loader(rows(4, [2]))
    found = left_behind(tmp_path, lambda: model, train, True, "skip_step", callbacks=[Fails()])
    reference = left_behind(tmp_path, lambda: Net("adam", "step"), loader(rows(4)), False, "raise", callbacks=[Fails()])
    assert found == reference
    assert all(bool(buffer.isfinite().all()) for buffer in model.buffers())


# -- used again


def test_a_second_fit_of_the_same_trainer(tmp_path: Path) -> None:
    def twice(guards: list[Any]) -> Any:
        seed()
        model, trainer = Net("adam", "step"), make_trainer(tmp_path, guards, max_epochs=1)
        trainer.fit(model, loader(rows(3)))
        trainer.fit_loop.max_epochs = 2
        trainer.fit(model, loader(rows(4)))
        return {name: frozen(value) for name, value in model.state_dict().items()}

    guard = NanGuard(policy(tmp_path))
    assert not differences(twice([guard]), twice([]))
    assert guard.incidents == []


def test_a_second_trainer_and_the_same_list(tmp_path: Path) -> None:
    guard = NanGuard(policy(tmp_path))
    callbacks = [EarlyStopping("loss", patience=9), guard]
    for number in (1, 2, 3):
        trainer = make_trainer(tmp_path, callbacks)
        trainer.fit(Net(), loader(rows(4, [1])))
        assert len(guard.incidents) == number
        assert sum(callback is guard for callback in trainer.callbacks) >= 1
    assert [incident.batch_idx for incident in guard.incidents] == [1, 1, 1]


def test_again_after_it_raised(tmp_path: Path) -> None:
    guard = NanGuard(policy(tmp_path, "raise"))
    for _ in range(2):
        with pytest.raises(NonFiniteError):
            fit(tmp_path, Net, rows(4, [1]), guard)
    fit(tmp_path, Net, rows(4), guard)
    assert len(guard.incidents) == 2


def test_the_budget_is_that_of_a_run(tmp_path: Path) -> None:
    guard = NanGuard(policy(tmp_path, budget={"total": 1}))
    fit(tmp_path, Net, rows(4, [1]), guard)
    fit(tmp_path, Net, rows(4, [1]), guard)
    assert [incident.action for incident in guard.incidents] == ["skipped", "skipped"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda guard: pickle.loads(pickle.dumps(guard))])
def test_copies(tmp_path: Path, copied: Any) -> None:
    guard = NanGuard(policy(tmp_path))
    fit(tmp_path, Net, rows(4, [1]), guard)
    again = copied(guard)
    assert again.policy == guard.policy
    assert again.incidents == guard.incidents
    run = fit(tmp_path, Net, rows(4, [2]), again)
    assert [incident.batch_idx for incident in run.incidents] == [1, 2]
    assert len(guard.incidents) == 1


def test_a_copy_made_while_fitting(tmp_path: Path) -> None:
    class Copies(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.copy = pickle.loads(pickle.dumps(trainer.callbacks[0]))

    copies = Copies()
    fit(tmp_path, Net, rows(2), policy(tmp_path), callbacks=[copies])
    assert isinstance(copies.copy, NanGuard)
    assert copies.copy._session is None
    assert not any(
        isinstance(getattr(value, "__self__", value), pl.LightningModule) for value in vars(copies.copy).values()
    )


# -- in company


def order(tmp: Path, others: list[Callback], **options: Any) -> tuple[list[str], NanGuard]:
    """The names of the callbacks while fitting, in order."""
    train = loader(rows(4, [2]))
    watcher, guard = Watcher(train), NanGuard(policy(tmp))
    trainer = make_trainer(tmp, [*others, watcher, guard], **options)
    before = list(trainer.callbacks)
    trainer.fit(Net("sgd"), train, loader(rows(2)))
    assert [id(callback) for callback in trainer.callbacks] == [id(callback) for callback in before]
    return watcher.under_way, guard


def test_beside_the_usual_callbacks(tmp_path: Path, capsys: Any) -> None:
    others = [
        EarlyStopping("val_loss", patience=9),
        ModelCheckpoint(tmp_path / "c", monitor="val_loss"),
        LearningRateMonitor(),
        StochasticWeightAveraging(0.01, swa_epoch_start=1),
        RichProgressBar(),
    ]
    names, guard = order(
        tmp_path,
        others,
        logger=CSVLogger(tmp_path),
        max_epochs=3,
        enable_checkpointing=True,
        enable_progress_bar=True,
    )
    assert names[0] == "NanGuard"
    assert names[-1] == "ModelCheckpoint"
    # The last epoch is the one in which StochasticWeightAveraging gathers the statistics of BatchNorm.
    assert [incident.epoch for incident in guard.incidents] == [0, 1, 2, 3]
    assert guard.incidents[-1].trigger == "parameters"


class Tuned(Net):
    """Has what the tuners tune."""

    def __init__(self) -> None:
        super().__init__("sgd")
        self.batch_size, self.lr = 2, 0.05

    def train_dataloader(self) -> Any:
        return loader(rows(6), batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return loader(rows(1))


@pytest.mark.parametrize(
    "tuner",
    [
        lambda: BatchSizeFinder(mode="power", steps_per_trial=1, max_trials=2, init_val=2),
        lambda: LearningRateFinder(num_training_steps=3, update_attr=True),
    ],
)
def test_after_the_tuners(tmp_path: Path, tuner: Any) -> None:
    class Learning(Tuned):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    train = loader(rows(2))
    watcher, guard, tuned = Watcher(train), NanGuard(policy(tmp_path)), tuner()
    trainer = make_trainer(tmp_path, [watcher, guard, tuned])
    before = [id(callback) for callback in trainer.callbacks]
    trainer.fit(Learning())
    assert watcher.under_way[:2] == [type(tuned).__name__, "NanGuard"]
    assert [id(callback) for callback in trainer.callbacks] == before
    assert guard.incidents == []


def test_two_guards_are_one_too_many(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [NanGuard(policy(tmp_path)), NanGuard(policy(tmp_path))])
    with pytest.raises(NanGuardError, match="more than one NanGuard"):
        trainer.fit(Net(), loader(rows(2)))
    assert "train_step_context" not in vars(trainer.precision_plugin)


def test_the_list_changed_meanwhile(tmp_path: Path) -> None:
    class Late(Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.callbacks = [*trainer.callbacks, Callback()]

    late, guard = Late(), NanGuard(policy(tmp_path))
    trainer = make_trainer(tmp_path, [late, guard])
    trainer.fit(Net(), loader(rows(2)))
    assert trainer.callbacks[:2] == [late, guard]
    assert len(trainer.callbacks) == 3


def test_other_stages_do_not_see_the_guard(tmp_path: Path) -> None:
    guard = NanGuard(policy(tmp_path))
    trainer = make_trainer(tmp_path, [guard])
    model = Net()
    before = surroundings(trainer, model, loader(rows(1)))["callbacks"]
    trainer.validate(model, loader(rows(2, [1])), verbose=False)
    assert guard.incidents == []
    assert surroundings(trainer, model, loader(rows(1)))["callbacks"] == before


# -- captures that cannot be written


@pytest.fixture
def said() -> Any:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield found


def test_an_unwritable_directory_is_told_once_and_the_run_goes_on(tmp_path: Path, said: Any) -> None:
    (tmp_path / "file").write_text("in the way")
    guard = NanGuard(policy(tmp_path, capture={"directory": tmp_path / "file" / "captures"}))
    trainer = make_trainer(tmp_path, [guard])
    trainer.fit(Net(), loader(rows(6, [1, 3, 5])))
    assert [incident.capture for incident in guard.incidents] == [None] * 3
    told = [str(w.message) for w in said if w.category is NanGuardWarning and "the run goes on" in str(w.message)]
    assert len(told) == 1
    assert str(tmp_path / "file") in told[0]


def test_an_unwritable_directory_does_not_hide_the_error(tmp_path: Path, said: Any) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(NonFiniteError) as caught:
        fit(tmp_path, Net, rows(3, [1]), policy(tmp_path, "raise", capture={"directory": tmp_path / "file" / "c"}))
    assert caught.value.incident.capture is None
    assert caught.value.incident.cause == "bad_input"


def test_a_full_directory_is_told_once(tmp_path: Path, said: Any) -> None:
    guard = NanGuard(policy(tmp_path, capture={"max_count": 1}))
    make_trainer(tmp_path, [guard]).fit(Net(), loader(rows(6, [1, 3, 5])))
    assert [incident.capture is not None for incident in guard.incidents] == [True, False, False]
    assert len(list((tmp_path / "captures").iterdir())) == 1
    told = [str(w.message) for w in said if w.category is NanGuardWarning and "the run goes on" in str(w.message)]
    assert len(told) == 1


def test_a_guarded_run_equals_itself(tmp_path: Path) -> None:
    runs = [fit(tmp_path, Net, rows(4, [1]), policy(tmp_path)) for _ in range(2)]
    assert_same(*runs)
