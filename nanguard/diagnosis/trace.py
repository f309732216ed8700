"""A recording of one forward and backward pass: which operation turned what into something non-finite.

Only operations that give a non-finite result are kept with their inputs, so the walk back from a bad loss or gradient
is short.

1. A value is *bad* if it is non-finite and nobody asked for it; infinities that the program put there on purpose (an
operation given an infinite number, such as ``masked_fill(mask, -inf)``, and what carries them on without turning them
into NaN) are *deliberate* and count as finite. 2. An operation is an *origin* if its result is bad and none of its
inputs is. 3. Blame goes to the earliest origin that is reached by walking back from the loss or a gradient; what
never reaches them (a metric, a running minimum) is never blamed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanguard.incident import Origin, TensorStats
from nanguard.source import Frame, user_frame

__all__ = ["Finding", "Trace", "describe_tensor"]


@dataclass
class _Record:
    index: int
    op: str
    module: str
    frame: Frame | None
    backward: bool
    sequence: int | None
    function: str | None = None
    sources: list[tuple[Tensor, _Record | None]] = field(default_factory=list)
    stats: tuple[TensorStats, ...] = ()
    deliberate: bool = False
    zero_gradient: bool = False
    begun: _Record | None = None


@dataclass(frozen=True)
class Finding:
    """Where the walk ended: the origin, the bad tensor that came from outside (if one did), and what the operands
    were.
    """

    origin: Origin
    external: Tensor | None = None
    zero_gradient: bool = False


class Trace(TorchDispatchMode):
    """Records while it is active. Final. Every result is inspected, so it synchronises: for the autopsy only.

    Args:
        root: module whose submodules give the operations their place.
    """

    def __init__(self, root: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = {id(module): name for name, module in root.named_modules()}
        self._stack: list[str] = [""]
        self._records: list[_Record] = []
        self._made: dict[int, _Record] = {}
        self._forward: dict[int, _Record] = {}
        self._kept: list[Tensor] = []
        self._count = 0
        self._suspects: frozenset[int] = frozenset()

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

    def _place(self, module: nn.Module) -> str:
        return str(self._names.get(id(module), self._stack[-1]))

    def _leave(self) -> None:
        if len(self._stack) > 1:
            self._stack.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        # Before the call: an in-place operation overwrites what it was given.
        sources = [tensor for tensor in inputs if not _finite(tensor)]
        finite = [tensor for tensor in inputs if _finite(tensor)]
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        # Written into without being returned, as the running statistics of BatchNorm.
        written = {id(tensor): tensor for tensor in finite if not _finite(tensor)}
        outputs += written.values()
        inputs = [tensor for tensor in inputs if id(tensor) not in written]
        self._note(func, args, kwargs, inputs, sources, outputs)
        return result

    def _note(
        self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], sources: list[Tensor], outputs: Any
    ) -> None:
        self._count += 1
        node = torch._C._current_autograd_node()
        sequence = node._sequence_nr() if node is not None else None
        record = _Record(self._count, _op_name(func), self._stack[-1], None, node is not None, sequence, _written(node))
        if node is None:
            record.frame = user_frame()
            self._forward.setdefault(torch.autograd._get_sequence_nr() - 1, record)
        bad = [tensor for tensor in outputs if not _finite(tensor)]
        if not bad:
            return
        wanted = any(isinstance(leaf, float) and not math.isfinite(leaf) for leaf in tree_leaves((args, kwargs)))
        record.sources = [(t, self._made.get(_storage(t))) for t in sources if not self._is_deliberate(t)]
        carried = wanted or len(record.sources) < len(sources)
        record.deliberate = carried and not record.sources and not any(bool(torch.isnan(t).any()) for t in bad)
        if not record.sources:
            operands = inputs + _numbers(record.op, args)
            record.stats = tuple(describe_tensor(f"input {i}", tensor) for i, tensor in enumerate(operands))
            record.zero_gradient = _zero_where_bad(inputs, bad)
        for _, maker in record.sources:
            if maker is not None and maker.backward and maker.sequence == sequence:
                # The same derivative, continued: 0 * inf where `pow` and others multiply the gradient last.
                record.begun = maker.begun or maker
                record.begun.zero_gradient |= _zero_where_bad(inputs, bad)
        self._records.append(record)
        for tensor in bad:
            self._kept.append(tensor)  # keeps the storage's address from being used again
            self._made[_storage(tensor)] = record
        self._kept.extend(sources)

    def _is_deliberate(self, tensor: Tensor) -> bool:
        made = self._made.get(_storage(tensor))
        if made is not None:
            return made.deliberate
        # From outside the step: an infinity in a constant mask is meant; a NaN never is.
        return (
            not bool(torch.isnan(tensor).any()) and not tensor.requires_grad and _storage(tensor) not in self._suspects
        )

    def suspect(self, tensors: Iterable[Tensor]) -> None:
        """Tensors from outside (the batch, parameters) whose infinities nobody can have meant."""
        self._suspects = frozenset(_storage(tensor) for tensor in tensors)

    def blame(self, bad: Sequence[Tensor]) -> Finding | None:
        """The earliest origin that the non-finite tensors `bad` come from, or `None` where the recording has none."""
        queue = [self._made[_storage(tensor)] for tensor in bad if _storage(tensor) in self._made]
        seen: set[int] = set()
        ends: list[tuple[_Record, Tensor | None]] = []
        while queue:
            record = queue.pop()
            if record.index in seen:
                continue
            seen.add(record.index)
            if not record.sources:
                ends.append((record, None))
            for source, maker in record.sources:
                if maker is None:
                    ends.append((record, source))
                else:
                    queue.append(maker)
        if not ends:
            return None
        record, external = min(ends, key=lambda end: end[0].index)
        return self._finding(record, external)

    def _finding(self, record: _Record, external: Tensor | None) -> Finding:
        place = self._forward.get(record.sequence, record) if record.sequence is not None else record
        frame = place.frame
        stats = record.stats or ((describe_tensor("input", external),) if external is not None else ())
        origin = Origin(
            op=record.function or place.op,
            phase="backward" if record.backward else "forward",
            module=place.module,
            file=frame.file if frame else None,
            line=frame.line if frame else None,
            code=frame.code if frame else None,
            operands=stats,
        )
        return Finding(origin, external, record.zero_gradient)


def describe_tensor(name: str, tensor: Tensor) -> TensorStats:
    """Shape, dtype, range of the finite elements and counts of the others."""
    values = tensor.detach()
    dtype = str(tensor.dtype).removeprefix("torch.")
    if values.layout is not torch.strided or values.is_complex() or values.numel() == 0:
        return TensorStats(name, tuple(tensor.shape), dtype)
    wide = values.double() if values.is_floating_point() else values.to(torch.float64)
    finite = wide[torch.isfinite(wide)]
    low, high = (float(finite.min()), float(finite.max())) if finite.numel() else (None, None)
    return TensorStats(
        name,
        tuple(tensor.shape),
        dtype,
        low,
        high,
        nan=int(torch.isnan(wide).sum()),
        posinf=int(torch.isposinf(wide).sum()),
        neginf=int(torch.isneginf(wide).sum()),
        zeros=int((wide == 0).sum()),
    )


def _op_name(func: Any) -> str:
    """``aten.log_.default`` is ``aten.log``: without overload and without the in-place underscore."""
    return str(func.overloadpacket).removesuffix("_")


def _numbers(op: str, args: Any) -> list[Tensor]:
    """The plain numbers that an arithmetic operation was given, as in ``x / 0.0``."""
    if op not in ("aten.add", "aten.sub", "aten.mul", "aten.div", "aten.pow", "aten.remainder", "aten.fmod"):
        return []
    return [torch.tensor(float(value), dtype=torch.float64) for value in args if type(value) in (int, float)]


def _zero_where_bad(inputs: list[Tensor], bad: list[Tensor]) -> bool:
    """Whether a gradient of 0 became NaN, as in a branch that `where` did not choose: 0 / 0 or 0 * inf."""
    spots = ~torch.isfinite(bad[0])
    if not bool(torch.isnan(bad[0][spots]).all()):
        return False
    return any(entry.shape == spots.shape and bool((entry[spots] == 0).all()) for entry in inputs)


def _written(node: Any) -> str | None:
    """The class of a custom `autograd.Function` whose backward pass is running."""
    function = getattr(type(node), "_forward_cls", None)
    return None if function is None else str(function.__name__)


def _finite(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.layout is not torch.strided:
        return True
    return tensor.numel() == 0 or bool(torch.isfinite(tensor).all())


def _storage(tensor: Tensor) -> int:
    if tensor.layout is not torch.strided:
        return id(tensor)
    return int(tensor.untyped_storage()._cdata)
