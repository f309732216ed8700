"""Judging one non-finite result: what of it is meant, what is new, and what the operation was given there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanguard.diagnosis.operations import COPIES, JUDGED, broadcast_to
from nanguard.diagnosis.records import Descent, Evidence, Record, Source, Value, storage_of
from nanguard.diagnosis.statistics import anywhere, describe_tensor, plain

__all__ = ["evidence_of", "judged", "reaches"]

Spots = tuple[Tensor, ...]
_FEW = 256
_DEEPEST = 8
_EXTREMES = {("aten.max", "aten.amax"): -math.inf, ("aten.min", "aten.amin"): math.inf}


def judged(record: Record, tensor: Tensor, mask: Tensor, wanted: bool) -> Value:
    """A non-finite result, told apart into what is bad and what is meant.

    Args:
        record: the operation with its sources.
        tensor: its result.
        mask: where that is not finite.
        wanted: whether the operation was given an infinite number, as `masked_fill` is.
    """
    value = Value(tensor.detach(), bad=mask)
    if record.backward:  # nobody means an infinite gradient
        return value
    meant = _union(record, [source for source in record.sources if source.value.meant is not None], "meant", mask)
    if meant is None and not wanted:
        record.mask_like = _logarithm_of_a_mask(record)
        return value
    bad = _union(record, [source for source in record.sources if source.value.bad is not None], "bad", mask)
    allowed = torch.isinf(tensor) & (torch.ones_like(mask) if wanted or meant is None else meant)
    if bad is not None:
        allowed &= ~bad
    if anywhere(allowed):
        value.meant = allowed
        left = mask & ~allowed
        value.bad = left if anywhere(left) else None
    return value


def _union(record: Record, sources: list[Source], kind: str, mask: Tensor) -> Tensor | None:
    """The elements of the result that such elements of the inputs reach; all of them where that cannot be told."""
    if not sources:
        return None
    found = torch.zeros_like(mask)
    for source in sources:
        part = getattr(source.value, kind)
        spread = reaches(record, source, part, mask)
        if spread is None:
            return torch.ones_like(mask)
        found |= spread
    return found


def reaches(record: Record, source: Source, part: Tensor, result: Tensor) -> Tensor | None:
    """Which elements of the result some elements of an input reach; `None` where the operation is not element-wise."""
    if not record.pointwise:
        return None
    # A number may lie on the CPU and all else on another device.
    spread = broadcast_to(part.to(result.device), result.shape)
    if spread is None:
        return None
    chosen = chosen_where(record, source)
    if chosen is not None:
        fitting = broadcast_to(chosen.to(result.device), result.shape)
        if fitting is not None:
            return spread & fitting
    return spread


def chosen_where(record: Record, source: Source) -> Tensor | None:
    """Where a `where` or a `masked_fill` takes this input."""
    if record.selector is None:
        return None
    tensors = [value for value in record.inputs if isinstance(value, Tensor)]
    if record.kernel == "aten.masked_fill":
        return record.selector
    if len(tensors) < 3 or same_place(tensors[1], tensors[2]):
        return None
    return record.selector if same_place(tensors[1], source.value.tensor) else ~record.selector


def same_place(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same view of the same memory."""
    return (
        storage_of(one) == storage_of(other)
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.storage_offset() == other.storage_offset()
    )


def evidence_of(
    record: Record,
    tensor: Tensor,
    given: list[Any],
    masked: Callable[[Tensor], Tensor | None],
    *,
    continued: bool = False,
) -> Evidence | None:
    """What made the elements of a result bad that no input accounts for; `None` where there are no such elements.

    Args:
        record: the operation, with its sources and its result.
        tensor: the result.
        given: tensors and numbers that it was given, in order.
        masked: which elements of a gradient are 0 because a mask of the program made them so.
        continued: whether to look at all bad elements, also those that came in.
    """
    bad = record.values[0].bad
    if bad is None:
        return None
    carriers = [source for source in record.sources if source.value.bad is not None]
    new = bad
    if not continued and carriers:
        if not record.pointwise:
            return None
        known = _union(record, carriers, "bad", bad)
        new = bad if known is None else bad & ~known
        if not anywhere(new):
            return None
    tensors = [value for value in given if isinstance(value, Tensor)]
    spots = torch.unravel_index(new.flatten().nonzero().flatten()[:_FEW], new.shape)
    nan = torch.isnan(tensor[spots])
    zeros: list[Tensor] = []
    if record.backward and bool(nan.all()):  # only a NaN can be 0 * inf or 0 / 0
        found = [(value, _at(value, new.shape, spots)) for value in tensors if plain(value)]
        zeros = [value for value, at in found if at is not None and bool((at == 0).all())]
    zero, nan_there = bool(zeros), bool(nan.any())
    by_mask = any(_masked_at(masked(value), new.shape, spots) for value in zeros)
    if continued:
        return Evidence(new, nan=nan_there, zero=zero, masked=by_mask)
    meant = any(source.value.meant is not None for source in record.sources)
    numbers = [torch.tensor(float(v), dtype=torch.float64) for v in given if not isinstance(v, Tensor)]
    shown = tensors + (numbers if record.kernel in JUDGED else [])
    guilty = tuple(_values(value, new.shape, spots) for value in given)
    return Evidence(
        new,
        stats=tuple(describe_tensor(f"input {i}", value) for i, value in enumerate(shown)),
        guilty=guilty,
        nan=nan_there,
        zero=zero,
        masked=by_mask,
        meant=meant,
        row=record.row_masked or _normalised(record, guilty) or (meant and nan_there and _of_masked_rows(record)),
        independent=tuple(i for i, value in enumerate(record.given) if not _may_depend(value, record.informed)),
        pointwise=record.pointwise,
    )


