"""Snapshot and restore of what a training step touches: a step happens wholly or not at all.

1. What the forward and backward pass touch is saved before every step, cheaply: buffers (BatchNorm statistics),
attributes of every submodule (counters, metric states, lists that grow), random number streams, and whatever a
framework adds. 2. What only the optimizer touches (parameters, its own state) is saved where an optimizer may have
moved before the alarm
   can ring: LBFGS, and several optimizers in one step.
3. Restoring puts values back into the very objects that held them, because optimizers, schedulers and users keep
references.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from nanguard.moving import MovingParameters, ParameterSnapshot
from nanguard.rng import RngState
from nanguard.sentinel import finite_flags
from nanguard.values import ATOMIC, Undo, clone_of, is_constant, save_value, write

__all__ = ["OptimizerSnapshot", "Savepoint", "Transaction"]

# What nn.Module keeps about itself; none of it is state that a step changes. How a module is called may be under watch.
_STRUCTURE = frozenset(nn.Module().__dict__) - {"training"} | {"_compiled_call_impl"}


class Transaction:
    """Makes savepoints of one module. Final.

    Args:
        module: its buffers and the attributes of all its submodules are saved.
        ignored: names of attributes that belong to a framework and must never be put back.
        participants: called at each savepoint; each returns a function that undoes what happened since.
        moving: tells which parameters the forward pass changes; without it no parameter is saved.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        ignored: Iterable[str] = (),
        participants: Sequence[Callable[[], Undo]] = (),
        moving: MovingParameters | None = None,
    ) -> None:
        self._module = module
        self._skip = _STRUCTURE | frozenset(ignored)
        self._participants = tuple(participants)
        self._moving = moving
        self._spare: list[tuple[list[int], list[Tensor]]] = []
        self._names: dict[int, tuple[int, list[str]]] = {}

    def savepoint(self) -> Savepoint:
        """The present state, for a copy of the buffers and a walk over the attributes. Give it back by `release`."""
        owners: list[dict[str, Tensor | None]] = []
        layouts: list[dict[str, Tensor | None]] = []
        attributes: list[tuple[dict[str, Any], dict[str, Any], list[Undo]]] = []
        live: list[Tensor] = []
        statistics: list[Tensor] = []
        # Written out, because `modules()` and set arithmetic cost more than all the rest of a healthy step's savepoint.
        queue, seen = [self._module], set()
        while queue:
            module = queue.pop()
            if id(module) in seen:
                continue
            seen.add(id(module))
            own = module.__dict__
            if own["_modules"]:
                queue.extend(child for child in own["_modules"].values() if child is not None)
            buffers = own["_buffers"]
            if buffers:
                owners.append(buffers)
                layouts.append(buffers.copy())
                live.extend(buffer for buffer in buffers.values() if buffer is not None and not is_lazy(buffer))
                if isinstance(module, _NormBase) and module.track_running_stats:
                    running = (module.running_mean, module.running_var)
                    statistics += [entry for entry in running if entry is not None and not is_lazy(entry)]
            values = self._attributes(own)
            undos = [save_value(v) for v in values.values() if type(v) not in ATOMIC and not is_constant(v)]
            attributes.append((own, values, undos))
        return Savepoint(
            rng=RngState.save(),
            owners=owners,
            layouts=layouts,
            live=live,
            copies=self._copy(live, [id(buffer) for buffer in live]),
            statistics=statistics,
            attributes=attributes,
            skip=self._skip,
            undos=[participant() for participant in self._participants],
            parameters=self._moving.keep() if self._moving is not None else None,
            release=self._release,
        )

    def _attributes(self, own: dict[str, Any]) -> dict[str, Any]:
        """What a module's dictionary holds besides its structure.

        The names are remembered: a dictionary of the same length that has them all has no others.
        """
        length, names = self._names.get(id(own), (0, []))
        if length == len(own):
            try:
                return {name: own[name] for name in names}
            except KeyError:
                pass
        names = [name for name in own if name not in self._skip]
        self._names[id(own)] = len(own), names
        return {name: own[name] for name in names}

    def learn(self) -> None:
        """To be called before the optimizer steps: takes note of the parameters that the forward pass has changed."""
        if self._moving is not None:
            self._moving.learn()

    def buffers(self, savepoint: Savepoint) -> dict[str, Tensor]:
        """The buffers of the module by qualified name, with the values that they had at the savepoint."""
        copies = {id(buffer): copy for buffer, copy in zip(savepoint.live, savepoint.copies, strict=True)}
        layouts = savepoint.layouts()
        return {
            f"{prefix}.{name}" if prefix else name: copies[id(buffer)]
            for prefix, module in self._module.named_modules()
            for name, buffer in layouts.get(id(module._buffers), {}).items()
            if buffer is not None and id(buffer) in copies
        }

    def _copy(self, live: list[Tensor], identities: list[int]) -> list[Tensor]:
        if not live:
            return []
        with torch.no_grad():
            known, spare = self._spare.pop() if self._spare else ([], [])
            if known != identities or any(a.shape != b.shape for a, b in zip(spare, live, strict=True)):
                return [clone_of(buffer) for buffer in live]
            torch._foreach_copy_(spare, live)
            return spare

    def _release(self, live: list[Tensor], copies: list[Tensor]) -> None:
        self._spare.append(([id(buffer) for buffer in live], copies))


