"""What the zoo is made of: the declaration of a bug, a small module, and its data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

SIZE = 8
CLASSES = 4
BUGS: dict[str, Bug] = {}
CONTROLS: dict[str, Control] = {}


def rows(bad: Sequence[int] = (2, 5), batches: int = 3) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Samples (x, y, s): s is 1, and 0 for the samples at the positions `bad` of the second batch."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for position in range(SIZE * batches):
        x, y = torch.randn(4, generator=generator), torch.tensor(position % CLASSES)
        wrong = position // SIZE == 1 and position % SIZE in bad
        found.append((x, y, torch.zeros(1) if wrong else torch.ones(1)))
    return found


def changed(change: Callable[[Tensor, Tensor], Any], bad: Sequence[int] = (2, 5), batches: int = 3) -> list[Any]:
    """Samples of any other kind: `change` is given x and s, and makes one."""
    return [change(x.clone(), s) for x, _, s in rows(bad, batches)]


@dataclass(frozen=True)
class Bug:
    """A module that fails, and what should be said about it.

    Attributes:
        make: makes the module.
        op, phase, module, cause, samples, tensor, verdict: as in an incident.
        bad: positions in the second batch that are prepared to fail.
        data: makes the samples or a loader, where the usual ones do not do.
        trainer: options of the Trainer.
        batch_idx: where the (first) incident is.
        count: how many incidents there are; `None` for any number.
        library: part of the path of the library's file, where its line is at fault.
        indices: indices into the dataset, where those are not the obvious ones.
        source: where the marked line is, if not in the class.
        says: what the advice holds.
        omits: what it does not hold.
    """

    make: Callable[[], Any]
    op: str | None
    cause: str
    phase: str | None = "forward"
    module: str | None = ""
    samples: tuple[int, ...] | None = (2, 5)
    tensor: str | None = None
    verdict: str = "reproduced"
    bad: tuple[int, ...] = (2, 5)
    data: Callable[[], Any] | None = None
    trainer: dict[str, Any] = field(default_factory=dict)
    batch_idx: int = 1
    count: int | None = 1
    library: str | None = None
    indices: tuple[int, ...] | str | None = "obvious"
    source: Any = None
    says: tuple[str, ...] = ()
    omits: tuple[str, ...] = ()

    def loader(self) -> DataLoader:
        """A loader of the samples, in order."""
        data = self.data() if self.data is not None else rows(self.bad)
        return data if isinstance(data, DataLoader) else DataLoader(data, batch_size=SIZE)


@dataclass(frozen=True)
class Control:
    """A module that is healthy."""

    make: Callable[[], Any]
    data: Callable[[], Any] | None = None
    trainer: dict[str, Any] = field(default_factory=dict)

    def loader(self) -> DataLoader:
        """A loader of the samples, in order."""
        data = self.data() if self.data is not None else rows()
        return data if isinstance(data, DataLoader) else DataLoader(data, batch_size=SIZE)


def bug(op: str | None, cause: str, **more: Any) -> Callable[[type], type]:
    """Declares the class beneath as a bug."""

    def declare(cls: type) -> type:
        assert cls.__name__ not in BUGS, cls.__name__
        BUGS[cls.__name__] = Bug(cls, op, cause, **{"source": cls, "samples": more.get("bad", (2, 5)), **more})
        return cls

    return declare


def control(**more: Any) -> Callable[[type], type]:
    """Declares the class beneath as healthy."""

    def declare(cls: type) -> type:
        assert cls.__name__ not in CONTROLS, cls.__name__
        CONTROLS[cls.__name__] = Control(cls, **more)
        return cls

    return declare


class Small(pl.LightningModule):
    """A linear layer, and a loss of what it gives.

    The loss is given h of shape (8, 4), classes y of shape (8,), and s of shape (8, 1), which is 0 for the bad samples.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y, s = batch
        return self.loss(self.body(x), y, s)

    def loss(self, h: Tensor, y: Tensor, s: Tensor) -> Any:
        raise NotImplementedError

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Whole(Small):
    """The same, for losses of a whole batch of another kind."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss_of(batch)

    def loss_of(self, batch: Any) -> Any:
        raise NotImplementedError


def push(s: Tensor, value: float, column: int = 0) -> Tensor:
    """Adds `value` to one column of the bad samples: shape (8, 4)."""
    return (1 - s) * torch.eye(CLASSES)[column] * value
