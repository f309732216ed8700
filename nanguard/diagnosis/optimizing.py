"""Whether an optimizer makes parameters non-finite by itself: its last step once more, on copies."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nanguard.diagnosis.recording import Trace
from nanguard.diagnosis.rerun import apart
from nanguard.diagnosis.statistics import is_finite
from nanguard.diagnosis.walk import Finding, blame

__all__ = ["infinite_setting", "optimizer_fault"]


def optimizer_fault(
    module: nn.Module, name: str, parameter: Tensor, optimizers: Iterable[torch.optim.Optimizer]
) -> Finding | None:
    """The operation of an optimizer that makes a finite parameter non-finite by itself, as 0 / 0 in Adam without eps.

    What the optimizer did is gone when the next step shows it, but its state is there: the same update is made again on
    copies, with a gradient of 0.

    Args:
        module: owner of the parameter.
        name: the parameter's qualified name.
        parameter: holds non-finite values.
        optimizers: those of the run; they are not changed.
    """
    for optimizer, group in _groups_of(parameter, optimizers):
        return _again(module, name, parameter, optimizer, group)
    return None


def infinite_setting(parameter: Tensor, optimizers: Iterable[torch.optim.Optimizer]) -> str | None:
    """A setting that is not finite, or not in the parameter's dtype, as a learning rate that a schedule has spoiled."""
    largest = torch.finfo(parameter.dtype).max
    for _, group in _groups_of(parameter, optimizers):
        for key, value in group.items():
            number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
            if isinstance(number, float) and not abs(number) <= largest:
                return f"{key} is {number:.3g}"
    return None


def _groups_of(
    parameter: Tensor, optimizers: Iterable[torch.optim.Optimizer]
) -> Iterator[tuple[torch.optim.Optimizer, dict[str, Any]]]:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if any(entry is parameter for entry in group["params"]):
                yield optimizer, group


def _again(
    module: nn.Module, name: str, parameter: Tensor, optimizer: torch.optim.Optimizer, group: dict[str, Any]
) -> Finding | None:
    state = {key: _copied(value) for key, value in optimizer.state.get(parameter, {}).items()}
    # Some optimizers have no state at all; where others of its parameters have some, this one has never been stepped.
    if (not state and any(optimizer.state.values())) or isinstance(optimizer, torch.optim.LBFGS):
        return None
    if not all(is_finite(value) for value in state.values() if isinstance(value, Tensor)):
        return None
    stand_in = torch.nan_to_num(parameter.detach().clone(), nan=0.0, posinf=0.0, neginf=0.0).requires_grad_()
    stand_in.grad = torch.zeros_like(stand_in)
    scratch = copy.copy(optimizer)
    for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        setattr(scratch, hooks, OrderedDict())
    scratch.param_groups = [
        {**{key: _copied(value) for key, value in group.items() if key != "params"}, "params": [stand_in]}
    ]
    scratch.state = defaultdict(dict, {stand_in: state})
    step: Any = inspect.unwrap(type(optimizer).step)
    trace = Trace(module)
    with torch.no_grad(), trace.recording():
        apart(lambda: step(scratch))
    if is_finite(stand_in):
        return None
    found = blame(trace, [stand_in])
    if found is None:
        return None
    origin = replace(found.origin, phase="optimizer", module=name.rpartition(".")[0], tensor=name)
    return replace(found, origin=origin)


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
