"""Batches as sets of samples: how many there are, and parts of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nanguard.inputs import copy_tensor
from nanguard.trees import attributes_of, map_tensors, named_tensors

__all__ = ["batch_size", "dimension_of", "has_rows", "take"]


def batch_size(batch: Any, expected: int | None = None) -> int | None:
    """How many samples a batch holds, or `None` where there is no telling.

    Args:
        batch: tensors whose leading dimension is the batch, in any structure, or lists with an entry for each sample.
        expected: how many samples the loader has put into it, where that is known.
    """
    found = _lists(batch, expected)
    if expected is not None and not found:
        found = _lists(batch, None)
    lists: Counter[int] = Counter(map(len, found))
    for length in lists:  # records in one list, and as many tensors of equal shape in another
        if expected is None and len(_lists(batch, length)) > len(found):
            return length
    tensors = [tensor for _, tensor in named_tensors(batch, "")]
    shaped = [tensor for tensor in tensors if tensor.ndim > 0 and not tensor.is_nested]
    sizes = Counter(tensor.shape[0] for tensor in shaped)
    if expected is not None and (sizes[expected] or lists[expected] or _second(shaped, sizes, expected)):
        return expected
    inside = Counter(t.shape[0] for entry in found for _, t in named_tensors(entry, "") if t.ndim)
    sizes = sizes - inside + lists
    if not sizes:
        return None
    (size, votes), *others = sizes.most_common()
    return None if others and others[0][1] == votes else size


def _second(tensors: list[Tensor], sizes: Counter[int], expected: int) -> bool:
    """Whether the samples are the second dimension: not where several tensors hold a number of rows for each sample."""
    if any(size % expected == 0 and votes > 1 for size, votes in sizes.items() if size):
        return False
    return any(expected in tensor.shape[:2] for tensor in tensors)


def take(batch: Any, positions: Sequence[int], size: int | None = None) -> Any:
    """The sub-batch of those samples; what does not belong to single samples is kept.

    Args:
        batch: as for `batch_size`.
        positions: of the samples.
        size: how many samples there are, where it is known.
    """
    size = batch_size(batch) if size is None else size

    def rows(tensor: Tensor, dim: int) -> Tensor:
        return tensor.index_select(dim, torch.tensor(positions, device=tensor.device, dtype=torch.long))

    return _mapped(batch, size, rows, lambda entries: [entries[position] for position in positions])


def has_rows(batch: Any, size: int) -> bool:
    """Whether each tensor of a batch has a row for each sample, or stands in a list that has an entry for each."""
    listed = [entry for entry in _lists(batch, size) if len(entry) == size]
    inside = {id(tensor) for entry in listed for _, tensor in named_tensors(entry, "")}
    tensors = [tensor for _, tensor in named_tensors(batch, "") if tensor.ndim and id(tensor) not in inside]
    return all(dimension_of(tensor, size) is not None for tensor in tensors)


def _mapped(
    batch: Any, size: int | None, rows: Callable[[Tensor, int], Tensor], entries: Callable[[list[Any]], list[Any]]
) -> Any:
    lists = {id(value) for value in _lists(batch, size) if len(value) == size}

    def change(tensor: Tensor) -> Tensor:
        dim = dimension_of(tensor, size)
        return copy_tensor(tensor) if dim is None else rows(tensor, dim)

    def whole(value: Any) -> Any:
        if id(value) not in lists:
            return None
        return type(value)(map_tensors(copy_tensor, entry) for entry in entries(list(value)))

    return map_tensors(change, batch, whole=whole)


def dimension_of(tensor: Tensor, size: int | None) -> int | None:
    """The dimension along which a tensor holds that many samples, `None` where it holds something else."""
    if tensor.is_nested or size is None:
        return None
    if tensor.ndim and tensor.shape[0] == size:
        return 0
    return 1 if tensor.ndim > 1 and tensor.shape[1] == size else None


def _lists(value: Any, expected: int | None, depth: int = 0) -> list[Any]:
    """The lists (and plain tuples) that hold an entry for each sample: tensors of different lengths, texts, records."""
    if depth > 8 or isinstance(value, (str, bytes, Tensor)):
        return []
    if type(value) in (list, tuple):
        if _of_samples(value, expected):
            return [value]
        return [found for child in value for found in _lists(child, expected, depth + 1)]
    if isinstance(value, dict):
        return [found for child in value.values() for found in _lists(child, expected, depth + 1)]
    if not callable(value):
        return [found for _, child in attributes_of(value) for found in _lists(child, expected, depth + 1)]
    return []


def _of_samples(values: Any, expected: int | None) -> bool:
    if not values or len({type(value) for value in values}) != 1 or len(values) != (expected or len(values)):
        return False
    if isinstance(values[0], Tensor):
        lengths = {tensor.shape[0] if tensor.ndim else 0 for tensor in values}
        if expected is not None:
            return lengths != {expected}
        return len(lengths) > 1 and len(values) > 2 and len({tensor.ndim for tensor in values}) == 1
    if isinstance(values[0], dict):  # samples that nobody has collated, rather than two batches
        return len(values) > 1 and len({tuple(value) for value in values}) == 1
    if type(values[0]) in (list, tuple):
        if len(values) < 2 or len({len(value) for value in values}) != 1 or len(values[0]) == len(values):
            return False
        return not _columns(values)
    return isinstance(values[0], (str, int, float, bytes))


def _columns(values: Any) -> bool:
    """Whether lists hold the images of all samples, their targets, and so on, rather than what belongs to one sample."""
    kinds = [{type(entry) for entry in value} for value in values]
    return all(len(found) == 1 for found in kinds) and len(set().union(*kinds)) > 1
