"""Sub-batches: which part of a batch is made of samples, and how to take some of them.

1. Usually the rows of all tensors are. 2. A batch of several loaders has parts of different sizes: the part at fault is cut,
and the others stay whole. 3. Graphs and other batches whose tensors have no row for each sample are collated anew.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nanguard.diagnosis.batches import batch_size, take
from nanguard.trees import named_tensors

__all__ = ["Cut", "Parts", "cut_of", "samples_in"]

# Given the indices of a batch and the batch: what collates some of its samples anew, or `None` where rows can be cut.
Parts = Callable[[Sequence[int], Any], "Callable[[Sequence[int]], Any] | None"]


@dataclass(frozen=True, eq=False)
class Cut:
    """How many samples a batch holds, and what makes a batch of some of them, which may be named more than once.

    With `collated` they are those that the loader has chosen, in that order; otherwise they are rows of the batch. `take` gives
    `None` where there is no batch of these alone.
    """

    size: int
    take: Callable[[Sequence[int]], Any]
    collated: bool = False

    def replaced(self, kept: Sequence[int], stand_in: int) -> Any:
        """The same batch with all samples but those replaced by one of them, so that random draws fall as they did."""
        return self.take([position if position in set(kept) else stand_in for position in range(self.size)])


def cut_of(
    batch: Any,
    indices: Sequence[int] | None,
    *,
    path: str | None = None,
    rows: Tensor | None = None,
    parts: Parts | None = None,
) -> Cut | None:
    """How to cut a batch; `None` where it does not show how many samples it holds.

    Args:
        batch: the batch.
        indices: its samples as indices into the dataset, where they are known.
        path: the tensor of it that is at fault, if one is.
        rows: otherwise, which elements of the result of the operation at fault were bad.
        parts: collates samples anew.
    """
    size = batch_size(batch, None if indices is None else len(indices))
    if indices is None:
        key = _part_at_fault(batch, path, rows)
        if key is not None:
            return _cut_inside(batch, key)
    elif parts is not None:
        collated = parts(indices, batch)
        if collated is not None:
            return Cut(len(indices), collated, collated=True)
    return None if size is None else Cut(size, lambda positions: take(batch, positions, size))


def _part_at_fault(batch: Any, path: str | None, rows: Tensor | None) -> Any:
    """The key of the loader's part that is at fault, in a batch with parts of different sizes; `None` for any other."""
    entries: list[tuple[Any, Any]] = []
    if isinstance(batch, dict):
        entries = list(batch.items())
    elif type(batch) in (list, tuple):
        entries = list(enumerate(batch))
    if not entries or any(isinstance(part, (Tensor, str)) or not hasattr(part, "__iter__") for _, part in entries):
        return None
    sizes = {key: batch_size(part) for key, part in entries}
    if None in sizes.values() or len(set(sizes.values())) == 1:
        return None
    if path is not None:
        named = {name: key for key, part in entries for name, _ in named_tensors({key: part}, "batch")}
        return named.get(path)
    length = rows.shape[0] if rows is not None and rows.ndim else None
    found = [key for key, size in sizes.items() if size == length]
    return found[0] if len(found) == 1 else None


def _cut_inside(batch: Any, key: Any) -> Cut:
    size = batch_size(batch[key])
    assert size is not None

    def taken(positions: Sequence[int]) -> Any:
        other = copy.copy(batch) if isinstance(batch, dict) else list(batch)
        other[key] = take(batch[key], positions, size)
        return tuple(other) if isinstance(batch, tuple) else other

    return Cut(size, taken)


def samples_in(mask: Tensor, size: int) -> list[int]:
    """The samples that the marked elements of a tensor belong to; none where it shows no dimension for them."""
    if mask.ndim == 0:
        return []
    for dim in range(min(mask.ndim, 2)):
        length = mask.shape[dim]
        if length and length % size == 0 and (dim == 0 or length == size):
            moved = mask.movedim(dim, 0).reshape(size, -1)
            return list(moved.any(1).nonzero().flatten().tolist())
    return []
