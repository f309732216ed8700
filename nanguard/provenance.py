"""Which sample of the dataset a row of a batch was made of, where a collate function may have moved, dropped or mixed them."""

from __future__ import annotations

import copy
import functools
import operator
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.utils.data import default_collate, default_convert

from nanguard.diagnosis import batch_size, has_rows, take
from nanguard.rng import RngState
from nanguard.trees import map_tensors, named_tensors

__all__ = ["Collation"]

_PLAIN = (default_collate, default_convert)
_MOST_ROWS = 16


@final
class Collation:
    """How a loader makes batches of samples.

    1. torch's own collate functions keep the order of the samples. 2. Any other is asked: a row is made of that sample of which
    a batch that holds nothing else has the same row. So samples that were sorted or refilled are found, and rows that were
    mixed of several have none. 3. Samples are fetched and collated for that in this process, from the same random numbers
    each time, and the random numbers of the run are put back. 4. Batches without a row for each sample, as graphs, hold the
    samples in their order.

    Args:
        dataset: gives a sample for an index.
        collate: makes a batch of a list of samples; `None` where the loader does not batch.
    """

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any] | None) -> None:
        self._dataset = dataset
        self._collate = collate

    def sources(self, indices: Sequence[int], rows: Sequence[int], size: int) -> tuple[int, ...] | None:
        """The samples that rows of a batch were made of, in the order of the rows; `None` where there is no telling.

        Args:
            indices: what the sampler chose for the batch.
            rows: positions in the batch.
            size: number of rows of the batch.
        """
        if self._collate is None or self._collate in _PLAIN:
            return tuple(indices[row] for row in rows) if size == len(indices) else None
        before = RngState.save()
        try:
            found = self._asked(indices, rows, size)
            if found is None and size == len(indices) and self._without_rows(indices, size):
                return tuple(indices[row] for row in rows)
            return found
        except Exception:  # a sample or a batch that cannot be made here tells nothing
            return None
        finally:
            before.restore()

    def parts(self, indices: Sequence[int], batch: Any, size: int) -> Callable[[Sequence[int]], Any] | None:
        """What collates some samples of a batch anew, in the devices and dtypes that it has.

        It is `None` where the rows of the batch can be told apart, or where it cannot be made again as it was.
        """
        if self._collate is None or self._collate in _PLAIN:
            return None
        before = RngState.save()
        try:
            samples = self._samples(indices)
            if not _equal_trees(_like(self._batch(samples), batch), batch):
                return None
            if not self._without_rows(indices, size):
                return None
        except Exception:  # a sample that cannot be made here
            return None
        finally:
            before.restore()

        def collated(positions: Sequence[int]) -> Any:
            before = RngState.save()
            try:
                return _like(self._batch([samples[position] for position in positions]), batch)
            finally:
                before.restore()

        return collated

    def _without_rows(self, indices: Sequence[int], size: int) -> bool:
        """Whether batches have no row for each sample, as graphs have none."""
        samples = self._samples(indices)
        if has_rows(self._batch(samples), size):
            return False
        alone = (self._alone(sample, len(samples)) for sample in samples[:_MOST_ROWS])
        if len({batch_size(batch, size) for batch in alone if batch is not None}) > 1:
            return True  # how many rows there are depends on the samples, as nodes do on the graphs
        return self._asked(indices, sorted({0, size - 1}), size) is None

    def _samples(self, indices: Sequence[int]) -> list[Any]:
        return [_seeded(functools.partial(operator.getitem, self._dataset, index)) for index in indices]

    def _asked(self, indices: Sequence[int], rows: Sequence[int], size: int) -> tuple[int, ...] | None:
        samples = self._samples(indices)
        whole = self._batch(samples)
        if batch_size(whole, size) != size:
            return None
        alone: dict[int, Any] = {}

        def made_of(row: int, position: int) -> bool:
            if position not in alone:
                alone[position] = self._alone(samples[position], len(samples))
            if alone[position] is None:
                return False
            return _same(take(whole, [row], size), take(alone[position], [row], size))

        if len(rows) > _MOST_ROWS:  # spot checks: each costs a batch
            spots = rows[:: len(rows) // _MOST_ROWS]
            kept = size == len(indices) and all(made_of(row, row) for row in spots)
            return tuple(indices[row] for row in rows) if kept else None
        found = []
        for row in rows:
            likely = [row] if row < len(samples) else []
            source = next((p for p in (*likely, *range(len(samples))) if made_of(row, p)), None)
            if source is None:
                return None
            found.append(indices[source])
        return tuple(found)

    def _alone(self, sample: Any, size: int) -> Any:
        """A batch that holds one sample only; `None` where there is none, as of one that is always dropped."""
        try:
            return self._batch([sample] * size)
        except Exception:
            return None

    def _batch(self, samples: list[Any]) -> Any:
        # Collate functions take samples apart, so that each needs one of its own.
        assert self._collate is not None
        collate = self._collate
        return _seeded(lambda: collate([copy.deepcopy(sample) for sample in samples]))


def _seeded(call: Callable[[], Any]) -> Any:
    random.seed(0)
    torch.default_generator.manual_seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    return call()


def _same(row: Any, other: Any) -> bool:
    """Whether two rows hold the same, but for the padding that longer samples beside them call for."""
    pairs = list(zip(named_tensors(row, ""), named_tensors(other, ""), strict=True))
    return bool(pairs) and all(a == b and _equal(left, right) for (a, left), (b, right) in pairs)


def _equal(left: Tensor, right: Tensor) -> bool:
    if left.ndim != right.ndim:
        return False
    extents = [min(pair) for pair in zip(left.shape, right.shape, strict=True)]
    for cut in (lambda length, whole: slice(0, length), lambda length, whole: slice(whole - length, whole)):
        parts = [t[tuple(map(cut, extents, t.shape))] for t in (left, right)]
        if torch.equal(*[part.nan_to_num() for part in parts]) and torch.equal(*[part.isnan() for part in parts]):
            return True
    return False


def _like(batch: Any, model: Any) -> Any:
    """A batch on the devices and in the dtypes of another one of the same structure."""
    known = dict(named_tensors(model, ""))
    paths = {id(tensor): path for path, tensor in named_tensors(batch, "")}
    return map_tensors(lambda tensor: tensor.to(known[paths[id(tensor)]]), batch)


def _equal_trees(one: Any, other: Any) -> bool:
    """Whether two batches hold the same bits."""
    pairs = zip(named_tensors(one, ""), named_tensors(other, ""), strict=True)
    return all(a == b and left.shape == right.shape and _equal(left, right) for (a, left), (b, right) in pairs)
