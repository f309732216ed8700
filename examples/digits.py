"""Four acts with real images: a run dies, survives, survives bad data, and its failures are replayed.

Run it with `make demo`, or `python examples/digits.py --help`. It needs no network and about half a minute.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from _stage import Stage, told
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from rich.console import Console
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import nanguard
from nanguard import NanGuard

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
# Index in the training data -> what one of the image's 64 pixels becomes.
CORRUPTED = {1000: float("nan"), 3000: float("inf"), 5000: 1e30}
ENOUGH = 0.95
OVERFLOW = 88.7  # exp of more than this is infinite in single precision
MOST = 20  # failed steps that are kept, as many as the policy captures


class SquaredReLU(nn.Module):
    """The activation of the Primer models: the square of a ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        """Squares what is positive."""
        return x.relu().square()


class Digits(pl.LightningModule):
    """A small convolutional network whose loss is written out by hand, as in thousands of tutorials."""

    def __init__(self, lr: float = 0.02) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), SquaredReLU(), nn.BatchNorm2d(16)),
            *(nn.Conv2d(16, 32, 3, padding=1), SquaredReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(32)),
            *(nn.Flatten(), nn.Linear(512, 64), SquaredReLU(), nn.Linear(64, 10)),
        )

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Softmax, the probability of the right class, its logarithm, the mean."""
        images, labels = batch
        exponentials = torch.exp(self.net(images))
        probabilities = exponentials / exponentials.sum(1, keepdim=True)
        picked = probabilities[torch.arange(len(labels)), labels]
        return -torch.log(picked).mean()

    def configure_optimizers(self) -> dict[str, Any]:
        """SGD with momentum, one cycle of the learning rate."""
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Watch(Callback):
    """Takes notes for the report; changes nothing."""

    def __init__(self) -> None:
        self.peak = 0.0  # the largest finite logit
        self.first_bad: int | None = None  # the first step whose loss is not finite
        self.failed: dict[int, dict[str, Tensor]] = {}  # gradients of the steps that failed
        self._loss: Tensor | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Looks at every logit that comes out of the network."""
        pl_module.net.register_forward_hook(self._look)

    def _look(self, _net: nn.Module, _args: Any, logits: Tensor) -> None:
        if torch.isfinite(logits).all():
            self.peak = max(self.peak, float(logits.detach().abs().max()))

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Notes the first loss that is not finite."""
        self._loss = loss.detach()
        if self.first_bad is None and not torch.isfinite(loss):
            self.first_bad = trainer.global_step

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keeps the gradients of a failed step, to compare them with those of its replay."""
        if self._loss is not None and not torch.isfinite(self._loss) and len(self.failed) < MOST:
            named = ((name, parameter.grad) for name, parameter in pl_module.named_parameters())
            self.failed[trainer.global_step] = {name: grad.clone() for name, grad in named if grad is not None}


@dataclass
class Run:
    """What a run of the training came to."""

    module: Digits
    watch: Watch
    seconds: float
    checkpoint: Path


