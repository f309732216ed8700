"""Which samples of a batch do it: delta debugging over sub-batches, and the sub-batches themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nanguard.inputs import copy_tensor
from nanguard.trees import map_tensors, named_tensors

__all__ = ["batch_size", "failing_samples", "take"]

Fails = Callable[[Sequence[int]], "bool | None"]


def batch_size(batch: Any) -> int | None:
    """The length of the leading dimension that the tensors of a batch share, or `None` where they share none."""
    tensors = [tensor for _, tensor in named_tensors(batch, "")]
    sizes = Counter(tensor.shape[0] for tensor in tensors if tensor.ndim > 0 and not tensor.is_nested)
    if not sizes:
        return None
    (size, votes), *others = sizes.most_common()
    return None if others and others[0][1] == votes else size


def take(batch: Any, positions: Sequence[int]) -> Any:
    """The sub-batch of those samples: every tensor with the leading batch dimension is indexed, everything else is
    kept.
    """
    size = batch_size(batch)

    def rows(tensor: Tensor) -> Tensor:
        if tensor.is_nested or tensor.ndim == 0 or tensor.shape[0] != size:
            return copy_tensor(tensor)
        return tensor.index_select(0, torch.tensor(positions, device=tensor.device, dtype=torch.long))

    return map_tensors(rows, batch)


def failing_samples(size: int, fails: Fails, *, most_runs: int = 64) -> tuple[int, ...] | None:
    """All smallest sets of samples that still fail, together (Zeller and Hildebrandt, 2002, ddmin).

    Args:
        size: number of samples in the batch, which as a whole is known to fail.
        fails: whether a sub-batch fails; `None` where it cannot be run, as BatchNorm cannot on one sample.
        most_runs: runs after which what is known so far is returned.

    Returns:
        Positions in ascending order, or `None` where the search ran out of runs before it found one.
    """
    search = _Search(size, fails, most_runs)
    found: list[int] = []
    rest = list(range(size))
    try:
        while rest and (found == [] or search.fails(rest)):
            culprits = search.shrink(rest)
            found += culprits
            rest = [position for position in rest if position not in culprits]
    except _OutOfRuns:
        pass
    return tuple(sorted(found)) or None


class _OutOfRuns(Exception):
    """The search has used up its runs."""


class _Search:
    def __init__(self, size: int, fails: Fails, most_runs: int) -> None:
        self._size = size
        self._test = fails
        self._left = most_runs
        self._healthy: list[int] = []
        self._known: dict[tuple[int, ...], bool | None] = {}

    def fails(self, positions: Sequence[int]) -> bool:
        """Whether a sub-batch fails. One that is too small to run is filled up with samples that are known to be healthy."""
        answer = self._run(positions)
        for padding in (1, 3):
            if answer is not None:
                break
            extra = [position for position in self._healthy_beside(positions) if position not in positions][:padding]
            answer = self._run([*positions, *extra]) if len(extra) == padding else None
        return bool(answer)

    def _run(self, positions: Sequence[int]) -> bool | None:
        key = tuple(positions)
        if key not in self._known:
            if self._left <= 0:
                raise _OutOfRuns
            self._left -= 1
            self._known[key] = self._test(key)
            if self._known[key] is False and len(key) > len(self._healthy):
                self._healthy = list(key)
        return self._known[key]

    def _healthy_beside(self, positions: Sequence[int]) -> list[int]:
        if not self._healthy:
            self._run([position for position in range(self._size) if position not in positions])
        return self._healthy

    def shrink(self, failing: list[int]) -> list[int]:
        """A minimal failing subset of a failing set."""
        pieces = 2
        while len(failing) > 1:
            size = -(-len(failing) // pieces)
            parts = [failing[start : start + size] for start in range(0, len(failing), size)]
            part = next((part for part in parts if self.fails(part)), None)
            if part is not None:
                failing, pieces = part, 2
                continue
            if pieces > 2:
                without = ([entry for entry in failing if entry not in part] for part in parts)
                smaller = next((rest for rest in without if self.fails(rest)), None)
                if smaller is not None:
                    failing, pieces = smaller, max(pieces - 1, 2)
                    continue
            if pieces >= len(failing):
                break
            pieces = min(2 * pieces, len(failing))
        return failing
