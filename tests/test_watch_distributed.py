"""Watched modules and a watched validation in two processes: the hooks see both, and both decide alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer_distributed import Distributed, agree, both, data, pytestmark, without  # noqa: F401
from torch import Tensor, nn
from trainers import RARE, policy, rows

ALL = {"modules": ["*"], "every_n_steps": 1}


class Fill(nn.Module):
    def forward(self, x: Tensor, marked: Tensor) -> Tensor:
        return x.masked_fill(marked, float("inf"))


class Hidden(Distributed):
    """An activation that is not finite in one sample, and a loss that leaves that sample out."""

    def __init__(self, samples: list[Any]) -> None:
        super().__init__(samples)
        self.fill = Fill()

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        marked = x[:, :1] > RARE
        return self.fill(out, marked).where(~marked, 0.0)


def marked(bad: dict[int, int]) -> list[Any]:
    found = data({})
    for step, rank in bad.items():
        x, y, flag = found[step * 8 + 2 + rank]
        found[step * 8 + 2 + rank] = (x + 100.0, y, flag)
    return found


def run(tmp: Path, samples: list[Any], guard: Any, monkeypatch: Any, make: Any = Hidden, **options: Any) -> Any:
    monkeypatch.setattr("test_trainer_distributed.Distributed", make)
    return both(tmp, samples, guard, **options)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_bad_activation_on_one_rank(tmp_path: Path, rank: int, monkeypatch: Any) -> None:
    samples = marked({1: rank})
    guarded = run(tmp_path, samples, policy(tmp_path, watch=ALL), monkeypatch)
    agree(guarded, run(tmp_path, without(samples, {1}), policy(tmp_path), monkeypatch))
    for report in guarded:
        (incident,) = report["incidents"]
        assert (incident["trigger"], incident["rank"], incident["action"]) == ("activations", rank, "skipped")
    names = [stats["name"] for stats in guarded[rank]["incidents"][0]["activations"]]
    assert "fill" in names
    assert names.count("(root)") == 1  # its forward, and not the training step that DDP calls through it
    assert guarded[rank]["incidents"][0]["origin"]["module"] == "fill"


def test_a_failure_is_placed_although_the_step_is_not_run_again(tmp_path: Path, monkeypatch: Any) -> None:
    guarded = run(tmp_path, data({1: 1}, kind="gradient"), policy(tmp_path, watch=ALL), monkeypatch)
    origins = [report["incidents"][0]["origin"] for report in guarded]
    assert any(origin is not None and origin["phase"] == "backward" for origin in origins)


def test_a_healthy_run_is_bit_identical(tmp_path: Path, monkeypatch: Any) -> None:
    watch = {**ALL, "validation": True}
    guarded = run(tmp_path, data({}), policy(tmp_path, watch=watch), monkeypatch)
    assert [report["incidents"] for report in guarded] == [[], []]
    agree(guarded, run(tmp_path, data({}), policy(tmp_path), monkeypatch))


def test_a_bad_validation_batch_on_one_rank_ends_both(tmp_path: Path, monkeypatch: Any) -> None:
    class Validating(Hidden):
        def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
            return batch[0].sum() * (float("nan") if self.global_rank else 1.0)

        def on_fit_start(self) -> None:
            super().on_fit_start()
            loop = self.trainer.fit_loop.epoch_loop.val_loop
            plain = loop.run

            def caught() -> Any:
                try:
                    return plain()
                except FloatingPointError as error:
                    report = next(c for c in self.trainer.callbacks if type(c).__name__ == "Report")
                    report.raised(self.trainer, self, error)
                    raise

            loop.run = caught

    guard = policy(tmp_path, "raise", watch={"validation": True})
    guarded = run(tmp_path, data({}), guard, monkeypatch, Validating, fails=True, val=rows(2))
    for report in guarded:
        assert report["error"][0] == "NonFiniteError"
        (incident,) = [entry for entry in report["incidents"] if entry["action"] == "raised"][-1:]
        assert (incident["rank"], incident["trigger"]) == (1, "loss")
    assert torch.equal(guarded[0]["state"]["head.weight"], guarded[1]["state"]["head.weight"])
