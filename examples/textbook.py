"""The cross-entropy written by hand: how it becomes inf and NaN, step by step, and what `nanguard.stabilize` makes of it.

Run with ``python examples/textbook.py``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from torch import Tensor

import nanguard

LOGITS = [[2.0, 1.0, 0.1], [1000.0, 1.0, -1000.0], [3.0, 2.0, 1.0]]
TARGET = [0, 2, 1]


def exponentials(logits: Tensor) -> Tensor:
    return torch.exp(logits)


def probabilities(logits: Tensor) -> Tensor:
    e = exponentials(logits)
    return e / e.sum(1, keepdim=True)


def picked(logits: Tensor, target: Tensor) -> Tensor:
    p = probabilities(logits)
    return p[torch.arange(len(target)), target]


def cross_entropy_by_hand(logits: Tensor, target: Tensor) -> Tensor:
    return -torch.log(picked(logits, target)).mean()


def show(value: Tensor) -> str:
    """Numbers with the failures marked."""
    if value.dim():
        return "  ".join(map(show, value))
    text = f"{value.item():.4g}"
    return text if value.isfinite() else f"[bold red]{text}[/]"


def steps(console: Console, logits: Tensor, target: Tensor) -> None:
    """Every intermediate value and the gradients, row by row."""
    x = logits.clone().requires_grad_()
    loss = cross_entropy_by_hand(x, target)
    loss.backward()
    assert x.grad is not None
    with torch.no_grad():
        columns = {
            "logits z": x,
            "exp(z)": exponentials(x),
            "exp(z) / sum": probabilities(x),
            "p\\[target]": picked(x, target),
            "d loss / d z": x.grad,
        }
    table = Table(*columns, title=f"loss = {show(loss.detach())}", title_style="bold")
    for row in range(len(target)):
        table.add_row(*(show(column[row]) for column in columns.values()))
    console.print(table)


def explain_failure(console: Console) -> None:
    console.print(
        Panel(
            "Row 2 asks float32 for too much:\n"
            "  exp(1000) = [bold red]inf[/]                 the largest float32 is 3.4e38 = exp(88.7)\n"
            "  inf / inf = [bold red]nan[/]                 so the first probability is not a number\n"
            "  exp(-1000) = 0, 0 / inf = 0     so the target seems impossible\n"
            "  -log 0 = [bold red]inf[/]                    so the loss is infinite\n"
            "  d log p / dp = 1 / 0 = [bold red]inf[/]      and 0 * inf = [bold red]nan[/]: all gradients of the row are lost\n"
            "One optimizer step later every weight that the row touched is NaN.",
            title="Why",
        )
    )


def explain_stable_form(console: Console, row: Tensor, target: int) -> None:
    """The stable equation, worked through for one row."""
    m = row.max()
    shifted = row - m
    total = torch.exp(shifted).sum()
    loss = torch.log(total) + m - row[target]
    console.print(
        Panel(
            "loss = log sum exp(z - m) + m - z\\[target]   with m = max z\n\n"
            f"  z                   = {show(row)}\n"
            f"  m                   = {show(m)}\n"
            f"  exp(z - m)          = {show(torch.exp(shifted))}   nothing overflows: the largest is exp(0) = 1\n"
            f"  log sum exp(z - m)  = {show(torch.log(total))}\n"
            f"  loss                = {show(torch.log(total))} + {show(m)} - ({show(row[target])}) = {show(loss)}",
            title="The stable form, for row 2",
        )
    )


def main() -> None:
    torch.manual_seed(0)
    console = Console(width=120)
    logits, target = torch.tensor(LOGITS), torch.tensor(TARGET)

    console.rule("1. By hand")
    steps(console, logits, target)
    explain_failure(console)

    console.rule("2. The same code, under nanguard.stabilize()")
    x = logits.clone().requires_grad_()
    with nanguard.stabilize() as swaps:
        loss = cross_entropy_by_hand(x, target)
    loss.backward()
    reference = logits.clone().requires_grad_()
    expected = F.cross_entropy(reference, target)
    expected.backward()
    assert x.grad is not None
    assert reference.grad is not None
    table = Table("d loss / d z", "of F.cross_entropy", title=f"loss = {show(loss.detach())}", title_style="bold")
    for mine, theirs in zip(x.grad, reference.grad, strict=True):
        table.add_row(show(mine), show(theirs))
    console.print(table)
    console.print(f"F.cross_entropy says {show(expected.detach())}.")

    console.rule("3. What was replaced, and the line to write instead")
    report = Table("rule", "line", "written", "write instead")
    for swap in swaps:
        report.add_row(swap.rule, str(swap.line), swap.original.replace("[", "\\["), f"[green]{swap.replacement}[/]")
    console.print(report)
    explain_stable_form(console, logits[1], TARGET[1])


if __name__ == "__main__":
    main()