class Savepoint:
    """A state to go back to, any number of times. Final; made by `Transaction.savepoint`."""

    def __init__(
        self,
        *,
        rng: RngState,
        owners: list[dict[str, Tensor | None]],
        layouts: list[dict[str, Tensor | None]],
        live: list[Tensor],
        copies: list[Tensor],
        statistics: list[Tensor],
        attributes: list[tuple[dict[str, Any], dict[str, Any], list[Undo]]],
        skip: frozenset[str],
        undos: list[Undo],
        parameters: ParameterSnapshot | None,
        release: Callable[[list[Tensor], list[Tensor]], None],
    ) -> None:
        self.rng = rng
        self.live = live
        self.copies = copies
        self.statistics = statistics
        self._owners = owners
        self._layouts = layouts
        self._attributes = attributes
        self._skip = skip
        self._undos = undos
        self._parameters = parameters
        self._release = release

    def restore(self, *, rng: bool = True) -> None:
        """Puts everything back; with ``rng=False`` the random number streams stay where they are."""
        with torch.no_grad():
            for owner, layout in zip(self._owners, self._layouts, strict=True):
                _refill(owner, layout)
            for buffer, copy in zip(self.live, self.copies, strict=True):
                write(buffer, copy)
            for own, values, undos in self._attributes:
                for name in own.keys() - self._skip - values.keys():
                    del own[name]
                own.update(values)
                for undo in undos:
                    undo()
        if self._parameters is not None:
            self._parameters.restore()
        for undo in self._undos:
            undo()
        if rng:
            self.rng.restore()

    def layouts(self) -> dict[int, dict[str, Tensor | None]]:
        """Which buffers each module had, by the identity of the dictionary that holds them: a step may replace them."""
        return {id(owner): layout for owner, layout in zip(self._owners, self._layouts, strict=True)}

    def spoiled_statistics(self, until: Savepoint | None = None) -> list[Tensor]:
        """The running statistics of normalisation layers that were finite here, and are not any more.

        Args:
            until: a later savepoint; without it the present counts.
        """
        now = self.statistics if until is None else until.kept_statistics()
        flags = zip(finite_flags(self.kept_statistics()), finite_flags(now), strict=False)
        return [entry for entry, (was, still) in zip(self.statistics, flags, strict=False) if was and not still]

    def kept_statistics(self) -> list[Tensor]:
        """The running statistics as they were at the savepoint."""
        copies = {id(buffer): copy for buffer, copy in zip(self.live, self.copies, strict=True)}
        return [copies[id(entry)] for entry in self.statistics]

    def release(self) -> None:
        """Gives the copies' memory back for the next savepoint. The savepoint must not be used any more."""
        if self.copies:
            self._release(self.live, self.copies)
        self.copies, self.live, self.statistics = [], [], []


class OptimizerSnapshot:
    """Parameters, optimizer state and hyperparameters, copied. Final.

    Args:
        optimizers: `torch.optim.Optimizer` objects; the parameters are those of their groups.
    """

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self.optimizers = list(optimizers)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        parameters = {id(p): p for group in groups for p in group["params"]}
        with torch.no_grad():
            self._parameters = ParameterSnapshot(list(parameters.values()))
            self._states = [
                (optimizer, {p: dict(state) for p, state in optimizer.state.items()}, save_value(dict(optimizer.state)))
                for optimizer in self.optimizers
            ]
            self._groups = [
                (group, {key: value for key, value in group.items() if key != "params"}, save_value(_hyper(group)))
                for group in groups
            ]

    def restore(self) -> None:
        """Puts parameters, state and hyperparameters back, bit for bit, into the tensors that held them."""
        with torch.no_grad():
            self._parameters.restore()
            for optimizer, state, undo in self._states:
                for parameter in [p for p in optimizer.state if p not in state]:
                    del optimizer.state[parameter]
                for parameter, values in state.items():
                    _refill(optimizer.state[parameter], values)
                undo()
            for group, values, undo in self._groups:
                _refill(group, {**values, "params": group["params"]})
                undo()


def _hyper(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _refill(target: dict[Any, Any], values: dict[Any, Any]) -> None:
    for key in [key for key in target if key not in values]:
        del target[key]
    target.update(values)
