"""The trap of `torch.where`, and of bounds: a branch that is not taken spoils the gradient all the same.

In ``torch.where(x > 0, torch.log(x), 0)`` the value at x = 0 is 0, but its gradient is 0 * inf = NaN: the derivative of the
branch is multiplied by a zero, not left out. What was computed from logarithms, quotients, roots or exponentials is remembered
here, so that the branch can be computed anew with harmless numbers where it is not taken. Taken elements keep their value to
the last bit.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from nanguard.algebra import Law, Spelling
from nanguard.stabilizer.knowledge import node_of
from nanguard.stabilizer.memory import addresses_of_foreign, is_plain, lie_in, storage_key

__all__ = ["BOUNDS", "HARMLESS", "LARGER", "LONGEST", "SMALLER", "Branches"]

# No function that is remembered has an infinite value or derivative there.
HARMLESS = 0.5
# Of these the derivative is infinite where the value is 0.
_ROOTS = frozenset({"sqrt", "pow"})
# Of these it is infinite where the value is like any other.
_ENDS = frozenset({"arcsine"})
# What selects the numbers within bounds.
BOUNDS = frozenset({"clamp", "clamp_min", "clamp_max"})
# What selects the larger, or the smaller, of two.
LARGER, SMALLER = frozenset({"maximum", "max"}), frozenset({"minimum", "min"})
# Branches are short; a longer computation is a network.
LONGEST = 12

_NONE: frozenset[str] = frozenset()


@final
class _Step:
    """How one tensor was computed.

    Attributes:
        result: the tensor.
        version: its version then.
        node: its derivative then.
        function: what computed it, or `None` where that is not to be repeated.
        arguments: of the function; in the place of tensors that there is a step of, that step, so that they may die.
        options: the function's arguments by keyword.
        length: how many steps it took.
        laws: the names of those with infinite derivatives.
        region: the checkpointed region that it was computed in.
        versions: of the tensors among the arguments.
    """

    __slots__ = (
        "arguments",
        "function",
        "laws",
        "length",
        "node",
        "options",
        "region",
        "result",
        "version",
        "versions",
    )

    def __init__(
        self,
        reference: weakref.ref[Tensor],
        version: int,
        node: int | None,
        function: Callable[..., Any] | None,
        arguments: Sequence[Any],
        options: Mapping[str, Any],
        length: int,
        laws: frozenset[str],
        region: object,
        versions: list[int],
    ) -> None:
        self.result = reference
        self.version = version
        self.node = node
        self.function = function
        self.arguments = arguments
        self.options = options
        self.length = length
        self.laws = laws
        self.region = region
        self.versions = versions

    def gave(self, tensor: Tensor) -> bool:
        """Whether its result is still as it was computed, in value and derivative."""
        return tensor._version == self.version and node_of(tensor) == self.node

    def shares(self, storage: int, addresses: range | None) -> bool:
        """Whether its result, or anything that it was computed from, lies in that memory."""
        for entry in (self.result(), *self.arguments):
            if isinstance(entry, _Step):
                if entry.shares(storage, addresses):
                    return True
            elif isinstance(entry, Tensor) and (
                storage_key(entry) == storage or (addresses is not None and lie_in((entry,), addresses))
            ):
                return True
        return False

    def holds(self) -> bool:
        """Whether nothing that it was computed from has been edited since."""
        return self.versions == [entry._version for entry in self.arguments if isinstance(entry, Tensor)]


@final
class Branches:
    """What may become a branch, for as long as it is alive.

    Attributes:
        region: the checkpointed region that the code is in; what was computed outside is not known when it is recomputed.
    """

    def __init__(self) -> None:
        self._steps: dict[int, _Step] = {}
        self.region: object = None

    def __len__(self) -> int:
        return len(self._steps)

    def clear(self) -> None:
        """Forget everything."""
        self._steps.clear()

    def concern(self, law: Law, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call may begin a branch, or have to do with one. Cheap, and no promise."""
        steps = self._steps
        if law.branch == "singular":
            return True
        if steps:
            for entry in args:
                if id(entry) in steps:
                    return True
            for entry in kwargs.values():
                if id(entry) in steps:
                    return True
        return False

    def pin(self, tensor: Any) -> None:
        """Note that somebody watches derivatives at a tensor: what follows it is not computed anew, which would bypass it."""
        step = self._steps.get(id(tensor))
        if step is not None and step.result() is tensor:  # whatever region it was computed in
            step.function = None

    def edited(self, tensor: Any) -> None:
        """Forget what shares memory with a tensor about to be edited: `.data` shares memory, but no version counter."""
        storage = storage_key(tensor) if self._steps and isinstance(tensor, Tensor) else None
        if storage is not None:
            addresses = addresses_of_foreign(tensor)
            for key in [key for key, step in self._steps.items() if step.shares(storage, addresses)]:
                del self._steps[key]

    def note(
        self, law: Law, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
    ) -> None:
        """Remember how a result was computed, where that is a function with infinite derivatives, or follows one."""
        if not isinstance(result, Tensor) or "out" in kwargs or not result.requires_grad or not is_plain(result):
            return
        known, length = law.branch == "singular", 1
        laws = _only(law.name) if known else _NONE
        steps, versions = self._steps, []
        arguments: list[Any] = list(args)
        for place, entry in enumerate(args):
            if not isinstance(entry, Tensor):
                continue
            found = self._find(entry) if id(entry) in steps else None
            if found is not None:
                known, length, laws = True, length + found.length, laws | found.laws
                if found.function is not None and found.gave(entry):
                    arguments[place] = found
                    continue
            versions.append(entry._version)
        if not known or length > LONGEST:
            return
        again: Callable[..., Any] | None = function
        node = result.grad_fn
        if type(node).__name__.startswith("_Graft"):
            # What has been made stable already is not computed anew, but what is multiplied by it is.
            again, arguments, kwargs, versions = None, [], {}, []
        key = id(result)
        reference = weakref.ref(result, lambda dead: self._drop(key, dead))
        number = None if node is None else node._sequence_nr()
        steps[key] = _Step(
            reference, result._version, number, again, arguments, kwargs, length, laws, self.region, versions
        )

    def selected(self, law: Law, spelling: Spelling, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """The result of a selection with branches that are harmless where not taken; `None` where they are so already."""
        if not self._steps or not any(id(entry) in self._steps for entry in (*args, *kwargs.values())):
            return None
        bound = spelling.bind(args, kwargs)
        with torch._C.DisableTorchFunction():
            return None if bound is None else self._select(law.name, bound)

    def _select(self, name: str, bound: Mapping[str, Any]) -> Tensor | None:
        if name == "nan_to_num":
            value: Tensor = bound["input"]
            options = {key: bound[key] for key in ("nan", "posinf", "neginf")}
            taken = self._anew(value, value.detach().isfinite())
            return None if taken is None else torch.where(value.isfinite(), taken, value.detach().nan_to_num(**options))
        if name in BOUNDS:
            return self._bounded(bound["input"], bound.get("min"), bound.get("max"))
        if name in LARGER or name in SMALLER:
            return self._extreme(name in LARGER, bound["input"], bound.get("other", bound.get("dim")))
        if name == "masked_fill":
            mask: Tensor = bound["mask"]
            taken = self._anew(bound["input"], ~mask)
            return None if taken is None else taken.masked_fill(mask, bound["value"])
        condition: Tensor = bound["condition"]
        one, other = self._anew(bound["input"], condition), self._anew(bound["other"], ~condition)
        if one is None and other is None:
            return None
        return torch.where(
            condition, bound["input"] if one is None else one, bound["other"] if other is None else other
        )

    def _bounded(self, value: Tensor, least: Any, most: Any) -> Tensor | None:
        """What lies within the bounds; beyond them the derivative is 0, also where the value is infinite."""
        if not all(end is None or type(end) in (int, float) for end in (least, most)) or self._find(value) is None:
            return None
        bounded = value.detach().clamp(least, most)
        inside = bounded == value.detach()
        taken = self._anew(value, inside)
        return None if taken is None else torch.where(inside, taken, bounded)

    def _extreme(self, larger: bool, one: Any, other: Any) -> Tensor | None:
        """The larger, or the smaller, of two. Of equals, and beside a NaN, both are taken."""
        if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
            return None
        first, second = (one.detach(), other.detach()) if larger else (other.detach(), one.detach())
        below, above = first < second, second < first
        new, new_other = self._anew(one, ~below), self._anew(other, ~above)
        if new is None and new_other is None:
            return None
        one, other = one if new is None else new, other if new_other is None else new_other
        both = torch.maximum(one, other) if larger else torch.minimum(one, other)
        return torch.where(above, one, torch.where(below, other, both))

    def _anew(self, branch: Any, taken: Tensor) -> Tensor | None:
        step = self._find(branch)
        if step is None or not step.gave(branch):
            return None
        if taken.dtype != torch.bool or not _is_trap(branch, taken, step.laws):
            return None
        computed = self._replayed(step, taken)
        return computed if computed is not None and _agree(computed, branch, taken) else None

    def _replayed(self, step: _Step, taken: Tensor) -> Tensor | None:
        if step.function is None or not step.holds():
            return None
        arguments = []
        for entry in step.arguments:
            if isinstance(entry, _Step):
                entry = self._replayed(entry, taken)
                if entry is None:
                    return None
            else:
                entry = self._harmless(entry, taken)
            arguments.append(entry)
        result: Tensor = step.function(*arguments, **step.options)
        return result

    def _harmless(self, entry: Any, taken: Tensor) -> Any:
        if not isinstance(entry, Tensor) or not entry.requires_grad:
            return entry
        # Elsewhere it is no matter of one element: a derivative would be summed over taken and other ones.
        if torch.broadcast_shapes(entry.shape, taken.shape) != entry.shape:
            return entry
        return torch.where(taken, entry, HARMLESS)

    def _find(self, value: Any) -> _Step | None:
        step = self._steps.get(id(value))
        return step if step is not None and step.result() is value and step.region is self.region else None

    def _drop(self, key: int, dead: weakref.ref[Tensor]) -> None:
        step = self._steps.get(key)
        if step is not None and step.result is dead:
            del self._steps[key]


@functools.cache
def _only(name: str) -> frozenset[str]:
    return frozenset({name})


def _agree(computed: Tensor, branch: Tensor, taken: Tensor) -> bool:
    """Whether what was computed anew is the same where it is taken. NumPy may have written into what it was computed from.

    It cannot on other devices, and nobody waits for them.
    """
    if computed.shape != branch.shape or branch.device.type != "cpu":
        return computed.shape == branch.shape
    new, old = computed.detach(), branch.detach()
    return bool(((new == old) | (new.isnan() & old.isnan()) | ~taken).all())


def _is_trap(branch: Tensor, taken: Tensor, laws: frozenset[str]) -> bool:
    """Whether one that is not taken may have an infinite derivative; elsewhere than on a CPU that is not waited for."""
    if branch.device.type != "cpu":
        return True
    if laws & _ENDS:
        return not bool(taken.all())
    value = branch.detach()
    suspicious = ~value.isfinite()
    if laws & _ROOTS:
        suspicious |= value == 0
    return bool((suspicious & ~taken).any())
