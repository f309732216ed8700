"""Save one Python value so that it can be put back: tensors by value, containers by content, objects by attributes.

Putting back happens in place, in the object that held the value, because others may hold a reference to it.
"""

from __future__ import annotations

import argparse
import collections
import functools
import os
import queue
import random
import sys
import sysconfig
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ATOMIC", "Undo", "clone_of", "is_constant", "is_users", "save_value", "slots_of", "write"]

Undo = Callable[[], None]

# Values that cannot change: the name that holds them is all there is to put back.
ATOMIC: frozenset[type] = frozenset(
    [
        *(type(None), bool, int, float, complex, str, bytes, range, slice, type(Ellipsis)),
        *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
        *(types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, type, property),
    ]
)
# Longer containers are logs or tables: appends to them are undone, their entries are taken as they are.
_LONGEST = 1024
_DEEPEST = 6
# Larger arrays (in bytes) that are no buffers are data, not state: to copy them before each step would cost more than the step.
_LARGEST = 16 * 2**20
# Classes of the standard library that hold what a user puts into them.
_CONTAINERS = (
    *(types.SimpleNamespace, argparse.Namespace, queue.Queue),
    *(collections.UserDict, collections.UserList),
)
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def is_constant(value: Any) -> bool:
    """Whether a value cannot change, so that the name which holds it is all there is to remember."""
    kind = type(value)
    return kind in ATOMIC or (kind is tuple and all(type(entry) in ATOMIC for entry in value))


def save_value(value: Any) -> Undo:
    """Remembers `value`, and returns the function that puts the remembered state back into it.

    Tensors are cloned; lists, dictionaries, sets and deques are copied with what they hold; generators of random
    numbers remember their state; objects of the user's own classes remember their attributes. Cycles are followed
    once.
    """
    undos: list[Undo] = []
    _save(value, undos, set(), 0)

    def undo() -> None:
        for step in undos:
            step()

    return undo


def _save(value: Any, undos: list[Undo], seen: set[int], depth: int) -> None:
    kind = type(value)
    if kind in ATOMIC or id(value) in seen or depth > _DEEPEST:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        undos.append(_save_tensor(value))
    elif isinstance(value, (list, collections.deque)):
        undos.append(_save_sequence(value))
        _save_all(value, undos, seen, depth)
    elif isinstance(value, dict):
        undos.append(_save_mapping(value))
        _save_all(value.values(), undos, seen, depth)
    elif isinstance(value, set):
        undos.append(_save_set(value))
    elif isinstance(value, (tuple, frozenset)):
        _save_all(value, undos, seen, depth)
    elif isinstance(value, nn.Module):
        return  # A submodule is saved where it is registered; one that is not registered belongs to somebody else.
    else:
        _save_object(value, undos, seen, depth)


def _save_all(values: Any, undos: list[Undo], seen: set[int], depth: int) -> None:
    if len(values) <= _LONGEST:
        for value in values:
            _save(value, undos, seen, depth + 1)


def _save_tensor(tensor: Tensor) -> Undo:
    if tensor.is_meta or tensor.numel() * tensor.element_size() > _LARGEST:
        return lambda: None
    copy = clone_of(tensor)
    version = None if tensor.is_inference() else tensor._version

    def undo() -> None:
        # Untouched tensors are left alone, because a write would invalidate graphs that saved them; fused optimizers write
        # without counting a version.
        if version is None or tensor._version != version or not _equal(tensor, copy):
            write(tensor, copy)

    return undo


def clone_of(tensor: Tensor) -> Tensor:
    """A copy of a tensor with the same strides, whatever its layout."""
    detached = tensor.detach()
    if _is_strided(tensor):
        return detached.clone(memory_format=torch.preserve_format)
    return detached.clone()


