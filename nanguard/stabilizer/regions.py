"""Regions of `torch.utils.checkpoint`: what runs there runs again in the backward pass, and is swapped both times or never.

The first run of a region happens in the user's block. Its recomputation happens whenever and in whatever thread the backward
pass does, with the block long over. So where a swap is about to happen inside regions, the functions that recompute them are
replaced by a `Recomputation`, which enters silent modes of the same settings around the original.

The recomputation starts with nothing known and must come to the same decisions. Hence, inside a region,

* only what was learnt inside it may be used (`Region.holds`),
* nothing is swapped once memory has escaped from the sight of the mode, nor under transforms: a recomputation would not know,
* whatever cannot be recognised for certain (hooks, frames, other versions of torch) means that nothing is swapped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, cast, final

import torch
from torch.autograd import forward_ad

from nanguard.stabilizer import checkpoints
from nanguard.stabilizer.blocks import Block
from nanguard.stabilizer.environment import in_transform, is_surrounded
from nanguard.stabilizer.knowledge import Knowledge, Known
from nanguard.stabilizer.region import UNKNOWN, Region

__all__ = ["Recomputation", "Stay", "is_recomputing"]

_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_task_id = torch._C._current_graph_task_id
_records = torch.is_grad_enabled
_function_modes = torch._C._len_torch_function_stack

# The attribute by which torch's state of a region leads to its `Region`.
_MARK = "_nanguard_region"


@final
class _Run:
    """What the code of a thread is being run for: the first time, or once more in a backward pass.

    Attributes:
        again: whether it is a recomputation.
        task: the backward pass that it belongs to; -1 for none.
        hooks: how many hooks saved tensors went through when it began.
        stays: the modes that were entered in it and are active.
    """

    def __init__(self, again: bool, task: int, hooks: int) -> None:
        self.again = again
        self.task = task
        self.hooks = hooks
        self.stays: list[Stay] = []


class _Thread(threading.local):
    def __init__(self) -> None:
        self.run = _Run(again=False, task=-1, hooks=0)


_THREAD = _Thread()


def is_recomputing() -> bool:
    """Whether the thread recomputes a region in which something was swapped."""
    return _THREAD.run.again


@final
class Recomputation:
    """Takes the place of the function that recomputes a region, and makes the same swaps as the first run.

    Arguments:
        function: the original.
        renewals: each makes a mode like one that was active around the region, from the outermost to the innermost. They must
            hold nothing of it.
    """

    def __init__(self, function: Callable[..., Any], renewals: tuple[Callable[[], Block], ...]) -> None:
        self._function = function
        self._renewals = renewals

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the region again."""
        outer = _THREAD.run
        _THREAD.run = _Run(again=True, task=_task_id(), hooks=len(checkpoints.hooks_of_saved_tensors()))
        try:
            with ExitStack() as stack:
                _leave_transforms(stack)
                for renewal in self._renewals:
                    mode = renewal()
                    stack.callback(mode.close)
                    stack.enter_context(mode)
                return self._function(*args, **kwargs)
        finally:
            _THREAD.run = outer