def _may_depend(value: Descent | float, informed: bool) -> bool:
    """Whether a value may depend on the batch; numbers and constants may, once the program has numbers of it."""
    if isinstance(value, float):
        return informed
    return value.batch or (informed and not value.weights)


def _values(value: Any, shape: torch.Size, spots: Spots) -> Tensor:
    """An input's values at some elements of the result; none where the two have nothing to do with each other."""
    if not isinstance(value, Tensor):
        return torch.tensor([float(value)], dtype=torch.float64)
    at = _at(value, shape, spots)
    return torch.empty(0) if at is None else (at.abs() if at.is_complex() else at).double()


def _masked_at(mask: Tensor | None, shape: torch.Size, spots: Spots) -> bool:
    at = None if mask is None else _at(mask, shape, spots)
    return at is not None and bool(at.all())


def _at(value: Tensor, shape: torch.Size, spots: Spots) -> Tensor | None:
    if value.layout is not torch.strided or value.is_nested:
        return None
    spread = broadcast_to(value.detach(), shape)
    return None if spread is None else spread[tuple(entry.to(value.device) for entry in spots)]


def _normalised(record: Record, guilty: tuple[Tensor, ...]) -> bool:
    """Whether a row that is masked altogether has its own maximum or logsumexp subtracted: a softmax, written out."""
    if record.kernel != "aten.sub":
        return False
    makers = [maker for source in record.sources for maker in _makers(source) if maker.row_masked]
    if any(maker.kernel == "aten.logsumexp" for maker in makers):
        return True
    # Where the maximum of a row is -inf, all of it is; other infinities that meet say nothing of their rows.
    for extremes, value in _EXTREMES.items():
        if all(bool((values == value).all()) for values in guilty):
            found = [maker for maker in makers if maker.kernel in extremes]
            return any(_is_of(maker, source) for maker in found for source in record.sources)
    return False


def _of_masked_rows(record: Record, depth: int = 0) -> bool:
    """Whether all infinities that an operation was given are what logsumexp makes of rows that are masked altogether."""
    meant = [source for source in record.sources if source.value.meant is not None]
    writers = [write.record for source in meant for write in source.writes]
    if not writers or depth > _DEEPEST:
        return False
    return all(
        (maker.row_masked and maker.kernel == "aten.logsumexp") or _of_masked_rows(maker, depth + 1)
        for maker in writers
    )


def _makers(source: Source) -> list[Record]:
    """The operations that an input comes from, beyond copies and casts."""
    found = []
    for write in source.writes:
        while write.record.kernel in COPIES and len(write.record.sources) == 1 and write.record.sources[0].writes:
            write = write.record.sources[0].writes[-1]
        found.append(write.record)
    return found


def _is_of(maker: Record, source: Source) -> bool:
    """Whether a reduction was given just this input, or a copy of it."""
    given, tensor = [entry.value.tensor for entry in maker.sources], source.value.tensor
    return any(same_place(one, tensor) or (one.shape == tensor.shape and bool((one == tensor).all())) for one in given)


def _logarithm_of_a_mask(record: Record) -> bool:
    """Whether it is the logarithm of zeros and ones that nobody learns: a mask, spelled ``mask.log()``."""
    if record.kernel != "aten.log" or not record.inputs or not isinstance(record.inputs[0], Tensor):
        return False
    tensor = record.inputs[0]
    return not tensor.requires_grad and bool(((tensor == 0) | (tensor == 1)).all())
