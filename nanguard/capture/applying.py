"""Puts the captured state into a module; whoever calls this puts the module's own state back afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nanguard.capture.attributes import SCALARS
from nanguard.capture.load import Capture
from nanguard.capture.manifest import MANIFEST, MODULE
from nanguard.capture.modules import device_of, named_state, plain_name
from nanguard.capture.sections import decoded, read_extra
from nanguard.errors import CaptureError

__all__ = ["apply_attributes", "apply_training", "apply_weights"]


def apply_weights(capture: Capture, module: nn.Module) -> bool:
    """Gives the module the captured parameters and buffers; `False` where the capture holds none.

    Raises:
        CaptureError: where names or shapes differ; names them.
    """
    state = capture.state()
    if state is None:
        return False
    parts = {plain_name(name): part for name, part in module.named_modules()}
    _fill_empty_buffers(state, parts, device_of(module))
    live = named_state(module)
    _compare(capture, state, live, module)
    with torch.no_grad():
        for name, tensor in live.items():
            if name in state:
                _assign(tensor, state[name])
    for name, extra in read_extra(capture.path / MODULE, capture.manifest["module"]).items():
        if name in parts:
            parts[name].set_extra_state(extra)
    return True


def apply_training(capture: Capture, module: nn.Module) -> None:
    """Gives every submodule the captured training flag."""
    flags = capture.manifest["module"]["training"]
    for name, part in module.named_modules():
        if plain_name(name) in flags:
            part.training = flags[plain_name(name)]


def apply_attributes(capture: Capture, module: nn.Module, *, captured: bool) -> list[str]:
    """Gives every submodule its captured plain attributes, and says which ones differ from the module's own.

    Those that had not moved since the captured run began are settings: they stay as the code has them, so that a fix of a
    setting can be tested.
    """
    file = capture.path / MANIFEST
    entries = capture.manifest["module"]
    initial = None if entries["initial"] is None else _scalars(file, entries["initial"])
    parts = {plain_name(name): part for name, part in module.named_modules()}
    notes = []
    for owner, values in _scalars(file, entries["attributes"]).items():
        own = parts[owner].__dict__ if owner in parts else {}
        for name, value in values.items():
            if (
                captured
                and initial is not None
                and name not in own
                and _came_later(parts.get(owner), initial, owner, name)
            ):
                own[name] = value
            if name not in own or type(own[name]) not in SCALARS or _equal(own[name], value):
                continue
            moved_on = initial is not None and not _equal(initial.get(owner, {}).get(name), value)
            replaced = captured and (moved_on or initial is None)
            if not (moved_on and replaced):  # a counter is what it was: nothing to explain
                notes.append(_note(f"{owner}.{name}".lstrip("."), own[name], value, replaced))
            if replaced:
                own[name] = value
    return notes


def _came_later(part: nn.Module | None, initial: Mapping[str, Any], owner: str, name: str) -> bool:
    """Whether an attribute was made in the run, by a hook that a replay does not call."""
    return part is not None and name not in initial.get(owner, {}) and not hasattr(type(part), name)


def _scalars(file: Any, entries: Any) -> dict[str, dict[str, Any]]:
    return {owner: decoded(file, nodes) for owner, nodes in entries}


def _note(name: str, own: Any, captured: Any, replaced: bool) -> str:
    if replaced:
        return f"{name}: {captured!r} as captured was used, the module has {own!r}; attributes='current' keeps the module's own"
    return f"{name}: {own!r} as the module has it was used, it was {captured!r} when captured"


def _equal(one: Any, other: Any) -> bool:
    return type(one) is type(other) and (one == other or (one != one and other != other))


def _assign(live: Tensor, captured: Tensor) -> None:
    value = captured.detach()
    same = live.dtype == value.dtype and live.layout == value.layout and live.shape == value.shape
    if same and (live.layout is not torch.strided or live.stride() == value.stride()):
        live.data.copy_(value)
    else:
        live.data = value.to(live.device)  # other strides or another dtype are other bits
    if live.is_leaf:
        live.requires_grad_(captured.requires_grad)


def _fill_empty_buffers(state: Mapping[str, Tensor], parts: Mapping[str, nn.Module], device: torch.device) -> None:
    """Buffers that were registered as None and filled by a later step are as they were then."""
    for name, tensor in state.items():
        owner, _, last = name.rpartition(".")
        buffers = parts[owner]._buffers if owner in parts else {}
        if last in buffers and buffers[last] is None:
            buffers[last] = tensor.to(device)


def _compare(capture: Capture, state: Mapping[str, Tensor], live: Mapping[str, Tensor], module: nn.Module) -> None:
    # Caches (buffers that are not persistent) may come, go and grow.
    cached = set(capture.manifest["module"]["transient"])
    persistent = {plain_name(name) for name in module.state_dict(keep_vars=True)} | dict(
        module.named_parameters()
    ).keys()
    missing = [name for name in state if name not in live and name not in cached]
    unexpected = [name for name in live if name not in state and name in persistent]
    shapes = [
        f"{name} {tuple(state[name].shape)} -> {tuple(live[name].shape)}"
        for name in state
        if name in live and name not in cached and state[name].shape != live[name].shape
    ]
    problems = [
        f"{what}: {', '.join(names[:5])}{f', ... ({len(names)} in all)' if len(names) > 5 else ''}"
        for what, names in (
            ("only in the capture", missing),
            ("only in the module", unexpected),
            ("captured shape -> shape here", shapes),
        )
        if names
    ]
    if problems:
        built = capture.manifest["module"]["class"]
        raise CaptureError(
            f"{capture.path / MODULE}: the captured weights do not fit the module.\n  "
            + "\n  ".join(problems)
            + f"\n  expected the architecture of {built}. Build the module as it was then, or replay with weights='current' to "
            "use the module's own weights"
        )
