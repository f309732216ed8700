"""Two processes: they decide alike, whichever of them has the bad batch, and both end as if it had never been."""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.multiprocessing import ProcessRaisedException
from torch.utils.data.distributed import DistributedSampler
from trainers import BATCH, Net, Samples, assert_finite, copied, differences, fit, loader, policy, rows, seed

from nanguard import NanGuard

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

GLOBAL = 2 * BATCH  # samples per step of both processes; even ones go to rank 0, odd ones to rank 1


class Report(Callback):
    """Writes what a process ends with to a file of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.validated: list[dict[str, Tensor]] = []

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.validated.append(copied(pl_module))

    def write(self, trainer: pl.Trainer, module: Any, error: BaseException | None = None) -> None:
        guards = [callback for callback in trainer.callbacks if isinstance(callback, NanGuard)]
        found = {
            "state": copied(module),
            "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "rates": [config.scheduler.last_epoch for config in trainer.lr_scheduler_configs],
            "attributes": (module.seen, module.history, list(module.recent), module.helper.calls),
            "metrics": {name: value.clone() for name, value in trainer.callback_metrics.items()},
            "validated": self.validated,
            "torch": torch.get_rng_state(),
            "incidents": [incident.to_dict() for guard in guards for incident in guard.incidents],
            "error": None if error is None else (type(error).__name__, str(error)),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.save(found, self.folder / f"{trainer.global_rank}.part")
        os.replace(self.folder / f"{trainer.global_rank}.part", self.folder / f"{trainer.global_rank}.pt")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.write(trainer, pl_module)

    def raised(self, trainer: pl.Trainer, module: Any, error: BaseException) -> None:
        self.write(trainer, module, error)
        # The first process to leave takes the other with it.
        other, patience = self.folder / f"{1 - trainer.global_rank}.pt", 200
        while not other.exists() and (patience := patience - 1):
            time.sleep(0.1)


class Distributed(Net):
    """Each process draws numbers of its own, and has its own part of the samples, in their order."""

    def __init__(self, samples: list[Any]) -> None:
        super().__init__("adam", "step")
        object.__setattr__(self, "samples", Samples(samples, augment=False))

    def on_fit_start(self) -> None:
        seed(100 + self.global_rank)  # a fork draws a seed of its own

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().optimizer_step(*args, **kwargs)
        except FloatingPointError as error:  # in a forked process no callback is told
            next(entry for entry in self.trainer.callbacks if isinstance(entry, Report)).raised(
                self.trainer, self, error
            )
            raise

    def train_dataloader(self) -> Any:
        sampler = DistributedSampler(self.samples, 2, self.global_rank, shuffle=False)
        return loader(self.samples, sampler=sampler)


def data(bad: dict[int, int], steps: int = 4, kind: str = "nan") -> list[Any]:
    """Samples for so many steps; `bad` says of a step which rank's part of it is bad."""
    found = rows(2 * steps)
    for step, rank in bad.items():
        x, y, flag = found[step * GLOBAL + 2 + rank]
        found[step * GLOBAL + 2 + rank] = (x, y, flag * 0) if kind == "gradient" else (x * float("nan"), y, flag)
    return found


def without(samples: list[Any], steps: set[int]) -> list[Any]:
    return [sample for position, sample in enumerate(samples) if position // GLOBAL not in steps]


def both(
    tmp: Path, samples: list[Any], guard: Any = None, *, fails: bool = False, **options: Any
) -> list[dict[str, Any]]:
    """What the two processes ended with."""
    folder = tmp / f"report-{len(list(tmp.glob('report-*')))}"
    settings = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False, "val": rows(1), **options}
    with pytest.raises(ProcessRaisedException, match="NonFiniteError") if fails else nullcontext():
        fit(tmp, lambda: Distributed(samples), None, guard, callbacks=[Report(folder)], **settings)
    found = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    assert not differences(found[0]["state"]["head.weight"], found[1]["state"]["head.weight"])
    return found


def agree(guarded: list[dict[str, Any]], reference: list[dict[str, Any]]) -> None:
    for one, other in zip(guarded, reference, strict=True):
        shared = set(one) - {"incidents", "error"}
        found = differences({key: one[key] for key in shared}, {key: other[key] for key in shared})
        assert not found, "\n".join(found[:10])


@pytest.mark.parametrize("kind", ["nan", "gradient"])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_step_never_was(tmp_path: Path, rank: int, kind: str) -> None:
    samples = data({1: rank}, kind=kind)
    guarded = both(tmp_path, samples, policy(tmp_path))
    agree(guarded, both(tmp_path, without(samples, {1})))
    for report in guarded:
        (incident,) = report["incidents"]
        assert (incident["step"], incident["batch_idx"], incident["action"]) == (1, 1, "skipped")
        assert_finite(report["state"])
    assert [report["incidents"][0]["rank"] for report in guarded] == [rank, rank]
    mine, other = guarded[rank]["incidents"][0], guarded[1 - rank]["incidents"][0]
    assert (mine["verdict"], other["verdict"]) == ("reproduced", "not_replayed")
    assert (mine["origin"]["phase"], mine["samples"]) == ("forward" if kind == "nan" else "backward", [1])
    if kind == "nan":
        assert mine["origin"]["tensor"] == "batch[0]"
        assert guarded[rank]["incidents"][0]["capture"].endswith(f"rank{rank}")
        assert guarded[1 - rank]["incidents"][0]["capture"] is None


def test_the_last_step_and_two_in_a_row(tmp_path: Path) -> None:
    samples = data({2: 1, 3: 0})
    guarded = both(tmp_path, samples, policy(tmp_path), max_epochs=2)
    agree(guarded, both(tmp_path, without(samples, {2, 3}), max_epochs=2))
    assert [len(report["incidents"]) for report in guarded] == [4, 4]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_window(tmp_path: Path, rank: int) -> None:
    samples = data({2: rank}, steps=6)
    guarded = both(tmp_path, samples, policy(tmp_path), accumulate_grad_batches=2)
    agree(guarded, both(tmp_path, without(samples, {2, 3}), accumulate_grad_batches=2))
    assert [report["incidents"][0]["batch_idx"] for report in guarded][rank] == 2


def test_raising_ends_both(tmp_path: Path) -> None:
    samples = data({2: 1})
    # Without validation, whose forward pass gives rank 1 the buffers of rank 0.
    guarded = both(tmp_path, samples, policy(tmp_path, "raise"), fails=True, limit_val_batches=0)
    reference = both(tmp_path, samples[: 2 * GLOBAL], limit_val_batches=0)
    for report, other in zip(guarded, reference, strict=True):
        assert report["error"][0] == "NonFiniteError"
        assert not differences(report["state"], other["state"])
    assert [report["incidents"][0]["rank"] for report in guarded] == [1, 1]


def test_a_spent_budget_stops_both(tmp_path: Path) -> None:
    guard = policy(tmp_path, budget={"total": 1, "then": "stop"})
    guarded = both(tmp_path, data({1: 0, 3: 1}, steps=6), guard, max_epochs=2)
    assert [[i["action"] for i in report["incidents"]] for report in guarded] == [["skipped", "stopped"]] * 2
    assert [report["rates"] for report in guarded] == [[2], [2]]


def test_a_healthy_run(tmp_path: Path) -> None:
    guarded = both(tmp_path, data({}), policy(tmp_path), max_epochs=2)
    assert [report["incidents"] for report in guarded] == [[], []]
    agree(guarded, both(tmp_path, data({}), max_epochs=2))
