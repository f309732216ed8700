"""What the stabiliser costs: losses by hand, bare and inside `stabilize()`, against torch's own, and what it costs to be idle.

Times are taken in pairs, as in `overhead.py`: in each round every way takes its turn, in a random order, and compared are times
of the same round, so that whatever else the machine does befalls them alike. The unguarded way stands there twice: what the
second differs from the first is the error of the measurement.

The peak of memory is the largest sum of what is allocated and not yet freed during one forward and backward pass, the inputs
themselves left out. It is taken from the allocation events of torch's profiler: every allocation of a tensor, to the byte, and
the same in every run, which the resident size of a process (allocators keep and share pages) is not. Each way runs in a process
of its own, after a pass that is not measured, so that it pays for nothing that stays.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import multiprocessing
import random
import statistics
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from losses import LOSSES, Loss, Size
from models import CASES, Case
from overhead import machine
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

import nanguard

Step = Callable[[], None]
TURN = 5e-3  # seconds that a turn takes at least, so that clock and caches do not matter
PASS = 10  # copies of the inputs that a pass may need at once, besides those of each way
UNGUARDED, AGAIN, GUARDED, BUILT_IN = "unguarded", "unguarded, again", "guarded", "built-in"
WAYS = (UNGUARDED, AGAIN, GUARDED, BUILT_IN)
EMPTY = "an empty function mode"  # what any of them costs at least


@dataclass
class Times:
    """Milliseconds of the ways of doing one thing, round by round.

    Attributes:
        by_way: the times of each way, the one that the others are compared with first.
    """

    by_way: dict[str, list[float]]

    def median(self, way: str) -> float:
        """Of the times of a way."""
        return statistics.median(self.by_way[way])

    def ratio(self, way: str, to: str = UNGUARDED) -> float:
        """The median of the ratios of the same round."""
        return statistics.median(a / b for a, b in zip(self.by_way[way], self.by_way[to], strict=True))

    def difference(self, way: str, to: str = UNGUARDED) -> float:
        """The median of the differences of the same round, in milliseconds."""
        return statistics.median(a - b for a, b in zip(self.by_way[way], self.by_way[to], strict=True))


@dataclass
class Bars:
    """What was promised, and what was measured."""

    rows: list[list[str]] = field(default_factory=list)

    def at_most(self, what: str, limit: float, found: float, unit: str = "x") -> None:
        """Note one of them."""
        verdict = "met" if found <= limit else "MISSED"
        self.rows.append([what, f"{limit:g}{unit}", f"{found:.3g}{unit}", verdict])


def one_pass(loss: Loss, way: str, size: Size, compiled: bool) -> Step:
    """The forward and backward pass of a loss."""
    inputs, targets = loss.batch(size)
    function = loss.built_in if way == BUILT_IN else loss.by_hand
    if compiled:
        # Code of its own, so that no way finds what another has compiled.
        function = torch.compile(types.FunctionType(function.__code__.replace(), function.__globals__))

    def bare() -> None:
        torch.autograd.grad(function(inputs, targets), inputs)

    def guarded() -> None:
        with nanguard.stabilize():
            value = function(inputs, targets)
        torch.autograd.grad(value, inputs)

    return guarded if way == GUARDED else bare


@dataclass
class Watch:
    """Measures times.

    Attributes:
        rounds: in each of which every way takes a turn, in a random order.
        now: the clock, in seconds.
    """

    rounds: int
    now: Callable[[], float]

    def measure(self, steps: dict[str, Step]) -> Times:
        """The times of the ways of doing one thing; the first sets the length of a turn."""
        for step in steps.values():
            step()
        turn = max(1, math.ceil(TURN / self.duration(next(iter(steps.values())), 1)))
        for step in steps.values():
            self.duration(step, turn)
        times: dict[str, list[float]] = {name: [] for name in steps}
        order, draw = list(steps), random.Random(0)
        for _ in range(self.rounds):
            draw.shuffle(order)
            for name in order:
                times[name].append(self.duration(steps[name], turn) * 1e3)
        return Times(times)

    def duration(self, step: Step, turn: int) -> float:
        """Seconds that a step takes, on average."""
        start = self.now()
        for _ in range(turn):
            step()
        return (self.now() - start) / turn


def peak(name: str, way: str, size: Size, compiled: bool, threads: int) -> int:
    """Bytes that one pass has allocated at most at a time, beyond the inputs. Meant for a process of its own."""
    torch.set_num_threads(threads)
    loss = next(loss for loss in LOSSES if loss.name == name)
    step = one_pass(loss, way, size, compiled)
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def peak_alone(name: str, way: str, size: Size, compiled: bool) -> int:
    """The same in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(peak, name, way, size, compiled, torch.get_num_threads()).result()


