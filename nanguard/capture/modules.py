"""A module in a capture: its weights, and what else makes it the module that it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nanguard.capture.attributes import only_scalars, scalar_attributes
from nanguard.capture.encode import TreeEncoder
from nanguard.capture.manifest import class_reference

__all__ = ["describe_module", "device_of", "encoded", "named_state", "plain_name"]


def device_of(module: nn.Module) -> torch.device:
    """The device of the first parameter or buffer; the CPU where there is none."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def plain_name(name: str) -> str:
    """The name of a tensor or submodule without what `torch.compile` puts into it."""
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod")


def named_state(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, also those that `state_dict` leaves out; tied ones under each of their names."""
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {plain_name(name): tensor for name, tensor in named}


def describe_module(
    module: nn.Module,
    encoder: TreeEncoder,
    *,
    weights: bool,
    overrides: Mapping[str, Tensor],
    attributes: Mapping[str, Mapping[str, Any]] | None,
    initial: Mapping[str, Mapping[str, Any]] | None,
    hparams: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The JSON description of a module; its tensors go to `encoder`."""
    found = scalar_attributes(module) if attributes is None else {k: only_scalars(v) for k, v in attributes.items()}
    return {
        "class": class_reference(type(module)),
        "device": device_of(module).type,
        "training": {plain_name(name): part.training for name, part in module.named_modules()},
        "attributes": [[plain_name(name), encoded(values)] for name, values in found.items()],
        "initial": None if initial is None else [[plain_name(k), encoded(only_scalars(v))] for k, v in initial.items()],
        "hparams": _hparams(getattr(module, "hparams", None) if hparams is None else hparams),
        **(_weights(module, encoder, overrides) if weights else {"state": None, "transient": [], "extra": []}),
    }


def _weights(module: nn.Module, encoder: TreeEncoder, overrides: Mapping[str, Tensor]) -> dict[str, Any]:
    before = {plain_name(name): tensor for name, tensor in overrides.items()}
    replaced: dict[int, Tensor] = {}
    nodes = []
    persistent = {plain_name(name) for name in module.state_dict(keep_vars=True)}
    for name, live in named_state(module).items():
        # One object stays one object, so that tied weights come back tied.
        tensor = replaced.setdefault(id(live), before.get(name, live))
        nodes.append([name, encoder.encode(_with_flag(tensor, live, replaced), name)])
    extra = [
        [name, encoder.encode(part.get_extra_state(), f"{name}.extra_state")] for name, part in _with_extra(module)
    ]
    return {
        "state": nodes,
        "transient": [name for name, _ in nodes if name not in persistent],
        "extra": extra,
    }


def _with_flag(tensor: Tensor, live: Tensor, replaced: dict[int, Tensor]) -> Tensor:
    """The value from before the step, with the `requires_grad` of the live tensor."""
    if tensor is live or tensor.requires_grad == live.requires_grad:
        return tensor
    flagged = tensor.detach().requires_grad_(live.requires_grad)
    replaced[id(live)] = flagged
    return flagged


def _with_extra(module: nn.Module) -> list[tuple[str, nn.Module]]:
    named = module.named_modules()
    return [
        (plain_name(name), part) for name, part in named if type(part).get_extra_state is not nn.Module.get_extra_state
    ]


def encoded(values: Mapping[str, Any]) -> list[list[Any]]:
    """Scalars as name and node; `decoded` is the inverse."""
    encoder = TreeEncoder()
    return [[name, encoder.encode(value, name)] for name, value in values.items()]


def _hparams(values: Any) -> list[list[Any]] | None:
    """Only where all of them are plain values: half of them would build another module."""
    if not isinstance(values, Mapping):
        return None
    encoder = TreeEncoder()
    nodes = [[str(name), encoder.encode(_plain(value), str(name))] for name, value in values.items()]
    return None if encoder.missing or encoder.tensors else nodes


def _plain(value: Any) -> Any:
    """Lightning keeps hyperparameters in dictionaries of its own class."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return value
