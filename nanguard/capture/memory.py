"""Everything about a module that a replay touches, remembered and put back into the objects that held it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, final

import torch
from torch import Tensor, nn

from nanguard.rng import RngState
from nanguard.values import ATOMIC, clone_of, save_value

__all__ = ["ModuleMemory", "kept"]

# What belongs to a Trainer is not the module's: only the reference to it is put back.
_FOREIGN = frozenset(["_trainer", "_fabric", "_fabric_optimizers", "_parameters", "_buffers", "_modules"])


@contextlib.contextmanager
def kept(module: nn.Module) -> Iterator[None]:
    """Whatever its block does to the module and to the random number generators is undone."""
    memory, rng = ModuleMemory(module), RngState.save()
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    try:
        for parameter, _ in gradients:
            parameter.grad = None  # the block must not add to them
        yield
    finally:
        memory.put_back()
        for parameter, gradient in gradients:
            parameter.grad = gradient
        rng.restore()


@final
class ModuleMemory:
    """The state of a module: parameters, buffers, flags, attributes, submodules and hooks, gradients excepted."""

    def __init__(self, module: nn.Module) -> None:
        self._undos: list[Callable[[], Any]] = []
        with torch.no_grad():
            seen: set[int] = set()
            for part in module.modules():
                self._remember_part(part)
                for tensor in (*part._parameters.values(), *part._buffers.values()):
                    if tensor is not None and id(tensor) not in seen:
                        seen.add(id(tensor))
                        self._undos.append(_tensor_undo(tensor))

    def put_back(self) -> None:
        """Makes everything what it was, in the objects that hold it."""
        with torch.no_grad():
            for undo in self._undos:
                undo()

    def _remember_part(self, part: nn.Module) -> None:
        if isinstance(part, torch.jit.ScriptModule):  # its names cannot change
            training = part.training
            self._undos.append(lambda: setattr(part, "training", training))
            return
        own = part.__dict__
        values = dict(own)
        # Values first: a list that the block has emptied goes back under its name afterwards.
        self._undos.extend(
            save_value(value) for name, value in values.items() if name not in _FOREIGN and type(value) not in ATOMIC
        )
        registries = [(own[name], dict(own[name])) for name in ("_parameters", "_buffers", "_modules")]

        def undo() -> None:
            for registry, entries in ((own, values), *registries):
                registry.clear()  # the order of the names comes back too
                registry.update(entries)

        self._undos.append(undo)


def _tensor_undo(tensor: Tensor) -> Callable[[], None]:
    data, copy, flag = tensor.data, clone_of(tensor), tensor.requires_grad

    def undo() -> None:
        # The block may have given the tensor other memory; others hold views of the first one.
        if not _same_memory(tensor, data):
            tensor.data = data
        tensor.data.copy_(copy)
        if tensor.is_leaf:
            tensor.requires_grad_(flag)

    return undo


def _same_memory(tensor: Tensor, data: Tensor) -> bool:
    if tensor.dtype != data.dtype or tensor.layout is not torch.strided or tensor.layout != data.layout:
        return tensor.dtype == data.dtype and tensor.layout == data.layout
    return tensor.data_ptr() == data.data_ptr() and tensor.shape == data.shape and tensor.stride() == data.stride()
