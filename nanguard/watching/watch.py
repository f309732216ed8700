"""The hooks of watched modules: put in place for every n-th step, and taken away after it.

1. A hook measures and changes nothing: a watched step is bit-identical. What it measures stays on the device until `pending` is
read with the rest of the step. 2. Gradients are seen by hooks on nodes of the autograd graph. Hooks on tensors would keep the
stabiliser from replacing what it must not hide from them, and torch's own backward hooks on modules forbid in-place operations.
3. Nothing is recorded inside compiled code, which is watched from outside, nor while a step is run again. 4. What a checkpoint
computes again in the backward pass has been seen before: only its gradients count. 5. Under a GradScaler gradients are scaled.
"""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn

from nanguard.diagnosis import Ends
from nanguard.patches import Patches
from nanguard.policy import Watch
from nanguard.trees import named_tensors
from nanguard.watching.calls import Call, Event, Sighting, sight
from nanguard.watching.hooks import ModuleHook, around
from nanguard.watching.matching import matched_modules, refusing_hooks
from nanguard.watching.rows import WIDTH, Row, measure

__all__ = ["ModuleWatch", "Sighting"]


@final
class ModuleWatch:
    """Watches modules of one root module as a policy says.

    Args:
        root: the module whose submodules are watched.
        options: which, and how often.
    """

    def __init__(self, root: nn.Module, options: Watch) -> None:
        self._root = root
        self._options = options
        self._modules: dict[str, nn.Module] = {}
        self._present: list[tuple[str, nn.Module]] = []
        self._refusing: frozenset[int] = frozenset()
        self._patches = Patches()
        self._handles: list[Any] = []
        self._nodes: list[Any] = []
        self._windows = itertools.count()
        self._recording = self._paused = self._installed = False
        self._ends: Ends | None = None
        self.on = False
        self._clear()

    def _clear(self) -> None:
        self._micro = 0
        self._calls: list[Call] = []
        self._events: list[Event] = []
        self._stack: list[Call] = []
        self._rows: list[Row] = []
        self._read: list[Row] = []
        self._known: dict[int, tuple[weakref.ref[Tensor], int, Row | None]] = {}
        self._arrived: dict[tuple[int, int, int], Row | None] = {}
        self._numbers: Counter[tuple[str, int]] = Counter()
        self._told = False

    def start(self) -> None:
        """Finds the modules, which have to be there now.

        Raises:
            PolicyError: where a pattern matches none.
        """
        self._look_up(required=True)

    def _look_up(self, *, required: bool) -> None:
        """Finds the modules anew where any has been replaced, added or taken away since."""
        if not self._options.modules:
            return
        present = list(self._root.named_modules())
        if [(name, id(module)) for name, module in present] == [(name, id(module)) for name, module in self._present]:
            return
        self._present = present
        self._modules = matched_modules(self._root, self._options.modules, required=required)
        self._refusing = refusing_hooks(self._root)

    # -- one window of micro-batches

    def begin(self, *, first: bool) -> None:
        """Before each micro-batch; the `first` of a window decides whether the whole of it is watched."""
        if first:
            self.on = bool(self._options.modules) and next(self._windows) % self._options.every_n_steps == 0
        self._micro = 0 if first else self._micro + 1

    @contextmanager
    def recording(self) -> Iterator[None]:
        """The forward pass of the present micro-batch happens inside."""
        self._install()
        self._recording = True
        try:
            yield
        finally:
            self._recording = False
            self._stack.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not recorded: the step is being run again."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    @contextmanager
    def ends(self, ends: Ends) -> Iterator[Callable[[Any], None]]:
        """The step is run again inside, and what watched modules give is shown to `ends`."""
        self._install()
        self._ends = ends
        try:
            yield lambda _: None
        finally:
            self._ends = None

    def end(self) -> None:
        """After the window, and when the fit ends: no hook stays. Does nothing the second time."""
        for handle in (*self._handles, *self._nodes):
            handle.remove()
        self._handles, self._nodes, self._installed = [], [], False
        self._patches.undo()
        self._clear()
        self.on = False

    # -- what was measured

    def pending(self) -> list[Tensor]:
        """All that was measured since it was asked for the last time, one tensor for each device."""
        rows, self._rows = self._rows, []
        by_device: dict[torch.device, list[Row]] = {}
        for row in rows:
            if row.device is not None:
                by_device.setdefault(row.device.device, []).append(row)
        self._read = [row for found in by_device.values() for row in found]
        stacked = [torch.cat([row.device for row in found if row.device is not None]) for found in by_device.values()]
        for row in rows:
            row.device = None
        return stacked

    def receive(self, values: list[float]) -> None:
        """The numbers of `pending`, read."""
        for position, row in enumerate(self._read):
            row.values = values[position * WIDTH : (position + 1) * WIDTH]
        self._read = []

    def bad_micro_batch(self) -> int | None:
        """The position of the first micro-batch with a bad activation; said once in a window."""
        kinds = self._options.infinities
        found = next((call.micro for call in self._calls if any(row.bad(kinds) for row in call.outputs.values())), None)
        if found is None or self._told:
            return None
        self._told = True
        return found

    def sighting(self, micro: int, *, loss_finite: bool) -> Sighting | None:
        """What the hooks saw of a micro-batch; `None` where the step was not watched."""
        calls = [call for call in self._calls if call.micro == micro]
        if not calls:
            return None
        events = [event for event in self._events if event.call.micro == micro]
        whole = "*" in self._options.modules
        return sight(calls, events, self._options.infinities, whole=whole, loss_finite=loss_finite)

    # -- hooks

    def _install(self) -> None:
        if self._installed:
            return
        self._installed = True
        self._look_up(required=False)
        for name, module in self._modules.items():
            before, after = ModuleHook(self._before, name), ModuleHook(self._after, name)
            call = vars(module).get("_compiled_call_impl")
            if call is None and id(module) in self._refusing:
                call = module._call_impl
            if call is not None:  # `Module.__call__` calls what stands there
                self._patches.set(module, "_compiled_call_impl", around(module, call, before, after))
                continue
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(after, with_kwargs=True))

    def _silent(self) -> bool:
        return self._paused or not self.on

    def _before(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        again = _in_backward()
        if self._silent() or not (self._recording or again) or _redirected(module):
            return
        self._numbers[name, self._micro] += not again
        parent = self._stack[-1] if self._stack else None
        call = Call(name, self._micro, parent, self._numbers[name, self._micro])
        self._stack.append(call)
        for value in (args, kwargs):
            self._measure(call, call.inputs, value, passed=True, again=again)

    def _after(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._ends is not None:
            for place, tensor in named_tensors(output, ""):
                self._ends.see(f"{name}{place}", tensor, self._options.infinities)
        if self._silent() or not any(call.module == name for call in self._stack):
            return
        while (call := self._stack.pop()).module != name:
            pass  # a call that raised an exception which was caught
        again = _in_backward()
        self._measure(call, call.outputs, output, passed=False, again=again)
        call.done = True
        if not again:
            self._calls.append(call)

    def _measure(self, call: Call, rows: dict[str, Row], value: Any, *, passed: bool, again: bool) -> None:
        for place, tensor in named_tensors(value, ""):
            row = None if again else self._row(tensor)
            if row is not None:
                rows[place] = row
            self._watch_gradient(call, tensor, passed=passed)

    def _row(self, tensor: Tensor) -> Row | None:
        """What is measured of a tensor: once, although it is what one module gives and the next one takes."""
        version = -1 if tensor.is_inference() else tensor._version
        known = self._known.get(id(tensor))
        if known is not None and known[0]() is tensor and known[1] == version:
            return known[2]
        row = measure(tensor)
        self._known[id(tensor)] = weakref.ref(tensor), version, row
        if row is not None:
            self._rows.append(row)
        return row

    def _watch_gradient(self, call: Call, tensor: Tensor, *, passed: bool) -> None:
        try:
            node, number = tensor.grad_fn, tensor.output_nr
        except RuntimeError:  # a view whose base was written into in a way that autograd cannot follow
            return
        if node is None:
            return
        key = node._sequence_nr(), number

        def arrived(gradients: tuple[Tensor | None, ...]) -> None:
            gradient = gradients[number]
            if gradient is None or self._silent():
                return
            where = *key, torch._C._current_graph_task_id()
            if where not in self._arrived:  # it is passed back by one module and given to the next
                self._arrived[where] = row = measure(gradient)
                self._rows += [row] if row is not None else []
            row = self._arrived[where]
            if row is not None:
                self._events.append(Event(call, key, passed, row))

        self._nodes.append(node.register_prehook(arrived))


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _redirected(module: nn.Module) -> bool:
    """Whether a strategy calls the training step through the root's `forward`, as Lightning does for DDP: no call of it."""
    forward = vars(module).get("forward")
    return getattr(forward, "__name__", "") == "wrapped_forward"
