"""Which sample of the dataset a row of a batch was made of, where a collate function may have moved, dropped or mixed them."""

from __future__ import annotations

import copy
import functools
import operator
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, final

import torch
from torch import Tensor
from torch.utils.data import default_collate, default_convert

from nanguard.diagnosis import batch_size, dimension_of, has_rows, take
from nanguard.rng import RngState
from nanguard.trees import map_tensors, named_tensors

__all__ = ["Collation"]

T = TypeVar("T")

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
        return _aside(lambda: self._sources(indices, rows, size))

    def parts(self, indices: Sequence[int], batch: Any) -> Callable[[Sequence[int]], Any] | None:
        """What collates the samples at some positions of a batch anew, in the devices and dtypes that it has.

        `None` where the rows of the batch can be told apart, and where the same samples do not make the same batch again. What
        is returned gives `None` where those samples alone make no batch.
        """
        if self._collate is None or self._collate in _PLAIN:
            return None
        return _aside(lambda: self._parts(indices, batch))

    def _sources(self, indices: Sequence[int], rows: Sequence[int], size: int) -> tuple[int, ...] | None:
        samples = self._samples(indices)
        whole = self._batch(samples)
        found = self._asked(samples, whole, rows, size)
        if found is None and size == len(indices) and self._without_rows(samples, whole):
            return tuple(indices[row] for row in rows)
        return None if found is None else tuple(indices[source] for source in found)

    def _parts(self, indices: Sequence[int], batch: Any) -> Callable[[Sequence[int]], Any] | None:
        samples = self._samples(indices)
        whole = self._batch(samples)
        if not _identical(_like(whole, batch), batch) or not self._without_rows(samples, whole):
            return None
        return lambda positions: _aside(lambda: _like(self._batch([samples[place] for place in positions]), batch))

    def _samples(self, indices: Sequence[int]) -> list[Any]:
        return [_seeded(functools.partial(operator.getitem, self._dataset, index)) for index in indices]

    def _without_rows(self, samples: list[Any], whole: Any) -> bool:
        """Whether a batch shows no rows that are made of one sample each, as graphs that are strung together show none."""
        size = batch_size(whole, len(samples))
        if size is None or self._grows_elsewhere(samples[0], whole, size):
            return True
        if size == len(samples) and has_rows(whole, size):
            return False
        alone = (self._alone(sample, len(samples)) for sample in samples[:_MOST_ROWS])
        if len({batch_size(batch, size) for batch in alone if batch is not None}) > 1:
            return True  # how many rows there are depends on the samples, as nodes do on the graphs
        return self._asked(samples, whole, sorted({0, size - 1}), size) is None

    def _grows_elsewhere(self, sample: Any, whole: Any, size: int) -> bool:
        """Whether samples add up along another dimension than the one that has their number, by chance, as steps of time."""
        trees = (whole, self._alone(sample, 1), self._alone(sample, 2))
        tensors, once, twice = (dict(named_tensors(tree, "")) for tree in trees)
        for path in tensors.keys() & once.keys() & twice.keys():
            dim = dimension_of(tensors[path], size)
            if dim is not None and _grown(once[path], twice[path]) not in (None, dim):
                return True
        return False

    def _asked(self, samples: list[Any], whole: Any, rows: Sequence[int], size: int) -> tuple[int, ...] | None:
        """The positions of the samples that rows of a batch, which has so many, were made of."""
        if batch_size(whole, size) != size:
            return None
        alone: dict[tuple[int, int], Any] = {}

        def made_of(row: int, position: int) -> bool:
            found = take(whole, [row], size)
            for more in (0, 1) if _as_long(samples[position], size) else (0,):
                if (position, more) not in alone:
                    alone[position, more] = self._alone(samples[position], len(samples) + more)
                other = alone[position, more]
                if other is not None and _same(found, take(other, [row], size + more)):
                    return True
            return False

        if len(rows) > _MOST_ROWS:  # spot checks: each costs a batch
            spots = rows[:: len(rows) // _MOST_ROWS]
            kept = size == len(samples) and all(made_of(row, row) for row in spots)
            return tuple(rows) if kept else None
        found = []
        for row in rows:
            likely = [row] if row < len(samples) else []
            source = next((p for p in (*likely, *range(len(samples))) if made_of(row, p)), None)
            if source is None:
                return None
            found.append(source)
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


def _aside(call: Callable[[], T]) -> T | None:
    """What a call gives, `None` where it fails, with the random numbers of the run put back."""
    before = RngState.save()
    try:
        return call()
    except Exception:  # a sample or a batch that cannot be made here tells nothing
        return None
    finally:
        before.restore()


def _grown(one: Tensor, other: Tensor) -> int | None:
    """The first dimension in which two tensors differ in length."""
    pairs = zip(one.shape, other.shape, strict=False)
    return next((dim for dim, (length, longer) in enumerate(pairs) if length != longer), None)


def _as_long(sample: Any, size: int) -> bool:
    """Whether a sample is as long as the batch, so that it does not show in its copies which of the two a dimension is."""
    return any(tensor.ndim > 0 and len(tensor) == size for _, tensor in named_tensors(sample, ""))


def _seeded(call: Callable[[], Any]) -> Any:
    random.seed(0)
    torch.default_generator.manual_seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    return call()


def _same(row: Any, other: Any) -> bool:
    """Whether two rows hold the same, but for the padding that longer samples beside them call for."""
    ours, others = list(named_tensors(row, "")), list(named_tensors(other, ""))
    if not ours or len(ours) != len(others):
        return False
    return all(a == b and _equal(left, right) for (a, left), (b, right) in zip(ours, others, strict=True))


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


def _identical(batch: Any, other: Any) -> bool:
    """Whether two batches hold the same numbers."""
    ours, others = list(named_tensors(batch, "")), list(named_tensors(other, ""))
    return [path for path, _ in ours] == [path for path, _ in others] and all(
        left.shape == right.shape and _equal(left, right) for (_, left), (_, right) in zip(ours, others, strict=True)
    )