def load_data(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """The 1,797 handwritten digits, pixels from 0 to 16: for training also moved by one pixel each way; and for testing."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None]
    labels = torch.tensor(digits.target)
    rows = train_test_split(range(len(labels)), test_size=360, stratify=digits.target, random_state=seed)
    train, test = (torch.tensor(part) for part in rows)
    padded = nn.functional.pad(images[train], (1, 1, 1, 1))
    moves = ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2))
    moved = torch.cat([padded[:, :, y : y + 8, x : x + 8] for y, x in moves])
    return TensorDataset(moved, labels[train].repeat(len(moves))), TensorDataset(images[test], labels[test])


def corrupt(data: TensorDataset) -> TensorDataset:
    """A copy with three bad images, as a broken download or a division in the preprocessing leaves them."""
    images, labels = data.tensors
    images = images.clone()
    for index, value in CORRUPTED.items():
        images[index, 0, 3, 4] = value
    return TensorDataset(images, labels)


def train(data: TensorDataset, options: argparse.Namespace, folder: Path, guard: NanGuard | None = None) -> Run:
    """An ordinary Lightning run; the only difference between the acts is the guard."""
    pl.seed_everything(options.seed, verbose=False)
    watch, checkpoint = Watch(), ModelCheckpoint(folder, filename="{epoch}-{step}")
    terminal = sys.stdout.isatty()
    trainer = pl.Trainer(
        max_epochs=options.epochs,
        accelerator="cpu",
        callbacks=[watch, checkpoint, *([guard] if guard else []), *([RichProgressBar()] if terminal else [])],
        enable_progress_bar=terminal,  # a log file is no place for a progress bar
        enable_model_summary=False,
        logger=False,
    )
    module = Digits()
    start = time.perf_counter()
    trainer.fit(module, DataLoader(data, batch_size=16, shuffle=True))
    return Run(module, watch, time.perf_counter() - start, Path(checkpoint.best_model_path))


@torch.no_grad()
def accuracy(module: Digits, data: TensorDataset) -> float:
    """The share of the test images that are told right."""
    images, labels = data.tensors
    return float((module.eval().net(images).argmax(1) == labels).float().mean())


def count_nonfinite(tensors: Iterable[Tensor]) -> tuple[int, int]:
    """How many of all numbers are NaN or infinite."""
    tensors = [tensor for tensor in tensors if tensor.is_floating_point()]
    return sum(int((~torch.isfinite(t)).sum()) for t in tensors), sum(t.numel() for t in tensors)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits; NaN compares like any other."""
    return a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))


def unguarded(
    stage: Stage, options: argparse.Namespace, data: TensorDataset, test: TensorDataset, folder: Path
) -> None:
    stage.title(
        "Act 1: the run as it is",
        "The loss computes a softmax by hand. Nothing is wrong with the data; the network only becomes confident.",
    )
    run = train(data, options, folder / "unguarded")
    bad, total = count_nonfinite(run.module.parameters())
    step, steps, score = run.watch.first_bad, run.module.trainer.global_step, accuracy(run.module, test)
    stage.check(run.watch.peak > OVERFLOW, f"a logit reached {run.watch.peak:.1f}; exp overflows above {OVERFLOW}")
    stage.check(step is not None, f"the loss stopped being finite at step {step}, and the run went on to step {steps}")
    stage.check(bad > total / 2, f"the weights are gone: {bad:,} of {total:,} parameters are NaN")
    stage.check(score < ENOUGH, f"test accuracy {score:.1%}")
    stage.rows.append(("1 unguarded", f"NaN at step {step}", str(steps), f"{score:.1%}", "-", f"{run.seconds:.1f} s"))


def guarded(stage: Stage, options: argparse.Namespace, data: TensorDataset, test: TensorDataset, folder: Path) -> None:
    stage.title(
        "Act 2: the same code, guarded",
        'One line more: Trainer(callbacks=[NanGuard("configs/default.yaml")]). The loss is computed stably while it runs.',
    )
    guard = NanGuard(CONFIGS / "default.yaml", captures=options.captures)
    with told(stage):
        run = train(data, options, folder / "guarded", guard)
    steps, score = run.module.trainer.global_step, accuracy(run.module, test)
    places = sorted({f"{Path(swap.file).name}:{swap.line}" for swap in guard.swaps})
    stage.check(run.watch.peak > OVERFLOW, f"a logit reached {run.watch.peak:.1f} here, too")
    stage.check(run.watch.first_bad is None and not guard.incidents, f"all {steps} losses were finite")
    stage.check(bool(places), f"nanguard named the lines to change: {', '.join(places)}")
    stage.check(score > ENOUGH, f"test accuracy {score:.1%}")
    stage.rows.append(
        ("2 guarded", "finished", str(steps), f"{score:.1%}", str(len(guard.incidents)), f"{run.seconds:.1f} s")
    )


