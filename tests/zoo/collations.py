"""Batches whose samples are not the rows of their tensors."""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader

from zoo.base import SIZE, Whole, bug, changed


def _detections():
    samples = changed(lambda x, s: (x.expand(3, 4), {"boxes": torch.ones(2, 4) * s, "labels": torch.ones(2)}))
    return DataLoader(samples, batch_size=SIZE, collate_fn=lambda batch: tuple(zip(*batch, strict=True)))


@bug("aten.log", "log_of_zero", data=_detections)
class ImagesBesideTheirTargets(Whole):
    """A tuple of all images, and one of all targets: two columns, and no two samples."""

    def loss_of(self, batch):
        images, targets = batch
        sizes = torch.stack([target["boxes"].log().mean() for target in targets])  # <- here
        return (self.body(torch.stack(images)).mean((1, 2)) * sizes).mean()


def _strung_together(graphs):
    sizes = torch.tensor([len(nodes) for nodes, _ in graphs])
    return {
        "nodes": torch.cat([nodes for nodes, _ in graphs]),
        "degrees": torch.cat([degrees for _, degrees in graphs]),
        "graph": torch.arange(len(graphs)).repeat_interleave(sizes),
    }


def _graphs():
    generator = torch.Generator().manual_seed(5)
    sizes = torch.randint(2, 6, (3 * SIZE,), generator=generator).tolist()
    samples = changed(lambda x, s: (x.expand(size := sizes.pop(), 4), s.expand(size)))
    return DataLoader(samples, batch_size=SIZE, collate_fn=_strung_together)


@bug("aten.reciprocal", "division_by_zero", data=_graphs)
class IsolatedNodes(Whole):
    """Graphs of different sizes in one, of which no row is a sample."""

    def loss_of(self, batch):
        shares = 1 / batch["degrees"]  # <- here
        values = self.body(batch["nodes"]).mean(1) * shares
        return torch.zeros(int(batch["graph"].max()) + 1).index_add(0, batch["graph"], values).mean()


def _as_columns(samples):
    return tuple(torch.stack(column, 1) for column in zip(*samples, strict=True))


def _time_first():
    samples = changed(lambda x, s: (x.expand(SIZE, 4), torch.cat([s, torch.ones(SIZE - 1)])))
    return DataLoader(samples, batch_size=SIZE, collate_fn=_as_columns)


@bug("aten.log", "log_of_zero", data=_time_first)
class AsManyStepsAsSamples(Whole):
    """Which dimension is that of the samples shows when one of them is collated alone."""

    def loss_of(self, batch):
        x, scale = batch
        return (self.body(x).mean(-1) * scale.log()).mean()  # <- here
