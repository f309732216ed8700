"""Modules of every kind that hooks have to cope with: shared by the tests of watched modules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from trainers import RARE, Net


def hooks_of(module: nn.Module) -> list[Any]:
    """All hooks on a module and what is in it, and calls that are not its own."""
    found: list[Any] = []
    for entry in module.modules():
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            found += [hook for hook in getattr(entry, name).values() if "nanguard" in (hook.__module__ or "")]
        call = vars(entry).get("_compiled_call_impl")
        found += [call] if call is not None and "nanguard" in (call.__module__ or "") else []
    return found


class Simple(pl.LightningModule):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Fill(nn.Module):
    """Puts a value where the batch is marked."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor, marked: Tensor) -> Tensor:
        return x.masked_fill(marked, self.value)


class Masked(Simple):
    """A value that is not finite in one sample, and a loss that leaves that sample out."""

    def __init__(self, value: float = math.inf) -> None:
        super().__init__()
        self.one, self.inverse, self.two = nn.Linear(4, 3), Fill(value), nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, _ = batch
        marked = y == RARE
        x = x.nan_to_num()
        out = self.inverse(self.one(x), marked.expand(-1, 3))
        return out.where(~marked, 0.0).square().mean() + self.two(x).square().mean()


class Step(nn.Module):
    """Fails in the way that it is told, for the samples that are marked."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, flag: Tensor, failure: str) -> Tensor:
        x = self.linear(x)
        if failure == "inner":
            return x / flag
        return x + (x * flag).square().sum(1, keepdim=True).sqrt() if failure == "backward" else x


class Bulk(Simple):
    """Manual optimization, or a loader that it takes its batches from by itself."""

    def __init__(self, fetching: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = fetching
        self.net = nn.ModuleList([nn.Linear(4, 4), Step(), nn.ReLU(inplace=True), nn.Linear(4, 1)])
        self.failure = ""
        if fetching:
            self.training_step = self.fetching_step  # type: ignore[method-assign]

    def loss(self, batch: Any) -> Tensor:
        x, _, flag = batch
        x = self.net[1](self.net[0](x), flag, self.failure)
        out = self.net[3](self.net[2](x))
        return (out / flag if self.failure == "root" else out).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()

    def fetching_step(self, dataloader_iter: Any) -> Any:
        return self.loss(next(dataloader_iter)[0])


@dataclass
class Rest:
    value: Tensor
    note: str = "rest"


class Splitting(nn.Module):
    def forward(self, x: Tensor, *, scale: float) -> Any:
        return x * scale, {"half": x / 2, "rest": Rest(x + 1)}


class Parts(Simple):
    """A module that returns a tuple with a dictionary with a dataclass, and takes a keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.parts = nn.Linear(4, 4), Splitting()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        whole, more = self.parts(self.linear(batch[0]), scale=2.0)
        return {"loss": (whole + more["half"] + more["rest"].value).square().mean(), "more": more}


class Pair(Simple):
    """An LSTM, in-place modules on outputs of modules, and views that are written into."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(2, 3, batch_first=True)
        self.flat, self.relu, self.out = nn.Flatten(), nn.ReLU(inplace=True), nn.Linear(6, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = self.relu(self.flat(self.rnn(batch[0].reshape(-1, 2, 2))[0]))
        x = x * 2
        x += 1
        out = self.out(x)
        out[:, 0] *= 2
        return out.square().mean()


class Reused(Net):
    """One module, called three times in a step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.layer(x)
        return super().forward(x)


class Sealed(Simple):
    """A scripted module, and a teacher whose fast path any hook would close."""

    def __init__(self) -> None:
        super().__init__()
        self.scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
        self.teacher = nn.TransformerEncoderLayer(4, 2, dim_feedforward=8, batch_first=True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = self.scripted(batch[0])
        with torch.no_grad():
            target = self.teacher.eval()(x[None])[0]
        return (x - target).square().mean()