def _is_strided(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested


def _equal(tensor: Tensor, copy: Tensor) -> bool:
    """Whether two tensors hold the same, also where that is NaN. Of those that cannot be compared the versions have to do."""
    if not _is_strided(tensor) or tensor.is_quantized:
        return True
    return torch.equal(tensor, copy) or bool(((tensor == copy) | ((tensor != tensor) & (copy != copy))).all())


def write(tensor: Tensor, copy: Tensor) -> None:
    """Puts a copy back into a tensor, also into one that was made in inference mode, which is written only there."""
    if not tensor.is_inference():
        tensor.detach().copy_(copy)
        return
    with torch.inference_mode():
        tensor.copy_(copy)


def _save_sequence(value: Any) -> Undo:
    if len(value) > _LONGEST:
        length = len(value)

        def shorten() -> None:
            while len(value) > length:
                value.pop()

        return shorten
    copy = list(value)

    def undo() -> None:
        value.clear()
        value.extend(copy)

    return undo


def _save_mapping(value: dict[Any, Any]) -> Undo:
    if len(value) > _LONGEST:
        return lambda: None
    copy = list(value.items())

    def undo() -> None:
        value.clear()
        for key, entry in copy:  # not `update`, which a Counter understands differently
            value[key] = entry  # noqa: PERF403

    return undo


def _save_set(value: set[Any]) -> Undo:
    copy = set(value)

    def undo() -> None:
        value.clear()
        value.update(copy)

    return undo


def _save_object(value: Any, undos: list[Undo], seen: set[int], depth: int) -> None:
    if isinstance(value, torch.Generator):
        state = value.get_state()
        undos.append(lambda: _set_generator(value, state))
    elif isinstance(value, random.Random):
        numbers = value.getstate()
        undos.append(lambda: value.setstate(numbers))
    elif type(value).__module__.startswith("numpy"):
        _save_numpy(value, undos)
    elif isinstance(value, bytearray):
        characters = bytes(value)
        undos.append(lambda: value.__setitem__(slice(None), characters))
    elif isinstance(value, _CONTAINERS) or is_users(type(value)):
        own = getattr(value, "__dict__", None)
        if isinstance(own, dict) and len(own) <= _LONGEST:
            undos.append(_save_mapping(own))
            _save_all(own.values(), undos, seen, depth)
        if names := slots_of(type(value)):
            undos.append(_save_slots(value, names))
            _save_all([getattr(value, name) for name in names if hasattr(value, name)], undos, seen, depth)


def _save_slots(value: Any, names: tuple[str, ...]) -> Undo:
    held = {name: getattr(value, name) for name in names if hasattr(value, name)}

    def undo() -> None:
        for name in names:
            if name in held:
                object.__setattr__(value, name, held[name])
            elif hasattr(value, name):
                object.__delattr__(value, name)

    return undo


def slots_of(kind: type) -> tuple[str, ...]:
    """The names of what objects of a class hold outside a dictionary."""
    return _slots_of(kind)


@functools.cache
def _slots_of(kind: Any) -> tuple[str, ...]:
    found: list[str] = []
    for base in kind.__mro__:
        names = base.__dict__.get("__slots__", ())
        found.extend(entry for entry in ((names,) if isinstance(names, str) else names) if not entry.startswith("__"))
    return tuple(found)


def _set_generator(generator: torch.Generator, state: Tensor) -> None:
    generator.set_state(state)


def is_users(kind: Any) -> bool:
    """Whether a class or function stands in the user's own source.

    Objects of installed libraries (trainers, loggers with threads, tokenizers) are machinery: to put them back would
    break them.
    """
    return _is_users_module(kind.__module__ or "")


@functools.cache
def _is_users_module(name: str) -> bool:
    source = getattr(sys.modules.get(name), "__file__", None)
    if name == "__main__":
        return True
    return source is not None and not os.path.abspath(source).startswith(_INSTALLED)


def _save_numpy(value: Any, undos: list[Undo]) -> None:
    if hasattr(value, "bit_generator"):
        state = value.bit_generator.state
        undos.append(lambda: setattr(value.bit_generator, "state", state))
    elif hasattr(value, "get_state"):
        legacy = value.get_state()
        undos.append(lambda: value.set_state(legacy))
    elif hasattr(value, "flags") and getattr(value.flags, "writeable", False) and 0 < value.nbytes <= _LARGEST:
        copy = value.copy()

        def undo() -> None:
            value[...] = copy

        undos.append(undo)
