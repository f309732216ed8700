"""Which samples of the dataset are in the batch: a recorder around a DataLoader's sampler."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, final

from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, Subset

from nanguard.patches import Patches
from nanguard.provenance import Collation

__all__ = ["IndexRecorder", "SampleRecord", "base_indices", "indices_in_order"]


@final
class IndexRecorder:
    """Stands in for a (batch) sampler: passes on what it gives, and remembers it until the batch arrives.

    Args:
        sampler: the loader's ``batch_sampler``, or its ``sampler`` where it does not batch.
        before_fetch: called after the sampler has chosen and before the loader fetches, in the order of the batches; what
            it returns is remembered with the batch.
    """

    def __init__(self, sampler: Any, before_fetch: Callable[[], Any] | None = None) -> None:
        self._sampler = sampler
        self._before_fetch = before_fetch
        self._pending: deque[Any] = deque()

    def __iter__(self) -> Iterator[Any]:
        self._pending.clear()
        return self._recorded(iter(self._sampler))

    def _recorded(self, chosen: Iterator[Any]) -> Iterator[Any]:
        for entry in chosen:
            self._pending.append((entry, self._before_fetch() if self._before_fetch is not None else None))
            yield entry

    def __len__(self) -> int:
        return len(self._sampler)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_sampler":
            raise AttributeError(name)
        return getattr(self._sampler, name)

    def next_batch(self) -> tuple[tuple[int, ...] | None, Any]:
        """The indices of the next batch to arrive, or `None` where they are not integers, and what `before_fetch` gave."""
        if not self._pending:
            return None, None
        entry, moment = self._pending.popleft()
        entries = entry if isinstance(entry, (list, tuple)) else [entry]
        try:
            return tuple(operator.index(index) for index in entries), moment
        except TypeError:
            return None, moment

    @classmethod
    def install(cls, loader: Any, patches: Patches, before_fetch: Callable[[], Any] | None) -> IndexRecorder | None:
        """Puts a recorder into a loader; `None` where batches and samples cannot be told from each other.

        That is the case for streams, for loaders of other libraries and where batches may arrive out of order.
        """
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            return None
        if not getattr(loader, "in_order", True):
            return None
        name = "batch_sampler" if loader.batch_sampler is not None else "sampler"
        # With workers the sampler runs ahead of the batches, so the moment of a fetch says nothing.
        recorder = cls(getattr(loader, name), before_fetch if loader.num_workers == 0 else None)
        patches.set(loader, name, recorder)
        return recorder


@final
class SampleRecord:
    """Which samples the batches of one training loader hold, while loaders come and go.

    Args:
        before_fetch: as for `IndexRecorder`.
    """

    def __init__(self, before_fetch: Callable[[], Any]) -> None:
        self._before_fetch = before_fetch
        self._patches = Patches()
        self._datasets: list[Any] = []
        self._collation: Collation | None = None
        self._recorder: IndexRecorder | None = None
        self._under_way = False

    def watch(self, loader: Any) -> None:
        """Takes note of a training loader that is about to be used; one after the first batch begins a new set of them."""
        if self._under_way:
            self.close()
        self._datasets.append(getattr(loader, "dataset", None))
        if len(self._datasets) == 1:
            self._recorder = IndexRecorder.install(loader, self._patches, self._before_fetch)
            self._collation = _collation(loader)

    def next_batch(self) -> tuple[tuple[int, ...] | None, Any]:
        """Indices into the dataset of the batch that has just arrived, and what `before_fetch` gave.

        The indices are `None` where there is no telling: for streams, and for several loaders, where an index would not say
        into which dataset.
        """
        self._under_way = True
        if self._recorder is None:
            return None, None
        indices, moment = self._recorder.next_batch()
        return base_indices(self._datasets[0], indices) if len(self._datasets) == 1 else None, moment

    def sources(self, indices: Sequence[int], rows: Sequence[int], size: int) -> tuple[int, ...] | None:
        """Which of these samples rows of their batch, which has so many, were made of; see `Collation.sources`."""
        return self._collation.sources(indices, rows, size) if self._collation is not None else None

    def parts(self, indices: Sequence[int], batch: Any) -> Callable[[Sequence[int]], Any] | None:
        """What collates some samples of a batch anew, where its rows cannot be cut; see `Collation.parts`."""
        return self._collation.parts(indices, batch) if self._collation is not None else None

    def close(self) -> None:
        """Gives the loaders their samplers back."""
        self._under_way = False
        self._datasets.clear()
        self._recorder = self._collation = None
        self._patches.undo()


def _collation(loader: Any) -> Collation | None:
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    dataset = loader.dataset
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return Collation(dataset, loader.collate_fn if loader.batch_sampler is not None else None)


def indices_in_order(loader: Any, batch_idx: int) -> tuple[int, ...] | None:
    """The samples of a batch as indices into the dataset, of a loader that goes through it in order; `None` of any other."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    sampler = loader.batch_sampler
    if type(sampler) is not BatchSampler or type(sampler.sampler) is not SequentialSampler:
        return None
    first = batch_idx * sampler.batch_size
    return base_indices(loader.dataset, tuple(range(first, min(first + sampler.batch_size, len(sampler.sampler)))))


def base_indices(dataset: Any, indices: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Indices into a `Subset` (of a `Subset` ...) as indices into the dataset beneath."""
    if indices is None:
        return None
    while isinstance(dataset, Subset):
        table = dataset.indices
        indices = tuple(int(table[index]) for index in indices)
        dataset = dataset.dataset
    return indices
