"""Small modules, small data and real Trainers, and what a finished run looks like: shared by the tests of the callback."""

from __future__ import annotations

import logging
import random
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import CatMetric, MeanMetric

from nanguard import NanGuard, NanGuardWarning, Policy

for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
    logging.getLogger(name).setLevel(logging.ERROR)

torch.set_num_threads(1)  # on models as small as these, threads cost ten times what they save

BATCH = 4
RARE = 7.0  # the target of a sample for which the module logs a key that no other sample logs


# -- data


class Samples(Dataset):
    """Rows of (x, y, flag), augmented at random while they are fetched."""

    def __init__(self, rows: Sequence[Any], augment: bool = True) -> None:
        self.rows = list(rows)
        self.augment = augment

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        if not self.augment:
            return self.rows[index]
        x, y, flag = self.rows[index]
        x = x + 0.01 * torch.randn(4) + 0.01 * random.random() + 0.01 * float(np.random.rand())
        return x, y, flag


def rows(batches: int = 6, bad: Iterable[int] = (), kind: str = "nan") -> list[tuple[Tensor, Tensor, Tensor]]:
    """Samples for so many batches; in each of the `bad` batches one sample makes the step non-finite.

    ``kind``: ``nan`` and ``inf`` stand in the input, ``gradient`` makes a finite loss with a non-finite gradient.
    """
    generator = torch.Generator().manual_seed(5)
    found = []
    for position in range(batches * BATCH):
        x, y, flag = torch.randn(4, generator=generator), torch.rand(1, generator=generator), torch.ones(1)
        if position // BATCH in set(bad) and position % BATCH == 2:
            y = torch.tensor([RARE])
            if kind == "gradient":
                flag = torch.zeros(1)
            else:
                x = torch.full((4,), float(kind))
        found.append((x, y, flag))
    return found