def too_large(size: Size) -> str:
    """Why a loss of that size cannot be measured here, or nothing."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return ""
    lines = dict(line.split(":", 1) for line in info.read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    needed = (len(WAYS) + PASS) * 4 * size[0] * size[1]
    if needed < available:
        return ""
    return f"needs about {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are available"


def of_losses(
    losses: tuple[Loss, ...], sizes: list[Size] | None, watch: Watch, bars: Bars, compiled: bool
) -> Iterator[list[str]]:
    """One row for each loss, size and way."""
    for loss in losses:
        for size in sizes if sizes and loss.judged else loss.sizes:
            reason = too_large(size)
            if reason:
                yield [loss.name, text(size), f"left out: it {reason}", *[""] * 6]
                continue
            torch.compiler.reset()  # or the next size would be compiled for sizes of any kind
            times = watch.measure({way: one_pass(loss, way, size, compiled) for way in WAYS})
            peaks = {way: peak_alone(loss.name, way, size, compiled) for way in WAYS if way != AGAIN}
            yield from (loss_row(loss, size, way, times, peaks) for way in WAYS)
            if loss.judged:
                judge(bars, loss, size, times, peaks, compiled)


def loss_row(loss: Loss, size: Size, way: str, times: Times, peaks: dict[str, int]) -> list[str]:
    """One line of the table."""
    memory = peaks.get(way)
    return [
        loss.name,
        text(size),
        way,
        f"{times.median(way):.3f}",
        "" if way == UNGUARDED else f"{times.ratio(way):.3f}",
        "" if way == UNGUARDED else f"{times.difference(way):+.3f}",
        "" if way == BUILT_IN else f"{times.ratio(way, BUILT_IN):.2f}",
        "" if memory is None else f"{memory / 2**20:.4g}",
        "" if memory is None or way == UNGUARDED else f"{memory / peaks[UNGUARDED]:.2f}",
    ]


def judge(bars: Bars, loss: Loss, size: Size, times: Times, peaks: dict[str, int], compiled: bool) -> None:
    """What the contract says about that loss at that size."""
    where = f"{loss.name}, {text(size)}"
    small = size[0] * size[1] < 256 * 1000
    if compiled and small:
        return  # all of it is the cost of calling anything at all
    if compiled:
        bars.at_most(f"compiled {where}: time, to compiled cross_entropy", 1.15, times.ratio(GUARDED, BUILT_IN))
        bars.at_most(f"compiled {where}: memory, to the same", 1.1, peaks[GUARDED] / peaks[BUILT_IN])
    elif size == (1024, 32000):
        bars.at_most(f"{where}: time, to unguarded", 0.65, times.ratio(GUARDED))
        bars.at_most(f"{where}: memory, to unguarded", 1.3, peaks[GUARDED] / peaks[UNGUARDED])
    elif small:
        bars.at_most(f"{where}: time beyond unguarded", 0.15, times.difference(GUARDED), " ms")
    else:
        bars.at_most(f"{where}: time, to unguarded", 1.0, times.ratio(GUARDED))


CALLS = 1000
X, Y, LAYER = torch.randn(4, 4), torch.randn(4, 4), nn.Linear(4, 4)
# Each is called that often; none of them has anything to do with a logarithm.
IDLE: dict[str, Callable[[], object]] = {
    "x + y": lambda: X + Y,
    "x * y": lambda: X * Y,
    "x.view(16)": lambda: X.view(16),
    "x[0]": lambda: X[0],
    "x.shape": lambda: X.shape,
    "x.sum()": lambda: X.sum(),
    "F.relu(x)": lambda: F.relu(X),
    "x.add_(0)": lambda: X.add_(0),
    "F.softmax(x)": lambda: F.softmax(X, dim=1),
    "nn.Linear": lambda: LAYER(X),
}


def of_calls(watch: Watch) -> Iterator[list[str]]:
    """What one call of torch costs in and out of a block in which nothing else happens."""
    for name, call in IDLE.items():

        def bare(call: Callable[[], object] = call) -> None:
            for _ in range(CALLS):
                call()

        def guarded(bare: Step = bare) -> None:
            with nanguard.stabilize():
                bare()

        times = watch.measure({UNGUARDED: bare, GUARDED: guarded})
        # Milliseconds of a thousand calls are microseconds of one.
        bare_us, guarded_us = times.median(UNGUARDED), times.median(GUARDED)
        yield [name, f"{bare_us:.2f}", f"{guarded_us:.2f}", f"{times.difference(GUARDED):+.2f}"]
    empty = watch.measure({UNGUARDED: lambda: None, GUARDED: enter})
    yield ["an empty block", "", f"{empty.median(GUARDED) * 1e3:.2f}", ""]


def enter() -> None:
    """A block, and nothing in it."""
    with nanguard.stabilize():
        pass


def of_models(names: list[str], watch: Watch, bars: Bars) -> Iterator[list[str]]:
    """What a training step costs inside a block in which there is nothing to do."""
    for name in names:
        case = CASES[name]
        torch.manual_seed(0)
        model, batch = case.build(), case.batch()
        ways = (UNGUARDED, AGAIN, EMPTY, GUARDED)
        steps = {way: training_step(case, copy.deepcopy(model), batch, way) for way in ways}
        times = watch.measure(steps)
        for way in steps:
            compared = ["", ""] if way == UNGUARDED else [f"{times.ratio(way):.4f}", f"{times.difference(way):+.3f}"]
            yield [name, way, f"{times.median(way):.3f}", *compared]
        if name != "mlp":
            bars.at_most(f"idle in a step of {name}: time, to unguarded", 1.01, times.ratio(GUARDED))


class Passing(TorchFunctionMode):
    """Does nothing."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Pass every call on."""
        return func(*args, **(kwargs or {}))


