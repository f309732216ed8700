"""Where values come from: whether from the batch, from which weights, and out of which functions.

1. Each piece of memory has a `Descent`; that of a result is made of those of what the operation was given. 2. A trait begins
at a function, such as ``exp``, and ends where arithmetic ends: what a layer makes of a softmax is no probability.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from nanguard.diagnosis.naming import clean_name
from nanguard.diagnosis.operations import Operation
from nanguard.diagnosis.records import Descent, Source, storage_of
from nanguard.diagnosis.traits import begins, carried_on

__all__ = ["Descents"]

Given = tuple[Descent | float, ...]

_MOST_WEIGHTS = 4


_NOWHERE = Descent()
# What tells a program of the numbers in a tensor: as one of its own, or by the length of the result.
_READS = frozenset(
    f"aten.{name}" for name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim")
)


@final
class Descents:
    """The descent of all memory in one recording.

    Args:
        root: module whose parameters and buffers are told apart by name.
        batch: memory that comes from the batch.
        informed: whether the batch holds numbers itself.

    Attributes:
        informed: whether the program has numbers of the batch: given, read out of its tensors, or counts of their elements.
    """

    def __init__(self, root: nn.Module, batch: Iterable[int], *, informed: bool = False) -> None:
        self._known = {storage_of(tensor): _leaf("buffer", name) for name, tensor in root.named_buffers()}
        self._known |= {storage_of(tensor): _leaf("parameter", name) for name, tensor in root.named_parameters()}
        self._known |= {storage: Descent(batch=True) for storage in batch}
        self.informed = informed
        self._storages: dict[int, StorageWeakRef] = {}  # a weak reference keeps the address from being used again

    def given(self, values: list[Any]) -> Given:
        """The descent of what an operation is given, in order; numbers stand for themselves."""
        return tuple(self._of(value) if isinstance(value, Tensor) else float(value) for value in values)

    def follow(
        self,
        known: Operation,
        given: Given,
        tensors: list[Tensor],
        results: list[Tensor],
        sources: list[Source],
    ) -> None:
        """Takes note of what an operation has made of what it was given."""
        if known.name in _READS or (known.name == "aten.index" and any(t.dtype is torch.bool for t in tensors[1:])):
            self.informed |= any(isinstance(entry, Descent) and entry.batch for entry in given)
        made = [self._identity(tensor) for tensor in results]
        if not (known.view and all(storage in self._known for storage in made)):
            descent = _descent(known.name, given, tensors, sources)
            number = replace(descent, traits={})  # the place of a probability is none
            for tensor, storage in zip(results, made, strict=True):
                self._known[storage] = descent if tensor.is_floating_point() or tensor.is_complex() else number

    def _of(self, tensor: Tensor) -> Descent:
        return self._known.get(self._identity(tensor), _NOWHERE)

    def _identity(self, tensor: Tensor) -> int:
        """The identity of a tensor's memory, which from now on is nobody else's."""
        storage = storage_of(tensor)
        if storage not in self._storages and tensor.layout is torch.strided and not tensor.is_nested:
            self._storages[storage] = StorageWeakRef(tensor.untyped_storage())
        return storage


def _leaf(kind: str, name: str) -> Descent:
    return Descent(weights=frozenset([f"the {kind} {clean_name(name)}"]), leaf=True)


def _descent(kernel: str, given: Given, tensors: list[Tensor], sources: list[Source]) -> Descent:
    parents = [entry for entry in given if isinstance(entry, Descent)]
    weights = frozenset[str]().union(*(entry.weights for entry in parents))
    traits = dict(carried_on(kernel, [entry.traits if isinstance(entry, Descent) else entry for entry in given]))
    if tensors:
        traits |= begins(kernel, [entry for entry in given if isinstance(entry, float)], tensors[0])
    masked = _masked_exponential(kernel, sources)
    if kernel == "aten.sum" and _whole_rows(parents[:1], tensors, given):
        traits["masked row"] = ""
    return Descent(
        any(entry.batch for entry in parents),
        weights if len(weights) <= _MOST_WEIGHTS else frozenset(sorted(weights)[:_MOST_WEIGHTS]),
        traits=traits,
        masked=masked,
    )


def _masked_exponential(kernel: str, sources: list[Source]) -> Tensor | None:
    """Where an exponential is that of a mask."""
    if kernel not in ("aten.exp", "aten.exp2") or len(sources) != 1 or sources[0].value.meant is None:
        return None
    value = sources[0].value
    return value.meant & torch.isneginf(value.tensor)  # type: ignore[operator]


def _whole_rows(parents: list[Descent], tensors: list[Tensor], given: Given) -> bool:
    """Whether a sum of exponentials has rows of which nothing is left."""
    mask = parents[0].masked if parents else None
    if mask is None or mask.shape != tensors[0].shape:
        return False
    for dim in sorted(int(entry) for entry in given[1:] if isinstance(entry, float)) or range(mask.ndim):
        mask = mask.all(dim, keepdim=True)
    return bool(mask.any())
