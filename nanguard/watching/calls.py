"""Calls of watched modules, and what they say when a step has failed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import final

from nanguard.incident import Phase, TensorStats
from nanguard.watching.rows import Infinities, Row

__all__ = ["Call", "Event", "Sighting", "sight"]

_MOST = 500


@final
@dataclass(eq=False)
class Call:
    """One call of a watched module.

    Attributes:
        module: qualified name.
        micro: position of the micro-batch in the window.
        parent: the watched module that called it.
        number: which call of this module in the micro-batch it is, from 1.
        inputs, outputs: before the call, and after it (in-place modules change their inputs), by the expression that leads
            to each from the arguments or from what is returned, such as ``[0]``; ``""`` is the whole.
        done: whether it returned.
    """

    module: str
    micro: int
    parent: Call | None
    number: int
    inputs: dict[str, Row] = field(default_factory=dict)
    outputs: dict[str, Row] = field(default_factory=dict)
    done: bool = False

    def __str__(self) -> str:
        name = f"`{self.module}`" if self.module else "the root module"
        return name if self.number == 1 else f"{name} (call {self.number})"


@final
@dataclass(frozen=True, eq=False)
class Event:
    """The gradient of one tensor, in the order of the backward pass.

    Attributes:
        call: the call that the tensor belongs to.
        key: equal for two events of one and the same gradient, which one module passes back and the one before it is given.
        passed: whether the tensor is an input of the call, so that this is what the module passes back; otherwise an output.
        row: what was measured.
    """

    call: Call
    key: tuple[int, int]
    passed: bool
    row: Row


@final
@dataclass(frozen=True)
class Sighting:
    """What the watched modules say about a micro-batch.

    Attributes:
        phase: where it began, as far as the hooks have seen; `None` where all that they saw was well.
        module: the module at fault, or `None` where it is one that is not watched.
        operands: what it was given.
        clean: whether what it was given was well, so that the module itself is at fault.
        given: the first watched module that was given something bad and passed it on, where none is at fault itself.
        detail: the first bad output and the first bad gradient, in half a line.
        activations: of all outputs, in the order in which the calls returned.
    """

    phase: Phase | None = None
    module: str | None = None
    operands: tuple[TensorStats, ...] = ()
    clean: bool = False
    given: str | None = None
    detail: str = ""
    activations: tuple[TensorStats, ...] = ()


def sight(
    calls: Sequence[Call], events: Sequence[Event], infinities: Infinities, *, whole: bool, loss_finite: bool
) -> Sighting:
    """Reads off what happened in one micro-batch.

    1. Forward: the first call in the order of return with a bad output and no bad input is at fault; where every such call
    was given bad inputs already, the code that called the first of them is. 2. Backward: at the first gradient that is not
    finite, the module that passes it back although it was given finite ones is at fault; where there is none, the code that
    used the output which this is the gradient of. 3. A loss that is not finite although all outputs are is the work of the
    code that used the last of them. 4. Which module some code belongs to is only known where all are watched.

    Args:
        calls: of the micro-batch, in the order of return.
        events: of the micro-batch, in the order of the backward pass.
        infinities: which infinities count as bad in activations; of gradients all do.
        whole: whether all modules are watched.
        loss_finite: whether the loss is; where it is not, all gradients only follow from that.
    """
    outputs = [(_name(call, place), row) for call in calls for place, row in call.outputs.items()]
    ranges = tuple(row.stats(name) for name, row in outputs[:_MOST] if row.values)
    bad = [call for call in calls if _any(call.outputs.values(), infinities)]
    wrong = next((event for event in events if event.row.bad("all")), None)
    texts = []
    if bad:
        texts.append(f"first non-finite output of a watched module: {bad[0]}")
    if wrong is not None:
        kind = "passed back by" if wrong.passed else "of the output of"
        texts.append(f"first non-finite gradient: {kind} {wrong.call}")
    seen = Sighting(detail=", ".join(texts), activations=ranges)
    if bad:
        culprit = next((call for call in bad if not _any(call.inputs.values(), infinities)), None)
        if culprit is not None:
            operands = _stats(culprit.inputs.values(), "input")
            return replace(seen, phase="forward", module=culprit.module, operands=operands, clean=True)
        operands = _stats(bad[0].inputs.values(), "input")
        around = _around(bad[0], whole)
        return replace(seen, phase="forward", module=around, operands=operands, given=bad[0].module)
    if not loss_finite:
        last = wrong.call if wrong is not None else calls[-1]
        return replace(
            seen, phase="forward", module="" if whole else None, operands=_stats(last.outputs.values(), "output")
        )
    return seen if wrong is None else _backward(wrong, events, whole, seen)


def _backward(wrong: Event, events: Sequence[Event], whole: bool, seen: Sighting) -> Sighting:
    def given(call: Call) -> list[Row]:
        return [event.row for event in events if event.call is call and not event.passed]

    for event in events:
        if event.key == wrong.key and event.passed and not _any(given(event.call), "all"):
            operands = _stats(given(event.call), "gradient of output")
            return replace(seen, phase="backward", module=event.call.module, operands=operands, clean=True)
    operands = (wrong.row.stats("gradient"),)
    return replace(seen, phase="backward", module=_around(wrong.call, whole), operands=operands)


def _around(call: Call, whole: bool) -> str | None:
    """The module whose own code works with what a call takes and gives."""
    if call.parent is not None:
        return call.parent.module if whole else None
    return "" if whole else None


def _any(rows: Iterable[Row], infinities: Infinities) -> bool:
    return any(row.bad(infinities) for row in rows)


def _stats(rows: Iterable[Row], name: str) -> tuple[TensorStats, ...]:
    rows = list(rows)
    return tuple(
        row.stats(f"{name} {position}" if len(rows) > 1 else name) for position, row in enumerate(rows) if row.values
    )


def _name(call: Call, place: str) -> str:
    name = f"{call.module or '(root)'}{place}"
    return name if call.number == 1 else f"{name} (call {call.number})"
