"""From a non-finite loss or gradient back to where it came from.

1. The walk follows elements, not tensors: through element-wise operations, `where` and views it stays with those that matter.
2. It ends at an operation that made bad elements where its inputs had none, or at a bad tensor from outside the step. Blame
goes to the earliest end. 3. In a backward pass it follows gradients; where a finite gradient met a value that the
forward pass had made non-finite and the loss did not show, the operation that made that value is at fault. 4. A loss
that is infinite because an infinity that was meant has reached it is the fault of the reduction that let it through, or of
the row that was masked altogether.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nanguard.diagnosis.naming import with_source
from nanguard.diagnosis.operations import COPIES, family
from nanguard.diagnosis.reach import needed
from nanguard.diagnosis.recording import Trace
from nanguard.diagnosis.records import Descent, Evidence, Mark, Place, Record, Source, Write, storage_of
from nanguard.diagnosis.regions import carried_over
from nanguard.diagnosis.statistics import anywhere, describe_tensor, nonfinite, plain, stored
from nanguard.incident import Origin

__all__ = ["Finding", "blame"]

_PLACE = ("phase", "module", "file", "line")


@dataclass(frozen=True, eq=False)
class Finding:
    """Where the walk ended.

    Attributes:
        origin: the operation.
        kernel: the dispatcher's name of what failed, in a backward pass that of a part of the derivative.
        evidence: what is known about it, `None` where a bad value came from outside.
        external: that value.
        others: further ones that the same operation was given.
        reached: whether an infinity that was meant reached the loss, and nothing was bad.
        row: whether the operation was given rows that are masked altogether.
        custom: whether it failed in the user's own code of a backward pass: a custom `autograd.Function`, a hook.
        rows: which elements of its result were bad.
        caller: the frame that called the library which the origin lies in.
        forward: what the forward pass made non-finite at this operation, although the loss did not show it.
        told: the name of the operation that failed, of a derivative that of the forward pass, and what it was given: where
            each of the tensors comes from, and the numbers.
        dtype: that of what failed.
    """

    origin: Origin
    kernel: str
    evidence: Evidence | None = None
    external: Tensor | None = None
    others: tuple[Tensor, ...] = ()
    reached: bool = False
    row: bool = False
    custom: bool = False
    rows: Tensor | None = None
    caller: Place | None = None
    forward: Evidence | None = None
    told: tuple[str, tuple[Descent | float, ...]] = ("", ())
    dtype: torch.dtype | None = None

    def same_as(self, other: Finding | None) -> bool:
        """Whether two findings have the same origin: operation, phase, module and line.

        What uses a bad input may be called otherwise where there are fewer samples; then the line says it. So may a matrix
        product, or attention.
        """
        if other is None or (self.external is None) != (other.external is None):
            return False
        if self.external is None and family(self.origin.op) != family(other.origin.op):
            return False
        return all(getattr(self.origin, name) == getattr(other.origin, name) for name in _PLACE)


@dataclass(eq=False)
class _End:
    record: Record
    external: Tensor | None = None
    rows: Tensor | None = None
    behind: Record | None = None  # the backward operation that met what this record had made


def blame(trace: Trace, bad: Sequence[Tensor | Mark]) -> Finding | None:
    """The earliest origin that the non-finite results `bad` come from, or `None` where the recording has none."""
    walk = _Walk(trace)
    marks = [_mark(trace, entry) if isinstance(entry, Tensor) else entry for entry in bad]
    for mark in marks:
        walk.begin(mark)
    ends = walk.ends()
    if not ends:
        reached = walk.reached(marks)
        return None if reached is None else _finding(trace, reached, reached=True)
    first = min(ends, key=lambda end: end.record.index)
    others = [end.external for end in ends if end.record is first.record and end.external is not None]
    return replace(_finding(trace, first), others=tuple(others))


def _mark(trace: Trace, tensor: Tensor) -> Mark:
    tensor = stored(tensor)
    mask = nonfinite(tensor) if plain(tensor) and not tensor.is_nested else None
    return Mark(tensor, mask, trace.bad.get(storage_of(tensor), []))


class _Walk:
    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._queue: list[tuple[int, Record]] = []
        self._wanted: dict[Record, Tensor | None] = {}
        self._users: dict[Record, Record] = {}

    def begin(self, mark: Mark) -> None:
        if mark.mask is None:
            for write in mark.writes:
                self._push(write.record, write.value.bad, None)
        else:
            self._follow(mark.tensor, mark.mask, mark.writes, None)

    def ends(self) -> list[_End]:
        found: list[_End] = []
        while self._queue:
            _, record = heapq.heappop(self._queue)
            wanted = self._wanted[record]
            self._wanted[record] = None  # nothing comes back to it: what it was given is older than itself
            found += self._visit(record, wanted)
        return found

    def _push(self, record: Record, mask: Tensor | None, user: Record | None) -> None:
        if user is not None:
            self._users[record] = user  # in the end the earliest one
        if record in self._wanted:
            known = self._wanted[record]
            both = known is not None and mask is not None and known.shape == mask.shape
            self._wanted[record] = known | mask if both and known is not None and mask is not None else None
            return
        self._wanted[record] = mask
        heapq.heappush(self._queue, (-record.index, record))

    def _visit(self, record: Record, wanted: Tensor | None) -> list[_End]:
        """The ends at this operation; what it was given is queued."""
        sources = [source for source in record.sources if source.value.bad is not None]
        evidence = record.evidence
        found = []
        if evidence is not None:
            new = evidence.new if wanted is None or wanted.shape != evidence.new.shape else evidence.new & wanted
            if anywhere(new) or not sources:
                found.append(_End(record, rows=new))
        if record.backward:
            gradients = [source for source in sources if not source.saved]
            if not gradients:
                return found + [end for source in sources for end in self._met(record, source)]
            sources = gradients
        if record.row_masked and sources and all(_only_masks(source) for source in sources):
            return [_End(record, rows=record.values[0].bad)]
        for source in sources:
            part = needed(record, source, wanted)
            if part is not None and anywhere(part):
                found += self._enter(record, source, part)
        return found

    def _enter(self, record: Record, source: Source, part: Tensor) -> list[_End]:
        if not source.external and [write.value for write in source.writes] == [source.value]:
            self._push(source.writes[0].record, part, record)  # written as a whole
            return []
        left = self._follow(source.value.tensor, part, source.writes, record)
        if source.external and (not source.writes or left):
            return [_End(self._beyond_copies(record), external=source.value.tensor, rows=None)]
        return []

    def _beyond_copies(self, record: Record) -> Record:
        """Who uses a value, where an operation only copies or casts it for another one on the same line."""
        while record.kernel in COPIES:
            user = self._users.get(record)
            if user is not None and user.backward and user.sequence is not None:
                user = self._trace.forward.get(user.sequence)
            if user is None or user.index <= record.index or user.place.frame != record.place.frame:
                break
            record = user
        return record

    def _met(self, record: Record, source: Source) -> list[_End]:
        """The ends in the forward pass for a value that a backward operation was given."""
        inner = _Walk(self._trace)
        assert source.value.bad is not None
        ends = inner._enter(record, source, source.value.bad) + inner.ends()
        return [_behind(end, record) for end in ends]

    def _follow(self, tensor: Tensor, part: Tensor, writes: Sequence[Write], user: Record | None) -> bool:
        """Queues who wrote these elements, the last one for each; whether any are left over."""
        left = part
        for write in reversed(writes):
            if write.value.bad is None:
                continue
            written = carried_over(write.value.tensor, write.value.bad, tensor)
            if written is None or written.shape != left.shape:
                self._push(write.record, None, user)
                continue
            mine = left & written
            if anywhere(mine):
                back = carried_over(tensor, mine, write.value.tensor)
                self._push(write.record, None if back is None else back & write.value.bad, user)
                left = left > mine  # without them
        return anywhere(left)

    # -- infinities that were meant

    def reached(self, marks: Sequence[Mark]) -> _End | None:
        """Who let an infinity that was meant through."""
        queue = [write.record for mark in marks for write in mark.writes]
        if not queue:
            return None
        seen: dict[Record, None] = {}
        while queue:
            record = queue.pop()
            if record not in seen:
                seen[record] = None
                queue += [write.record for source in record.sources for write in source.writes]
        masked = [record for record in seen if record.row_masked]
        if masked:
            first = min(masked, key=lambda record: record.index)
            return _End(first, rows=first.values[0].meant)
        carrying = [record for record in seen if record.sources]
        reducing = [record for record in carrying if _reduces(record)]
        return _End(min(reducing or carrying or seen, key=lambda record: record.index))


def _reduces(record: Record) -> bool:
    """Whether many elements became one."""
    return record.values[0].tensor.ndim == 0 and any(source.value.tensor.ndim > 0 for source in record.sources)


def _behind(end: _End, behind: Record) -> _End:
    """The same end, seen from the backward pass."""
    return _End(end.record, end.external, end.rows, behind)


def _only_masks(source: Source, depth: int = 0) -> bool:
    """Whether all that is bad in an input is the logarithm of a mask."""
    if not source.writes or depth > 8:
        return False
    for write in source.writes:
        if write.record.mask_like:
            continue
        inner = [entry for entry in write.record.sources if entry.value.bad is not None]
        if not inner or not all(_only_masks(entry, depth + 1) for entry in inner):
            return False
    return True


def _finding(trace: Trace, end: _End, *, reached: bool = False) -> Finding:
    record = end.record
    failed = end.behind or record
    evidence = record.evidence
    if end.behind is not None and end.behind.met is not None and evidence is not None:
        evidence = replace(evidence, zero=end.behind.met.zero, masked=end.behind.met.masked)
    forward = trace.forward.get(record.sequence) if record.backward and record.sequence is not None else None
    # A hook on a gradient is the user's own code; what a custom function does is called by the function's name.
    hook = record.backward and record.function is None and record.place.frame is not None and not record.place.engine
    home = record if hook else forward or record
    told = record if record.function is not None else home
    place = home.place
    # What a custom function does in its backward pass was called where the function was applied.
    frame = place.call if record.backward and not hook and place.function is not None else place.frame
    stats = evidence.stats if evidence is not None else ()
    if end.external is not None:
        stats = (describe_tensor("input", end.external),)
    elif not stats:
        tensors = [value for value in record.inputs if isinstance(value, Tensor)]
        stats = tuple(describe_tensor(f"input {i}", value) for i, value in enumerate(tensors))
    frame = with_source(frame)
    origin = Origin(
        op=record.function or place.function or home.kernel,
        # A value from outside is at fault where it was used first, wherever it did its damage.
        phase="backward" if failed.backward and end.external is None else "forward",
        module=forward.module if hook and forward is not None else home.module,
        file=frame.file if frame else None,
        line=frame.line if frame else None,
        code=frame.code if frame else None,
        operands=stats,
    )
    inner = forward.evidence if forward is not None else record.evidence if end.behind is not None else None
    return Finding(
        origin,
        record.kernel,
        evidence,
        end.external,
        reached=reached,
        row=record.row_masked and end.external is None,
        custom=record.backward and (record.function is not None or hook),
        rows=end.rows,
        caller=place,
        forward=inner,
        told=(told.kernel, told.given),
        dtype=record.values[0].tensor.dtype if record.values else None,
    )