@final
class Stay:
    """The regions as one mode sees them that is active for a while.

    Regions that the mode was entered in are nothing to it: their recomputation runs the code that enters it again.

    Arguments:
        knowledge: what the mode knows.
        renewal: makes a silent mode of the same settings.
    """

    def __init__(self, knowledge: Knowledge, renewal: Callable[[], Block]) -> None:
        self._knowledge = knowledge
        self._renewal = renewal
        self._run = _THREAD.run
        self._around: frozenset[Region] = frozenset(region for _, region in _regions() or ())

    def begin(self) -> None:
        """The mode becomes active."""
        self._run.stays.append(self)

    def end(self) -> None:
        """The mode is active no longer."""
        if self in self._run.stays:
            self._run.stays.remove(self)

    def is_ordinary(self) -> bool:
        """Whether nothing at all surrounds the code but the mode, so that none of the questions below need be asked.

        Cheap, and blind to a reentrant region that turns gradients on; `admits` looks closer.
        """
        if self._run.again or not _records() or _top_hooks(True) is not None or _function_modes() or is_surrounded():
            return False
        self._knowledge.region = None
        return True

    def look(self) -> bool:
        """Tell the mode's knowledge in which region the code is, and whether the mode may compute anything of its own there.

        Selective checkpoints, and other dispatch modes, count what is computed, and expect the same from the recomputation.
        """
        # Cheap, and blind to a reentrant region that turns gradients on; `admits` looks closer.
        everywhere = torch.is_grad_enabled() and _top_hooks(True) is None
        region = None if everywhere else self._innermost(_regions())
        self._knowledge.region = region
        if (region is None and not self._run.again) or not torch._C._len_torch_dispatch_stack():
            return True
        return self.admits()

    def may_keep(self, parents: tuple[Known, ...]) -> bool:
        """Whether the numbers may decide if something is computed as written, that comes from these.

        A recomputation has to come to the same decisions, whatever numbers it computes. So no region may be around, not even
        one that the mode was entered in.
        """
        if self._knowledge.are_pinned(parents) or self._knowledge.region is not None:
            return False
        return bool(_task_id() == -1) and _top_hooks(True) is None

    def may_swap(self, parents: tuple[Known, ...]) -> bool:
        """Whether something that comes from these may be swapped where the code is."""
        return not self._knowledge.are_pinned(parents) and self.admits()

    def admits(self) -> bool:
        """Whether a swap may happen where the code is. If so, the recomputation of the regions around it will make it too."""
        run = self._run
        if _THREAD.run is not run or _task_id() != run.task:
            return False  # in a backward pass, or in a recomputation that knows nothing of this mode
        regions = _regions()
        if regions is None or self._innermost(regions) is not self._knowledge.region or not _hooks_fit(regions, run):
            return False
        if (regions or run.again) and (self._knowledge.has_escapes or in_transform()):
            return False
        # Either all of them or none: what is recomputed may depend on what a region further in or out has swapped.
        names = [checkpoints.recompute_attribute(state) for state, _ in regions]
        if None in names:
            return False
        for (state, region), name in zip(regions, cast("list[str]", names), strict=True):
            function = getattr(state, name)
            if not isinstance(function, Recomputation):
                owners = [stay for stay in run.stays if stay._owns(region)]
                setattr(state, name, Recomputation(function, tuple(stay._renewal for stay in owners)))
        return True

    def _owns(self, region: Region) -> bool:
        return region not in self._around and not self._knowledge.has_escapes

    def _innermost(self, regions: list[tuple[Any, Region]] | None) -> Region | None:
        if regions is None:
            return UNKNOWN
        region = regions[0][1] if regions else None
        return None if region in self._around else region


_END = Recomputation.__call__.__code__


def _regions() -> list[tuple[Any, Region]] | None:
    """The regions that the code is in, from the innermost, with torch's states of them; `None` where that cannot be told.

    What is further out than a recomputation is not recomputed together with what is further in.
    """
    found: list[tuple[Any, Region]] = []
    states = checkpoints.states(_END)
    if states is None:
        return None
    parent: Region | None = None
    for state in reversed(states):
        region: Region | None = getattr(state, _MARK, None)
        if region is None:
            region = Region(parent)
            setattr(state, _MARK, region)
        found.append((state, region))
        parent = region
    return found[::-1]


def _hooks_fit(regions: list[tuple[Any, Region]], run: _Run) -> bool:
    """Whether all checkpoints that saved tensors go through are among these regions. Others leave no trace but these hooks."""
    if _top_hooks(True) is None:
        return True
    known = {id(state) for state, _ in regions}
    hooks = checkpoints.hooks_of_saved_tensors()
    targets = map(checkpoints.target, hooks[: len(hooks) - run.hooks])
    return all(id(state) in known for is_checkpoint, state in targets if is_checkpoint)


def _leave_transforms(stack: ExitStack) -> None:
    """Recompute outside of what the backward pass is transformed by, as in `grad(is_grads_batched=True)`: the first run was."""
    transforms = torch._C._functorch
    while transforms.peek_interpreter_stack() is not None:
        stack.callback(transforms.push_dynamic_layer_stack, transforms.pop_dynamic_layer_stack())
    if forward_ad._current_level >= 0:
        stack.enter_context(forward_ad._set_fwd_grad_enabled(False))
    # Modes are asked about nothing where torch functions are switched off.
    enabled = getattr(torch._C, "_EnableTorchFunction", None)
    if enabled is not None and torch._C._is_torch_function_all_disabled():
        stack.enter_context(enabled())
