"""What a guarded step costs, measured in pairs: bare and guarded steps take turns in one process.

Every way of training has a model of its own with the same weights, and gets the same batch. In each round every way takes one
step (a tiny model a few, so that its own data is in the caches), in a random order, so that whatever else the machine does
befalls them alike. Given are the median of the ratios to the bare step of the same round, and the median of the differences.
The bare step stands there twice: what the second differs from the first is the error of the measurement.
Run it with `make bench`.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from models import CASES, Case
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import nanguard
from nanguard.guard import Guard, Moment
from nanguard.policy import Policy

Step = Callable[[], None]
Batch = tuple[Tensor, Tensor]
WARM_UP = 5  # steps; the stabiliser needs three losses to see that there is nothing for it to do
LIGHTNING_SHARE = 2  # fits in a Trainer are this many times as long as a plain loop, as there are fewer of them


def plain_step(case: Case, model: nn.Module, batch: Batch, around: Callable[[], AbstractContextManager[Any]]) -> Step:
    """The bare training step, inside a context."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        with around():
            optimizer.zero_grad()
            case.loss(model, batch).backward()
            optimizer.step()

    return step


def guarded_step(
    case: Case,
    model: nn.Module,
    batch: Batch,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    **sections: Any,
) -> Step:
    """The same step under a guard with the default policy but for `sections`; the context is around the forward pass."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    guard = Guard(Policy(**sections), model)
    guard.start()
    count = 0

    def step() -> None:
        nonlocal count
        guard.begin(Moment(count, 0, count), batch)
        optimizer.zero_grad()
        with guard.stabilizing(), around():
            loss = case.loss(model, batch)
        guard.saw_loss(loss)
        loss.backward()
        ruling = guard.judge(parameters, optimizer=optimizer)
        if ruling.action != "proceed":
            raise RuntimeError(f"a healthy step was refused: {ruling}")
        optimizer.step()
        guard.end_window()
        count += 1

    return step


def ways(case: Case) -> dict[str, Step]:
    """Every way of taking a step, the bare one first."""
    model, batch = case.build(), case.batch()
    steps = {
        "bare": plain_step(case, copy.deepcopy(model), batch, nullcontext),
        "bare, again": plain_step(case, copy.deepcopy(model), batch, nullcontext),
        "nanguard": guarded_step(case, copy.deepcopy(model), batch),
        "nanguard, stabiliser always on": guarded_step(case, copy.deepcopy(model), batch, nanguard.stabilize),
        "nanguard, all modules watched, every 50th step": guarded_step(
            case, copy.deepcopy(model), batch, watch={"modules": ["*"]}
        ),
        "nanguard, all modules watched, every step": guarded_step(
            case, copy.deepcopy(model), batch, watch={"modules": ["*"], "every_n_steps": 1}
        ),
        "detect_anomaly": plain_step(
            case, copy.deepcopy(model), batch, lambda: torch.autograd.set_detect_anomaly(True)
        ),
    }
    if has_transformers():
        from transformers.debug_utils import DebugUnderflowOverflow

        watched = copy.deepcopy(model)
        DebugUnderflowOverflow(watched)  # stays alive in the hooks that it registers
        steps["DebugUnderflowOverflow"] = plain_step(case, watched, batch, nullcontext)
    return steps


def has_transformers() -> bool:
    """Whether the column of transformers can be measured."""
    return importlib.util.find_spec("transformers") is not None


def measure(steps: dict[str, Step], rounds: int, turn: int) -> dict[str, list[float]]:
    """Milliseconds of a step of each way in each round, in which each way takes a turn of so many steps."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    draw = random.Random(0)
    for number in range(WARM_UP + rounds):
        draw.shuffle(order)
        for name in order:
            start = time.perf_counter()
            for _ in range(turn):
                steps[name]()
            if number >= WARM_UP:
                times[name].append((time.perf_counter() - start) * 1e3 / turn)
    return times


def plain_rows(cases: list[Case], steps: int | None) -> Iterator[list[str]]:
    """One row for each way and model, of a plain loop."""
    for case in cases:
        yield from rows(case.name, measure(ways(case), max(1, (steps or case.steps) // case.turn), case.turn))


def lightning_rows(cases: list[Case], steps: int | None, rounds: int) -> Iterator[list[str]]:
    """The same of a Trainer, with and without the callback, in fits that take turns."""
    from trainer import milliseconds

    for case in cases:
        model, batch = case.build(), case.batch()
        length = (steps or case.steps) * LIGHTNING_SHARE // rounds + WARM_UP
        times: dict[str, list[float]] = {"Trainer": [], "Trainer, again": [], "Trainer, NanGuard": []}
        for number in range(rounds + 1):
            for name in list(times) if number % 2 else list(times)[::-1]:
                found = milliseconds(case, copy.deepcopy(model), batch, length, guarded="NanGuard" in name)
                if number:  # the first round warms up
                    times[name].append(statistics.median(found[WARM_UP - 1 :]))
        yield from rows(case.name, times)


def rows(model: str, times: dict[str, list[float]]) -> Iterator[list[str]]:
    """The medians, as text; the first way is what the others are compared with."""
    bare = next(iter(times.values()))
    for name, mine in times.items():
        ratio = statistics.median(a / b for a, b in zip(mine, bare, strict=True))
        extra = statistics.median(a - b for a, b in zip(mine, bare, strict=True))
        compared = ["", ""] if mine is bare else [f"{ratio:.3f}", f"{extra:+.3f}"]
        yield [model, name, f"{statistics.median(mine):.3f}", *compared]


def machine() -> str:
    """On what it was measured."""
    model, cores = platform.processor() or platform.machine(), torch.get_num_threads()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
        cores = sum(line.startswith("processor") for line in lines)
    versions = f"torch {torch.__version__}, nanguard {nanguard.__version__}, Python {platform.python_version()}"
    return f"{model}, {cores} cores; {versions}; {torch.get_num_threads()} thread(s)"


def show(title: str, found: Iterator[list[str]], *, markdown: bool) -> None:
    """Prints a table, as soon as it is complete."""
    header = ["model", "step", "median ms", "ratio", "difference ms"]
    lines = list(found)
    if markdown:
        print(f"\n**{title}**\n")
        for line in (header, ["---", "---", *["---:"] * 3], *lines):
            print("| " + " | ".join(line) + " |")
        return
    table = Table(title=title, title_justify="left")
    for name in header:
        table.add_column(name, justify="left" if name in ("model", "step") else "right")
    for line in lines:
        table.add_row(*line, end_section=False)
    Console().print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES), help="default: all")
    parser.add_argument("--steps", type=int, help="of each way; default: as many as take about half a minute")
    parser.add_argument(
        "--fits", type=int, default=5, help="pairs of fits in a Trainer; 0 leaves them out (default: 5)"
    )
    parser.add_argument("--threads", type=int, help="of torch; default: torch's own")
    parser.add_argument("--markdown", action="store_true", help="print Markdown instead of a table for the terminal")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    cases = [CASES[name] for name in options.models]
    print(machine())
    if not has_transformers():
        print("transformers is not installed: no DebugUnderflowOverflow")
    show("A plain loop", plain_rows(cases, options.steps), markdown=options.markdown)
    if options.fits:
        title = "A Lightning Trainer"
        show(title, lightning_rows(cases, options.steps, options.fits), markdown=options.markdown)


if __name__ == "__main__":
    main()