def training_step(case: Case, model: nn.Module, batch: tuple[Tensor, Tensor], way: str) -> Step:
    """A step of training, the loss of which is computed inside a block, or not."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    around: Callable[[], AbstractContextManager[object]]
    around = {GUARDED: nanguard.stabilize, EMPTY: Passing}.get(way, nullcontext)

    def step() -> None:
        optimizer.zero_grad()
        with around():
            loss = case.loss(model, batch)
        loss.backward()
        optimizer.step()

    return step


def text(size: Size) -> str:
    """A size, as options and tables have it."""
    return f"{size[0]}x{size[1]}"


def parsed(size: str) -> Size:
    """The other way round."""
    rows, _, columns = size.partition("x")
    return int(rows), int(columns)


def show(title: str, header: list[str], lines: Iterable[list[str]], *, words: int) -> None:
    """Prints a table in Markdown line by line, whose first columns are words and whose others are numbers."""
    print(f"\n**{title}**\n")
    for line in itertools.chain((header, ["---"] * words + ["---:"] * (len(header) - words)), lines):
        print("| " + " | ".join(line) + " |", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="in which every way takes a turn (default: 15)")
    parser.add_argument("--sizes", nargs="+", type=parsed, metavar="ROWSxCOLUMNS", help="of cross-entropy")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--cpu-time", action="store_true", help="of the process, for a machine that is busy otherwise")
    parser.add_argument("--compiled", action="store_true", help="compile the losses, and measure nothing else")
    parser.add_argument("--quick", action="store_true", help="one small loss and model, to see that it runs")
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    watch = Watch(2 if options.quick else options.rounds, time.process_time if options.cpu_time else time.perf_counter)
    warnings.simplefilter("ignore")
    sizes, losses, models = options.sizes, LOSSES, list(CASES)
    if options.quick:
        sizes, losses, models = sizes or [(32, 10)], LOSSES[:1], ["mlp"]
    print(machine() + "; CPU time" * options.cpu_time)
    bars = Bars()
    lines = of_losses(losses, sizes, watch, bars, options.compiled)
    header = [
        "loss",
        "size",
        "way",
        "median ms",
        "to unguarded",
        "difference ms",
        "to built-in",
        "peak MiB",
        "to unguarded",
    ]
    show("Losses by hand" + ", compiled" * options.compiled, header, lines, words=3)
    if not options.compiled:
        header = ["call", "unguarded µs", "guarded µs", "difference µs"]
        show("One idle call", header, of_calls(watch), words=1)
        header = ["model", "way", "median ms", "to unguarded", "difference ms"]
        show("An idle step", header, of_models(models, watch, bars), words=2)
    show("Bars", ["what", "at most", "measured", ""], bars.rows, words=1)


if __name__ == "__main__":
    main()