def without(samples: list[Any], bad: Iterable[int]) -> list[Any]:
    """The same samples as if the bad batches had never been in the data."""
    dropped = set(bad)
    return [sample for position, sample in enumerate(samples) if position // BATCH not in dropped]


# -- a module with every kind of state


class Helper:
    """An object of the user's own."""

    def __init__(self) -> None:
        self.calls = 0
        self.notes: list[float] = []
        self.table = {"last": torch.zeros(2)}

    def note(self, x: Tensor) -> None:
        self.calls += 1
        self.notes.append(float(x.sum()))
        self.table["last"] = x.detach().flatten()[:2].clone()


class Block(nn.Module):
    """A submodule with a counter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.2)
        self.forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        return self.drop(self.norm(self.linear(x)))


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adam-fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "adam-loop": lambda p: torch.optim.Adam(p, lr=0.01, foreach=False),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.05),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3, history_size=4),
}

SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], dict[str, Any]]] = {
    "step": lambda o: {"scheduler": torch.optim.lr_scheduler.StepLR(o, 2, 0.5), "interval": "step"},
    "epoch": lambda o: {"scheduler": torch.optim.lr_scheduler.StepLR(o, 1, 0.5), "interval": "epoch"},
    "onecycle": lambda o: {
        "scheduler": torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=30),
        "interval": "step",
    },
    "plateau": lambda o: {
        "scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
        "interval": "epoch",
        "monitor": "loss",
    },
}


class Net(pl.LightningModule):
    """Counts, draws, logs and accumulates in every way that a module can."""

    def __init__(self, optimizer: str = "sgd", schedule: str | None = None) -> None:
        super().__init__()
        self.optimizer_name, self.schedule_name = optimizer, schedule
        self.block = Block()
        self.head = nn.Linear(6, 1)
        self.register_buffer("ema", torch.zeros(4))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.seen = 0
        self.history: list[float] = []
        self.recent: deque[float] = deque(maxlen=3)
        self.tally: dict[str, Any] = {"sum": 0.0, "list": []}
        self.kinds: set[int] = set()
        self.last = torch.zeros(4)
        self.array = np.zeros(2)
        self.helper = Helper()
        self.own_torch = torch.Generator().manual_seed(3)
        self.own_python = random.Random(3)
        self.own_numpy = np.random.default_rng(3)
        self.mean = MeanMetric(nan_strategy="disable")
        self.logged = MeanMetric(nan_strategy="disable")
        self.cat = CatMetric(nan_strategy="disable")

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.optimizer_name](self.parameters())
        if self.schedule_name is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": SCHEDULES[self.schedule_name](optimizer)}

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x))

    def remember(self, x: Tensor, y: Tensor) -> None:
        """Leaves the batch's mark wherever a module can."""
        self.ema = 0.9 * self.ema + 0.1 * x.mean(0).detach()  # assigned, not written into
        self.steps += 1
        self.seen += len(x)
        self.history.append(float(x.sum()))
        self.recent.append(float(x[0, 0]))
        self.tally["sum"] += float(y.sum())
        self.tally["list"].append(len(self.history))
        self.tally[f"key {len(self.history)}"] = True
        self.kinds.add(int(y.max() * 1000))
        self.last = x[0].detach().clone()
        self.array += x[0, :2].detach().double().numpy()
        self.helper.note(x)
        self.surprise = self.own_python.random()  # an attribute that is born in the step
        self.tally["drawn"] = float(torch.rand((), generator=self.own_torch)) + self.own_numpy.random()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, flag = batch
        x = x + 0.01 * torch.randn_like(x) * random.random() * float(np.random.rand())
        self.remember(x, y)
        out = self(x)
        loss = F.mse_loss(out.float(), y) + 0.1 * (out * flag).pow(2).sum(1).sqrt().mean()
        self.mean.update(loss.detach())
        self.cat.update(out.detach().float().mean())
        self.logged(out.detach().float())
        self.log("logged", self.logged, on_step=False, on_epoch=True)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("highest", y.max(), on_epoch=True, on_step=False, reduce_fx="max")
        if bool((y == RARE).any()):
            self.log("rare", loss, on_epoch=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("mean", self.mean.compute())
        self.mean.reset()
        self.cat.reset()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y, _ = batch
        self.log("val_loss", F.mse_loss(self(x), y))


# -- runs


def make_trainer(tmp: Path, callbacks: Any = (), **options: Any) -> pl.Trainer:
    """A quiet Trainer on the CPU that writes only below `tmp`."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": str(tmp),
    }
    return pl.Trainer(
        **{**settings, **options}, callbacks=list(callbacks) if not isinstance(callbacks, list) else callbacks
    )


def policy(tmp: Path, action: str = "skip_step", **sections: Any) -> Policy:
    """One action for every incident, captures below `tmp`, the stabiliser off unless a section says otherwise."""
    data: dict[str, Any] = {
        "rules": [{"action": action}],
        "stabilize": {"enabled": False},
        "capture": {"directory": tmp / "captures"},
    }
    for name, section in sections.items():
        data[name] = (
            {**data[name], **section} if isinstance(section, dict) and isinstance(data.get(name), dict) else section
        )
    return Policy(**data)


def seed(number: int = 11) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def loader(samples: Any, **options: Any) -> DataLoader:
    data = samples if isinstance(samples, Dataset) else Samples(samples)
    return DataLoader(data, **{"batch_size": BATCH, **options})


@dataclass
class Run:
    """A finished fit.

    Attributes:
        epochs: what was there when each epoch ended, before the epoch's metrics were reset.
    """

    trainer: pl.Trainer
    model: Any
    guard: NanGuard | None
    epochs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def incidents(self) -> list[Any]:
        return self.guard.incidents if self.guard is not None else []

    def fingerprint(self) -> dict[str, Any]:
        return {"end": fingerprint(self.trainer, self.model), "epochs": self.epochs}


class Recorder(Callback):
    """Takes a fingerprint when an epoch ends."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, Any]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.epochs.append(fingerprint(trainer, pl_module, deep=True))


def fit(
    tmp: Path,
    make: Callable[[], Any],
    train: Any,
    guard: NanGuard | Policy | None = None,
    *,
    val: Any = None,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> Run:
    """Seeds everything, makes the module, fits it.

    Args:
        tmp: where files go.
        make: makes the module.
        train: a list of samples, a dataset or a loader.
        guard: the guard, a policy for one, or none.
        val: the same as `train`, for validation.
        callbacks: more callbacks.
        options: of the Trainer.
    """
    seed()
    model = make()
    guard = NanGuard(guard) if isinstance(guard, Policy) else guard
    recorder = Recorder()
    guards = [] if guard is None else [guard]
    trainer = make_trainer(tmp, [recorder, *guards, *callbacks], **options)
    train, val = (
        data if data is None or not isinstance(data, (list, Dataset)) else loader(data) for data in (train, val)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NanGuardWarning)
        trainer.fit(model, train, val)
    return Run(trainer, model, guard, recorder.epochs)


# -- fingerprints

_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_LIGHTNING = frozenset(pl.LightningModule().__dict__) | {"_compiler_ctx"}


def fingerprint(trainer: Any, model: Any, deep: bool = False) -> dict[str, Any]:
    """Everything that a step can change, copied: equal for two runs only if they are the same run, bit for bit."""
    found: dict[str, Any] = {
        "parameters": dict(model.named_parameters()),
        "buffers": dict(model.named_buffers()),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "metrics": dict(trainer.callback_metrics),
        "precision": trainer.precision_plugin.state_dict(),
        "attributes": {name: _attributes(module) for name, module in model.named_modules()},
        "rng": rng(),
    }
    if deep:  # what self.log has accumulated so far
        results = trainer.fit_loop.epoch_loop._results
        kept = ("value", "cumulated_batch_size")
        found["results"] = {key: {name: vars(metric).get(name) for name in kept} for key, metric in results.items()}
    return frozen(found)


def rng() -> dict[str, Any]:
    return {"python": random.getstate(), "numpy": np.random.get_state(legacy=False), "torch": torch.get_rng_state()}


def _attributes(module: nn.Module) -> dict[str, Any]:
    skip = (_LIGHTNING | set(nn.Module().__dict__) | {"_torchdynamo_wrapper_id"}) - {"training"}
    return {name: value for name, value in vars(module).items() if name not in skip and not callable(value)}


def frozen(value: Any) -> Any:
    """A copy in which nothing moves any more, and that can be compared."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, dict):
        return {key: frozen(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return [frozen(entry) for entry in value]
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        return frozen(value.getstate())
    if isinstance(value, np.random.Generator):
        return frozen(value.bit_generator.state)
    if isinstance(value, (*_PLAIN, torch.dtype, torch.device, np.generic)):
        return value
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=repr)
    if type(value).__module__ == __name__ or type(value).__module__.startswith("test_"):
        return frozen(vars(value))
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return type(value).__qualname__


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    """Where two fingerprints differ; NaN equals NaN, and 0.0 does not equal -0.0."""
    if type(one) is not type(other):
        return [f"{place}: {type(one).__name__} is not {type(other).__name__}"]
    if isinstance(one, Tensor):
        return [] if _same_bits(one, other) else [f"{place}: {one} is not {other}"]
    if isinstance(one, np.ndarray):
        return (
            [] if one.dtype == other.dtype and one.tobytes() == other.tobytes() else [f"{place}: {one} is not {other}"]
        )
    if isinstance(one, dict):
        found = [f"{place}.{key}: only in one" for key in set(one) ^ set(other)]
        return found + [
            line for key in one if key in other for line in differences(one[key], other[key], f"{place}.{key}")
        ]
    if isinstance(one, list):
        if len(one) != len(other):
            return [f"{place}: {len(one)} entries are not {len(other)}"]
        return [
            line for i, pair in enumerate(zip(one, other, strict=True)) for line in differences(*pair, f"{place}[{i}]")
        ]
    if isinstance(one, float):
        return [] if repr(one) == repr(other) else [f"{place}: {one} is not {other}"]
    return [] if one == other else [f"{place}: {one!r} is not {other!r}"]


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype or one.layout != other.layout:
        return False
    if one.layout is torch.sparse_coo:
        one, other = one.to_dense(), other.to_dense()
    if not one.is_floating_point():
        return torch.equal(one, other)
    return torch.equal(one.nan_to_num(nan=0.5), other.nan_to_num(nan=0.5)) and torch.equal(one.isnan(), other.isnan())


def assert_same(one: Run, other: Run) -> None:
    """Asserts that two runs ended alike in everything."""
    found = differences(one.fingerprint(), other.fingerprint())
    assert not found, "\n".join(found[:12])


def assert_finite(state: Any) -> None:
    """Asserts that every tensor in a nested state is finite."""
    bad = [
        place for place, tensor in _tensors(state) if tensor.is_floating_point() and not bool(tensor.isfinite().all())
    ]
    assert not bad, bad


def _tensors(state: Any, place: str = "") -> list[tuple[str, Tensor]]:
    if isinstance(state, Tensor):
        return [(place, state)]
    if isinstance(state, dict):
        return [pair for key, value in state.items() for pair in _tensors(value, f"{place}.{key}")]
    if isinstance(state, (list, tuple)):
        return [pair for i, value in enumerate(state) for pair in _tensors(value, f"{place}[{i}]")]
    return []


def copied(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a module's parameters and buffers."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
