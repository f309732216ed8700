"""What a diagnosis costs, in steps: the origin, and the samples at fault among 64. And what it costs while all is well.

    python benchmarks/diagnosis.py --threads 1

A step is forward, backward and AdamW update of the same batch, without a guard. The failing batch holds one sample whose
loss is infinite, or whose loss is finite with a NaN gradient.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from models import CASES, Case
from torch import Tensor, nn

from nanguard.diagnosis import MicroBatch, Rerun, diagnose
from nanguard.guard import Guard, Moment
from nanguard.policy import Policy
from nanguard.transaction import Transaction

SAMPLES = 64
BARS = {"origin": 6.0, "samples": 20.0}


class Failing(nn.Module):
    """The model of a case with a last line that fails for one sample."""

    def __init__(self, case: Case, kind: str) -> None:
        super().__init__()
        self.model = case.build()
        self.kind = kind

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """The loss."""
        inputs, targets, sign = batch
        logits = self.model(inputs)
        loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten())
        share = (logits.flatten(1).square().mean(1)) * sign
        extra = share.log() if self.kind == "forward" else share.sqrt()
        return loss + 1e-3 * extra.mean()


def batch_of(case: Case, size: int, bad: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of so many samples, one of them bad."""
    parts = [case.batch() for _ in range(-(-size // len(case.batch()[0])))]
    inputs, targets = (torch.cat(entries)[:size] for entries in zip(*parts, strict=True))
    sign = torch.ones(size)
    if bad is not None:
        sign[bad] = 0
    return inputs, targets, sign


def seconds(run: Callable[[], object], repeats: int) -> float:
    """The median time of a call."""
    run()
    times = []
    for _ in range(repeats):
        gc.collect()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(case: Case, kind: str, size: int, repeats: int) -> dict[str, float]:
    """Seconds of a plain step, of a diagnosis without samples, and of the search for them."""
    torch.manual_seed(0)
    module = Failing(case, kind)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    healthy, failing = batch_of(case, size, None), batch_of(case, size, size // 3)

    def step() -> None:
        optimizer.zero_grad()
        module.training_step(healthy).backward()
        optimizer.step()

    plain = seconds(step, repeats)
    transaction = Transaction(module)
    rerun = Rerun(module, transaction, module.training_step)
    well = MicroBatch(0, (healthy,), transaction.savepoint())
    micro = MicroBatch(1, (failing,), transaction.savepoint())
    found = diagnose(micro, rerun, healthy=well)
    assert found.samples == (size // 3,), found
    assert found.origin is not None
    assert found.origin.phase == kind, found
    origin = seconds(lambda: diagnose(micro, rerun, healthy=well, samples=False), repeats)
    everything = seconds(lambda: diagnose(micro, rerun, healthy=well), repeats)
    return {"step": plain, "origin": origin, "samples": everything - origin}


def healthy_steps(case: Case, repeats: int) -> tuple[float, float]:
    """Seconds of a guarded healthy step with diagnosis, and without it."""
    torch.manual_seed(0)
    batch = batch_of(case, len(case.batch()[0]), None)
    steps = []
    for enabled in (True, False):
        module = Failing(case, "forward")
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
        policy = Policy(stabilize={"enabled": False}, capture={"enabled": False}, diagnosis={"enabled": enabled})
        transaction = Transaction(module)
        guard = Guard(policy, module, transaction=transaction, rerun=Rerun(module, transaction, module.training_step))
        steps.append(guarded(guard, module, optimizer, batch))
    times: list[list[float]] = [[], []]
    for turn in range(2 * repeats + 2):  # in turns, so that what else happens on the machine strikes both
        start = time.perf_counter()
        steps[turn % 2]()
        times[turn % 2].append(time.perf_counter() - start)
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])


def guarded(guard: Guard, module: Failing, optimizer: torch.optim.Optimizer, batch: object) -> Callable[[], None]:
    """One step under a guard."""

    def step() -> None:
        guard.begin(Moment(0, 0, 0), (batch,))
        optimizer.zero_grad()
        with guard.stabilizing():
            loss = module.training_step(batch)  # type: ignore[arg-type]
        guard.saw_loss(loss)
        loss.backward()
        assert guard.judge(module.parameters()).action == "proceed"
        optimizer.step()
        guard.end_window()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=SAMPLES, help="size of the batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=["conv", "gpt"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} thread(s), batch of {options.samples}")
    print(
        "| model | fails in | step, ms | origin, steps | samples, steps | bars |\n| --- | --- | --- | --- | --- | --- |"
    )
    for name in options.models:
        for kind in ("forward", "backward"):
            found = measure(CASES[name], kind, options.samples, options.repeats)
            cost = {part: found[part] / found["step"] for part in BARS}
            met = "met" if all(cost[part] <= BARS[part] for part in BARS) else "missed"
            print(
                f"| {name} | {kind} | {found['step'] * 1e3:.0f} | {cost['origin']:.1f} | {cost['samples']:.1f} | {met} |"
            )
    print("\n| model | healthy step with diagnosis, ms | without, ms |\n| --- | --- | --- |")
    for name in options.models:
        on, off = healthy_steps(copy.copy(CASES[name]), 5 * options.repeats)
        print(f"| {name} | {on * 1e3:.1f} | {off * 1e3:.1f} |")


if __name__ == "__main__":
    main()
