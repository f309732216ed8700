"""Which elements of a gradient are 0 because the program masked, overwrote or left out what they belong to.

1. A node of the backward pass that chooses elements gives 0 to all others. 2. What element-wise operations make of such a 0
is one as well, if it is 0, and so is a sum of them, and any 0 that another operation makes of them. 3. A 0 that comes about
otherwise, as behind a `relu`, is none.
"""

from __future__ import annotations

from functools import reduce
from typing import Any, final

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from nanguard.diagnosis.operations import Operation, broadcast_to
from nanguard.diagnosis.records import storage_of
from nanguard.diagnosis.statistics import anywhere, plain, zeros_of

__all__ = ["MaskedGradients"]

# Nodes of the backward pass that give a gradient of 0 to what the program has masked out, not chosen, or overwritten.
_CHOOSERS = tuple(
    f"{name}Backward"
    for name in (
        *("Where", "MaskedFill", "MaskedSelect", "MaskedScatter", "NanToNum", "Triu", "Tril"),
        *("Index", "IndexSelect", "Select", "Slice", "Gather", "Take", "Diagonal", "Unbind", "Split"),
        *("IndexPut", "IndexFill", "IndexCopy", "Scatter", "SelectScatter", "SliceScatter", "DiagonalScatter"),
        *("Fill", "Copy"),
    )
)
_OVERWRITES = "CopySlices"
_SWEEP = 64


@final
class MaskedGradients:
    """The masked elements of all gradients in one recording, for each piece of memory as a whole."""

    def __init__(self) -> None:
        self._places: dict[int, tuple[StorageWeakRef, Tensor]] = {}
        self._next_sweep = _SWEEP

    def of(self, tensor: Tensor) -> Tensor | None:
        """Which elements of a gradient are 0 because of a mask, a boolean tensor of its shape; `None` for nowhere."""
        found = self._places.get(storage_of(tensor)) if plain(tensor) and not tensor.is_nested else None
        if found is None or not _fits(tensor, found[1]):
            return None
        return found[1].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def follow(self, known: Operation, call: Any, tensors: list[Tensor], results: list[Tensor]) -> None:
        """Takes note of what an operation of the backward pass has made.

        Args:
            known: the operation.
            call: the overload with its arguments.
            tensors: what it was given.
            results: what it has made.
        """
        if known.view:
            return  # the same memory
        chooses = _chooses()
        given = [mask for tensor in tensors if (mask := self.of(tensor)) is not None]
        given += _factors(known, tensors)
        if known.name == "aten.sum" and given and not chooses:
            given = [_of_a_sum(call, given[0])]
        for tensor in results:
            if plain(tensor) and not tensor.is_nested:
                self._note(tensor, _masked(known, tensor, given, chooses))

    def _note(self, tensor: Tensor, mask: Tensor | None) -> None:
        storage = storage_of(tensor)
        found = self._places.get(storage)
        if mask is None and (found is None or tensor.numel() >= found[1].numel()):
            self._places.pop(storage, None)
            return
        if found is None or not _fits(tensor, found[1]):
            length = tensor.untyped_storage().nbytes() // tensor.element_size()
            flat = torch.zeros(length, dtype=torch.bool, device=tensor.device)
            found = self._places[storage] = (StorageWeakRef(tensor.untyped_storage()), flat)
        places = found[1].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        if mask is None:
            places.zero_()
        else:
            places.copy_(mask)
        self._sweep()

    def _sweep(self) -> None:
        """Forgets memory that is gone."""
        if len(self._places) < self._next_sweep:
            return
        self._places = {storage: entry for storage, entry in self._places.items() if not entry[0].expired()}
        self._next_sweep = max(_SWEEP, 2 * len(self._places))


def _fits(tensor: Tensor, flat: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() // tensor.element_size() == flat.numel()


def _masked(known: Operation, tensor: Tensor, given: list[Tensor], chooses: bool) -> Tensor | None:
    """Which elements of a result are 0 because of a mask.

    Args:
        known: the operation.
        tensor: its result.
        given: the masked elements of what it was given.
        chooses: whether it chooses elements itself.
    """
    if not chooses and not given:
        return None
    zero = zeros_of(tensor)
    if not chooses and (known.pointwise or known.name == "aten.sum"):
        carried = [broadcast_to(mask, zero.shape) for mask in given]
        places = [mask for mask in carried if mask is not None]
        if len(places) == len(carried):
            zero &= reduce(torch.logical_or, places)
    return zero if anywhere(zero) else None


def _of_a_sum(call: Any, mask: Tensor) -> Tensor:
    """Where all that is added up is masked."""
    func, args, kwargs = call
    return func((~mask).float(), *args[1:], **kwargs) == 0  # type: ignore[no-any-return]


def _chooses() -> bool:
    """Whether the node of the backward pass that is running gives a gradient of 0 to what was left out."""
    return _node().startswith((*_CHOOSERS, _OVERWRITES))


def _factors(known: Operation, tensors: list[Tensor]) -> list[Tensor]:
    """Where the masks are 0 that the program has multiplied by; a mask that was divided by its sum is one, too."""
    if known.name != "aten.mul" or not _node().startswith(("MulBackward", "DotBackward")):
        return []
    return [zeros_of(tensor) for tensor in tensors[1:] if not tensor.requires_grad and _is_mask(tensor)]


def _node() -> str:
    node = torch._C._current_autograd_node()
    return node.name().rpartition("::")[2] if node is not None else ""


def _is_mask(tensor: Tensor) -> bool:
    """Whether a tensor holds 0 and one other number up to 1; those of a dropout, which is no mask, are larger."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.numel() < 2:
        return False
    other = tensor.abs().max() if tensor.dtype is not torch.bool else torch.ones((), device=tensor.device)
    two = (tensor == 0).any() & ((tensor == 0) | (tensor == other)).all() & (other > 0) & (other <= 1)
    return bool(two)
