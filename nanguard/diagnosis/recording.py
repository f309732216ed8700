"""A recording of one forward and backward pass: which operation turned what into something non-finite.

1. Every result is judged once, by its sum where that is finite; what shares memory with a finite tensor is not judged again.
2. A non-finite element is bad, or it is meant (see `nanguard.diagnosis.records`). 3. An operation whose result is bad where
its inputs were not keeps evidence: statistics of its inputs, and their values at those elements. 4. Who wrote which
part of which memory is remembered for non-finite values only, and keeps that memory alive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from nanguard.diagnosis.descent import Descents
from nanguard.diagnosis.evidence import evidence_of, judged, same_place
from nanguard.diagnosis.masking import MaskedGradients
from nanguard.diagnosis.naming import function_of, module_names, place_here, recomputing
from nanguard.diagnosis.operations import JUDGED, ROWS, STATISTICS, Operation, arguments, operation, row_masked
from nanguard.diagnosis.records import Record, Source, Value, Write, storage_of
from nanguard.diagnosis.regions import covers, key_of, told_apart
from nanguard.diagnosis.statistics import nonfinite, plain, stored

__all__ = ["Trace"]

_sequence_number: Callable[[], int] = torch._C._autograd._get_sequence_nr


@final
class Trace(TorchDispatchMode):
    """Records while it is active. It synchronises after every operation: for the autopsy only.

    It raises `RuntimeError` where the step talks to other processes, which are not there to answer.

    Args:
        root: module whose submodules give the operations their place.
        batch: tensors that come from the batch, whose infinities nobody can have meant.
        weights: the same of parameters and buffers.
        informed: whether the batch holds more than tensors, such as numbers.
    """

    def __init__(
        self,
        root: nn.Module,
        batch: Iterable[Tensor] = (),
        weights: Iterable[Tensor] = (),
        *,
        informed: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = module_names(root)
        self._stack: list[str] = [""]
        self._count = 0
        self._numbered = _sequence_number()
        self._late = False
        from_batch = {storage_of(stored(tensor)) for tensor in batch}
        self._suspects = {*from_batch, *(storage_of(stored(tensor)) for tensor in weights)}
        self._descents = Descents(root, from_batch, informed=informed)
        self._masked = MaskedGradients()
        self._made: set[int] = set()
        self._seen: set[tuple[Any, ...]] = set()
        self._kept: list[Tensor] = []
        self.bad: dict[int, list[Write]] = {}
        self.outside: dict[int, list[Value]] = {}
        self.forward: dict[int, Record] = {}
        self.modules: dict[tuple[Any, ...], str] = {}

    @contextmanager
    def recording(self) -> Iterator[Trace]:
        """Active inside the block, also for the modules that are called in it."""
        before = register_module_forward_pre_hook(lambda module, args: self._stack.append(self._place(module)))
        after = register_module_forward_hook(lambda module, args, out: self._leave(), always_call=True)
        try:
            with self:
                yield self
        finally:
            before.remove()
            after.remove()
            del self._stack[1:]

    @contextmanager
    def users_backward(self) -> Iterator[None]:
        """What the user's own code does inside the block is done to gradients, and counts as part of the backward pass."""
        self._late = True
        try:
            yield
        finally:
            self._late = False

    def _place(self, module: nn.Module) -> str:
        return self._names.get(id(module), self._stack[-1])

    def _leave(self) -> None:
        if len(self._stack) > 1:
            self._stack.pop()

    # -- one operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = operation(func)
        if known.collective:
            raise RuntimeError(f"{known.name}: a collective of all processes cannot be run again by one of them")
        given = _stored(arguments((*args, *kwargs.values())) if kwargs else arguments(args))
        tensors = [value for value in given if isinstance(value, Tensor)]
        if any(tensor.is_meta for tensor in tensors):  # it is after the shape of a result
            return func(*args, **kwargs)
        # Before the call: an in-place operation overwrites what it was given.
        read = tensors
        if known.name in STATISTICS and len(args) > 5 and args[5] is True:
            read = [tensor for tensor in tensors if tensor is not args[3] and tensor is not args[4]]
        sources = [source for source in map(self._source, read) if source is not None]
        overwrites = bool(known.written) and known.name in JUDGED
        kept = [value.clone() if overwrites and isinstance(value, Tensor) else value for value in given]
        descents = self._descents.given(given)
        result = func(*args, **kwargs)
        results = [value for value in _stored(arguments([result])) if isinstance(value, Tensor)]
        record = self._record(known)
        record.given, record.informed = descents, self._descents.informed
        self._descents.follow(known, descents, tensors, results, sources)
        if record.backward:
            self._masked.follow(known, (func, args, kwargs), tensors, results)
        if known.empty:
            self._made.update(storage_of(tensor) for tensor in results)
            return result
        if known.view:
            if not sources:
                self._seen.update(key_of(tensor) for tensor in results if storage_of(tensor) not in self._made)
            return result
        returned = {id(tensor) for tensor in results}
        written = [_argument(args, kwargs, *place) for place in known.written]
        outputs = results + [
            value for value in _stored(arguments(written)) if isinstance(value, Tensor) and id(value) not in returned
        ]
        bad = [(tensor, mask) for tensor in outputs if (mask := self._judged(tensor)) is not None]
        if bad:
            self._note(known, record, (func, args, kwargs), kept, sources, bad)
        return result

    def _record(self, known: Operation) -> Record:
        self._count += 1
        node = torch._C._current_autograd_node()
        numbers = self._new_numbers()
        if self._late and node is None:
            return Record(self._count, known.name, self._stack[-1], place_here(), True, None)
        backward = node is not None and not (torch.is_grad_enabled() and recomputing())
        if backward:
            sequence = node._sequence_nr()
            home = self.forward.get(sequence)
            if home is not None:  # what a derivative is made of has derivatives of its own
                self.forward |= dict.fromkeys(numbers, home)
            # Otherwise the call of the derivative has to do.
            place = place_here(within=home is not None)
            return Record(self._count, known.name, self._stack[-1], place, True, sequence, function_of(node))
        place = place_here()
        if place.engine and node is None:  # the engine adds up the gradients of a tensor that was used several times
            return Record(self._count, known.name, self._stack[-1], place, True, None)
        sequence = _sequence_number() - 1
        module = self._stack[-1]
        if node is not None:  # computed again: outside the modules that it was called from at first
            module = self.modules.get((known.name, place.frame), module)
        else:
            self.modules.setdefault((known.name, place.frame), module)
        record = Record(self._count, known.name, module, place, False, None, pointwise=known.pointwise)
        # Inside functorch an operation has a number for each level of derivatives.
        for number in (*numbers, sequence):
            self.forward.setdefault(number, record)
        return record

    def _new_numbers(self) -> range:
        """The numbers that autograd has given out since the last operation."""
        last, self._numbered = self._numbered, _sequence_number()
        return range(last, self._numbered)

    def _judged(self, tensor: Tensor) -> Tensor | None:
        """Where a result is not finite. Takes note of it where it is finite everywhere."""
        storage = storage_of(tensor)
        mask = nonfinite(tensor) if plain(tensor) and not tensor.is_nested else None
        if mask is not None:
            return mask
        self._made.add(storage)
        if storage in self.bad and covers(tensor):
            del self.bad[storage]
            self.outside.pop(storage, None)
        return None

    def _source(self, tensor: Tensor) -> Source | None:
        if not plain(tensor) or tensor.is_nested:
            return None
        storage = storage_of(tensor)
        if storage not in self.bad:
            if storage in self._made:
                return None
            key = key_of(tensor)
            if key in self._seen:
                return None
            mask = nonfinite(tensor)
            if mask is None:
                self._seen.add(key)
                return None
            self._admit(tensor, storage, mask)
        writes = list(self.bad[storage])
        external = storage in self.outside
        if len(writes) == 1 and not external and same_place(writes[0].value.tensor, tensor):
            return Source(writes[0].value, writes, False, saved=not writes[0].record.backward)
        mask = nonfinite(tensor)
        if mask is None:
            return None
        value = told_apart(tensor, mask, writes, self.outside.get(storage, []))
        return Source(value, writes, external, saved=not any(write.record.backward for write in writes))

    def _admit(self, tensor: Tensor, storage: int, mask: Tensor) -> None:
        """Takes note of a non-finite tensor that the step did not make."""
        self._kept.append(tensor)
        self.bad.setdefault(storage, [])
        # An infinity in a constant is meant, and so is a mask of 0 and -inf wherever it stands. A NaN never is.
        doubtful = storage in self._suspects or tensor.requires_grad
        if bool(torch.isnan(tensor).any()) or (doubtful and not bool(((tensor == 0) | (tensor == -math.inf)).all())):
            value = Value(tensor.detach(), bad=mask)
        else:
            value = Value(tensor.detach(), meant=mask)
        self.outside.setdefault(storage, []).append(value)

    # -- a non-finite result

    def _note(
        self, known: Operation, record: Record, call: Any, given: list[Any], sources: list[Source], bad: Any
    ) -> None:
        _, args, kwargs = call
        record.call = call if sources else None
        record.sources = sources
        record.inputs = given
        record.selector = _selector(known.name, args)
        if known.name in ROWS and not record.backward:
            record.row_masked = row_masked(known.name, args, kwargs) is not None
        wanted = any(isinstance(value, float) and math.isinf(value) for value in given)
        for tensor, mask in bad:
            value = judged(record, tensor, mask, wanted)
            record.values.append(value)
            self._remember(tensor, Write(record, value))
        new = evidence_of(record, bad[0][0], given, self._masked.of)
        if new is not None:
            record.evidence = new
        elif record.backward:
            self._continued(record, bad[0][0], kept=given)

    def _remember(self, tensor: Tensor, write: Write) -> None:
        storage = storage_of(tensor)
        self._kept.append(tensor)
        self._made.discard(storage)
        if covers(tensor) or storage not in self.bad:
            self.outside.pop(storage, None)
            self.bad[storage] = []
        self.bad[storage].append(write)

    def _continued(self, record: Record, tensor: Tensor, kept: list[Any]) -> None:
        """A derivative that goes on with something non-finite: 0 * inf where `pow` and others multiply the gradient last."""
        sources = [source for source in record.sources if source.value.bad is not None]
        makers = [write.record for source in sources for write in source.writes]
        if not any(source.saved for source in sources) and all(m.sequence != record.sequence for m in makers):
            return
        more = evidence_of(record, tensor, kept, self._masked.of, continued=True)
        if more is None:
            return
        if all(source.saved for source in sources):
            record.met = more
        if not more.zero:
            return
        queue: list[Record] = [record]
        seen: set[Record] = set()
        while queue:
            for source in queue.pop().sources:
                for first in {write.record for write in source.writes} - seen:
                    seen.add(first)
                    if not first.backward or first.sequence != record.sequence:
                        continue
                    queue.append(first)
                    for evidence in (first.evidence, first.met):
                        if evidence is not None:
                            evidence.zero = True
                            evidence.masked |= more.masked


def _stored(values: list[Any]) -> list[Any]:
    return [stored(value) if isinstance(value, Tensor) else value for value in values]


def _argument(args: Any, kwargs: Any, position: int, name: str) -> Any:
    return args[position] if position < len(args) else kwargs.get(name)


def _selector(name: str, args: Any) -> Tensor | None:
    """Where the first of two inputs (`where`), or the only one (`masked_fill`), is what the result holds."""
    if name == "aten.where" and isinstance(args[0], Tensor):
        return args[0]
    if name == "aten.masked_fill" and isinstance(args[1], Tensor):
        return ~args[1]
    return None
