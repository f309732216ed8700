"""The samples at fault in batches of other shapes: graphs, several loaders, rows that were sorted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, default_collate
from trainers import fit, policy

from nanguard import Incident


class Layer(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def first(tmp: Path, make: Any, loader: Any, **options: Any) -> Incident:
    guard = policy(tmp, "record", capture={"enabled": False})
    return fit(tmp, make, loader, guard, **options).incidents[0]


# -- graphs


@dataclass
class Graphs:
    """Several graphs, drawn as one."""

    nodes: Tensor
    edges: Tensor
    member: Tensor
    label: Tensor


def _graph(index: int, bare: tuple[int, ...]) -> tuple[Tensor, Tensor, int]:
    size = 3 + index % 3
    ring = torch.arange(size)
    edges = torch.stack([ring, ring.roll(1)])
    nodes = torch.randn(size, 4, generator=torch.Generator().manual_seed(index))
    return nodes, edges[:, : 0 if index in bare else size], index % 3


def _drawn(graphs: list[tuple[Tensor, Tensor, int]]) -> Graphs:
    sizes = torch.tensor([len(nodes) for nodes, _, _ in graphs])
    first = sizes.cumsum(0) - sizes
    return Graphs(
        torch.cat([nodes for nodes, _, _ in graphs]),
        torch.cat([edges + offset for (_, edges, _), offset in zip(graphs, first, strict=True)], 1),
        torch.arange(len(graphs)).repeat_interleave(sizes),
        torch.tensor([label for _, _, label in graphs]),
    )


class OfNeighbours(Layer):
    """Graphs without edges have no degree."""

    def training_step(self, batch: Graphs, batch_idx: int) -> Tensor:
        source, target = batch.edges
        degree = torch.bincount(target, minlength=len(batch.nodes)).float()
        means = torch.zeros_like(batch.nodes).index_add(0, target, batch.nodes[source]) / degree[:, None]
        pooled = torch.zeros(len(batch.label), 4).index_add(0, batch.member, means)
        return nn.functional.cross_entropy(self.layer(pooled), batch.label)


@pytest.mark.parametrize("bare", [(5,), (5, 7), (4, 5, 6, 7)])
@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_graphs(tmp_path: Path, bare: tuple[int, ...], precision: Any) -> None:
    graphs = [_graph(index, bare) for index in range(12)]

    loader = DataLoader(graphs, batch_size=4, collate_fn=_drawn)
    incident = first(tmp_path, OfNeighbours, loader, precision=precision)
    assert (incident.batch_idx, incident.cause) == (1, "division_by_zero")
    assert incident.samples == tuple(index - 4 for index in bare)
    assert incident.dataset_indices == bare


@pytest.mark.parametrize("bare", [(5,), (4, 7)])
def test_graphs_with_a_label_for_each_node(tmp_path: Path, bare: tuple[int, ...]) -> None:
    class OfNodes(Layer):
        def training_step(self, batch: Graphs, batch_idx: int) -> Tensor:
            source, target = batch.edges
            degree = torch.bincount(target, minlength=len(batch.nodes)).float()
            means = torch.zeros_like(batch.nodes).index_add(0, target, batch.nodes[source]) / degree[:, None]
            return nn.functional.cross_entropy(self.layer(means), batch.label)

    def drawn(graphs: Any) -> Graphs:
        batch = _drawn(graphs)
        batch.label = batch.label[batch.member]
        return batch

    graphs = [_graph(index, bare) for index in range(12)]
    incident = first(tmp_path, OfNodes, DataLoader(graphs, batch_size=4, collate_fn=drawn))
    assert (incident.batch_idx, incident.cause) == (1, "division_by_zero")
    assert incident.samples == tuple(index - 4 for index in bare)
    assert incident.dataset_indices == bare


def test_two_views_of_each_sample(tmp_path: Path) -> None:
    class Model(Layer):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return nn.functional.cross_entropy(self.layer(x), y)

    def both(samples: list[Any]) -> Any:
        views = torch.stack([view for x, _ in samples for view in (x, x + 1)])
        return views, torch.tensor([label for _, label in samples for _ in range(2)])

    data = torch.randn(12, 4)
    data[6, 1] = float("nan")
    loader = DataLoader(list(zip(data, [0, 1, 2] * 4, strict=True)), batch_size=4, collate_fn=both)
    incident = first(tmp_path, Model, loader)
    assert (incident.batch_idx, incident.samples, incident.dataset_indices) == (1, (4, 5), (6, 6))


def test_graphs_whose_nodes_are_noisy_cannot_be_drawn_again(tmp_path: Path) -> None:
    class Noisy(list):
        def __getitem__(self, index: Any) -> Any:
            nodes, edges, label = super().__getitem__(index)
            return nodes + torch.rand(()), edges, label

    graphs = Noisy(_graph(index, (5,)) for index in range(12))
    incident = first(tmp_path, OfNeighbours, DataLoader(graphs, batch_size=4, collate_fn=_drawn))
    assert incident.samples is not None
    assert 1 in incident.samples


# -- rows that were sorted, beside a tensor that has none


def _sorted(samples: list[Tensor]) -> Any:
    rows = torch.stack(sorted(samples, key=lambda sample: -float(sample[1])))
    return rows, torch.arange(7)


class Logarithm(Layer):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        rows, _ = batch
        return (self.layer(rows).mean(1) * rows[:, 0].log()).mean()


def test_rows_beside_a_tensor_without_any(tmp_path: Path) -> None:
    data = torch.rand(12, 4, generator=torch.Generator().manual_seed(0)) + 0.1
    data[6, 0], data[6, 1] = 0.0, 9.0
    incident = first(tmp_path, Logarithm, DataLoader(data, batch_size=4, collate_fn=_sorted))
    assert (incident.batch_idx, incident.samples, incident.dataset_indices) == (1, (0,), (6,))


# -- several loaders whose batches are not of the same size


def _loaders(zero: int, *, nan: bool) -> CombinedLoader:
    generator = torch.Generator().manual_seed(0)
    known = torch.rand(8, 4, generator=generator), torch.arange(8) % 3
    unknown = torch.rand(24, 4, generator=generator) + 0.1
    unknown[zero, 0] = float("nan") if nan else 0.0
    return CombinedLoader(
        {
            "known": DataLoader(TensorDataset(*known), batch_size=2),
            "unknown": DataLoader(TensorDataset(unknown), batch_size=6),
        },
        "min_size",
    )


class HalfSupervised(Layer):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x, y), (u,) = batch["known"], batch["unknown"]
        loss = nn.functional.cross_entropy(self.layer(x), y)
        return loss + (self.layer(u).mean(1) * u[:, 0].log()).mean()


@pytest.mark.parametrize("nan", [True, False])
def test_loaders_of_different_sizes(tmp_path: Path, nan: bool) -> None:
    incident = first(tmp_path, HalfSupervised, _loaders(10, nan=nan))
    assert (incident.batch_idx, incident.samples, incident.dataset_indices) == (1, (4,), None)
    assert incident.cause == ("bad_input" if nan else "log_of_zero")


# -- batches whose classes have slots


@dataclass
class Slotted:
    __slots__ = ("label", "x")
    x: Tensor
    label: Tensor


def test_a_batch_with_slots(tmp_path: Path) -> None:
    class Model(Layer):
        def training_step(self, batch: Slotted, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.layer(batch.x), batch.label)

    data = torch.randn(12, 4)
    data[6, 1] = float("nan")
    samples = list(zip(data, torch.arange(12) % 3, strict=True))
    loader = DataLoader(samples, batch_size=4, collate_fn=lambda chosen: Slotted(*default_collate(chosen)))
    incident = first(tmp_path, Model, loader)
    assert incident.origin is not None
    assert incident.origin.tensor == "batch.x"
    assert (incident.cause, incident.samples, incident.dataset_indices) == ("bad_input", (2,), (6,))


# -- batches that hooks change before the step


class Mixed(Layer):
    """The zero is there only after the hook; what the hook draws is not drawn again."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        batch[0].abs_().add_(torch.rand(()))
        if batch_idx == 1:
            batch[0][2, 0] = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch[0].log_()
        return self.layer(batch[0]).mean()


class Mixing(pl.Callback):
    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        Mixed.on_train_batch_start(module, batch, batch_idx)


class Mixable(Layer):
    training_step = Mixed.training_step


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("make", [Mixed, Mixable])
def test_a_batch_that_a_hook_changes(tmp_path: Path, make: Any, bad: int) -> None:
    data = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    if bad == 0:
        data[:4] = -1e38
        data[1, 1] = float("inf")
    others = [Mixing()] if make is Mixable else []
    incident = first(tmp_path, make, DataLoader(TensorDataset(data), batch_size=4), callbacks=others)
    assert incident.batch_idx == bad
    assert incident.cause == ("log_of_zero" if bad else "bad_input")
    assert incident.samples == (2 if bad else 1,)
