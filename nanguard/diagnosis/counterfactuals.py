"""What would have been: the same step with more precision, with another batch, with the stabiliser, or just once more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nanguard.diagnosis.cutting import Cut
from nanguard.diagnosis.recording import Trace
from nanguard.diagnosis.rerun import MicroBatch, Rerun
from nanguard.diagnosis.walk import blame
from nanguard.incident import Swap
from nanguard.inputs import copy_of
from nanguard.trees import map_tensors

__all__ = ["fails_again", "fails_in_double", "fails_with", "narrower_in_double", "saving_swaps", "spares_a_part"]

_MOST_PARTS = 8


def fails_again(micro: MicroBatch, rerun: Rerun) -> bool:
    """Whether a plain second run, unrecorded and with compiled code compiled, fails."""
    return bool(rerun(micro, copy_of(micro.args), compiled=True).fails)


def fails_with(
    healthy: MicroBatch, micro: MicroBatch, rerun: Rerun, *, in_its_place: bool = False, backward: bool = True
) -> bool:
    """Whether a batch that was well an earlier time fails with the present weights.

    Args:
        healthy: the call with that batch.
        micro: the call that failed.
        rerun: runs a step again.
        in_its_place: whether the step is told that it is the one that failed, by its number.
        backward: whether to run the backward pass, too.
    """
    args = (*healthy.args[:1], *micro.args[1:]) if in_its_place else healthy.args
    return bool(rerun(micro, copy_of(args), backward=backward).fails)


def spares_a_part(
    cut: Cut, micro: MicroBatch, rerun: Rerun, suspects: Sequence[int] = (), *, backward: bool = True
) -> bool:
    """Whether a part of the batch is well by itself, so that not every batch fails.

    Args:
        cut: takes samples of the batch.
        micro: the call that failed.
        rerun: runs a step again.
        suspects: samples that may be at fault; what is left without them is tried first.
        backward: whether to run the backward pass, too.
    """

    def fails(positions: Sequence[int]) -> bool | None:
        part = cut.take(positions)
        return None if part is None else rerun(micro, (part, *copy_of(micro.args[1:])), backward=backward).fails

    everyone = range(cut.size)
    others = [position for position in everyone if position not in suspects]
    if suspects and others and fails(others) is False:
        return True
    count = min(cut.size, _MOST_PARTS)
    while count > 1:
        length = -(-cut.size // count)
        parts: list[Sequence[int]] = [everyone[start : start + length] for start in range(0, cut.size, length)]
        if length > 1:
            parts += [everyone[start::count] for start in range(count)]
        ran = False
        for part in parts:
            outcome = fails(part)
            if outcome is False:
                return True
            ran |= outcome is not None
        if ran:
            break
        count //= 2  # too small to run, as a single sample is for BatchNorm
    return False


def fails_in_double(micro: MicroBatch, rerun: Rerun, *, backward: bool = True) -> bool | None:
    """Whether the same step fails in float64, too; `None` where it cannot be run in float64."""
    doubled = replace(rerun, step=_in_double(rerun.module, rerun.step))
    args = map_tensors(_double, copy_of(micro.args))
    return doubled(micro, args, backward=backward, within=_double_precision, throughout=True).fails


def narrower_in_double(micro: MicroBatch, rerun: Rerun, *, backward: bool = True) -> str | None:
    """The dtype that the code itself asks for where the step fails in float64, too; `None` where that is float64."""
    trace = Trace(rerun.module)
    doubled = replace(rerun, step=_in_double(rerun.module, rerun.step))
    args = map_tensors(_double, copy_of(micro.args))
    outcome = doubled(micro, args, trace, backward=backward, within=_double_precision, throughout=True)
    found = blame(trace, outcome.blamed) if outcome.fails else None
    if found is None or found.dtype in (None, torch.float64, torch.complex128):
        return None
    return str(found.dtype).removeprefix("torch.")


def saving_swaps(micro: MicroBatch, rerun: Rerun, *, backward: bool = True) -> list[Swap]:
    """The stable forms with which the step would have been finite; none where it would not."""
    from nanguard.stabilizer import stabilize

    swaps: list[Swap] = []
    outcome = rerun(
        replace(micro, stabilized=False),
        copy_of(micro.args),
        backward=backward,
        within=lambda: stabilize(swaps=swaps, advice=[]),
        throughout=True,  # written out, the stable form is computed again in its place, too
    )
    return swaps if outcome.fails is False else []


class _Holder(nn.Module):
    """A module whose forward pass is a step of another."""

    def __init__(self, module: nn.Module, step: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        self.step = step

    def forward(self, *args: Any) -> Any:
        """The step."""
        return self.step(*args)


def _in_double(module: nn.Module, step: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        holder = _Holder(module, step)
        named = {**dict(holder.named_parameters()), **dict(holder.named_buffers())}
        return functional_call(holder, {name: _double(tensor) for name, tensor in named.items()}, args)

    return run


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor.clone()


@contextmanager
def _double_precision() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    devices = [device for device in ("cuda", "cpu") if torch.is_autocast_enabled(device)]
    try:
        if not devices:
            yield
            return
        with torch.autocast(devices[0], enabled=False):
            yield
    finally:
        torch.set_default_dtype(before)