def corrupted(
    stage: Stage, options: argparse.Namespace, data: TensorDataset, test: TensorDataset, folder: Path
) -> tuple[NanGuard, Run]:
    values = ", ".join(f"{value:g}" for value in CORRUPTED.values())
    stage.title(
        "Act 3: three bad images among the data",
        f"In three of {len(data):,} training images one pixel is {values}. configs/survive.yaml leaves such batches out.",
    )
    guard = NanGuard(CONFIGS / "survive.yaml", captures=options.captures)
    with told(stage):
        run = train(corrupt(data), options, folder / "corrupted", guard)
    named = sorted({index for incident in guard.incidents for index in incident.dataset_indices or ()})
    loaded = Digits.load_from_checkpoint(run.checkpoint)
    steps, score = run.module.trainer.global_step, accuracy(loaded, test)
    bad_buffers, buffers = count_nonfinite(run.module.buffers())
    bad_saved, saved = count_nonfinite(loaded.state_dict().values())
    expected = len(CORRUPTED) * options.epochs
    stage.check(len(guard.incidents) == expected, f"{len(guard.incidents)} incidents in {options.epochs} epoch(s)")
    stage.check(named == sorted(CORRUPTED), f"they name the images {', '.join(map(str, named))}, and no other")
    stage.check(bad_buffers == 0, f"BatchNorm statistics: {bad_buffers} of {buffers} numbers are not finite")
    stage.check(bad_saved == 0, f"the saved checkpoint, loaded again: {bad_saved} of {saved:,} numbers are not finite")
    stage.check(score > ENOUGH, f"test accuracy of that checkpoint {score:.1%}")
    result = f"finished, {len(guard.incidents)} batches left out"
    stage.rows.append(
        ("3 bad data", result, str(steps), f"{score:.1%}", str(len(guard.incidents)), f"{run.seconds:.1f} s")
    )
    return guard, run


def replayed(stage: Stage, options: argparse.Namespace, guard: NanGuard, run: Run) -> None:
    stage.title(
        "Act 4: the three failures, again",
        "Each failed step was captured: batch, weights, random numbers. It runs again without a Trainer and the data.",
    )
    start, exact = time.perf_counter(), 0
    captured = [incident for incident in guard.incidents if incident.capture]
    held = len(captured) == min(len(guard.incidents), MOST) > 0
    stage.check(held, f"{len(captured)} failed steps are on disk")
    for incident in captured:
        result = nanguard.replay(nanguard.load_capture(incident.capture), Digits())
        then = run.watch.failed.get(incident.step, {})
        same = bool(then) and then.keys() == result.gradients.keys()
        same = same and all(same_bits(then[name], result.gradients[name]) for name in then)
        again = result.reproduced and not result.finite
        exact += stage.check(
            again and same,
            f"{Path(incident.capture).name}: fails again, and all {len(then)} gradients are the same bit for bit",
        )
    stage.console.print(
        "  This keeps them as a regression test, until the code copes with such images:", highlight=False
    )
    place = f'@pytest.mark.nanguard_captures("{options.captures}")'
    test = "def test_digits(nanguard_capture): nanguard.assert_finite_step(Digits(), nanguard_capture)"
    stage.show(f"{place}\n{test}", "cyan")
    seconds = f"{time.perf_counter() - start:.1f} s"
    stage.rows.append(("4 replay", f"{exact} of {len(captured)} bit-exact", "-", "-", "-", seconds))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--captures",
        type=Path,
        default=Path("nanguard_captures/digits"),
        help="directory; older captures in it are removed",
    )
    parser.add_argument("--epochs", type=int, default=1, help="of 450 steps each (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> int:
    options = parse()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    torch.set_num_threads(1)  # as fast for so small a network, and the same digits on every machine
    for old in options.captures.glob("step-*-rank*"):
        shutil.rmtree(old)
    stage = Stage(Console(width=None if sys.stdout.isatty() else 120))
    data, test = load_data(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        unguarded(stage, options, data, test, Path(folder))
        guarded(stage, options, data, test, Path(folder))
        guard, run = corrupted(stage, options, data, test, Path(folder))
        replayed(stage, options, guard, run)
    stage.summary()
    return 1 if stage.failures else 0


if __name__ == "__main__":
    sys.exit(main())
