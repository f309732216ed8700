"""Trees of Python values as JSON plus tensors. What a tree can hold is what `TreeEncoder._encode` names; nothing is pickled."""

from __future__ import annotations

import dataclasses
import enum
import math
import pathlib
import struct
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from typing import Any, final

import torch
from torch import Tensor

from nanguard.capture.classes import base_of, kind_of, reference
from nanguard.capture.tensors import Unstorable, pack

__all__ = ["DEEPEST", "TreeEncoder", "attribute_path", "entry_path", "float_text"]

DEEPEST = 100
_FACTORIES = {list: "list", dict: "dict", set: "set", int: "int", float: "float", str: "str", tuple: "tuple"}


def entry_path(path: str, key: object) -> str:
    """The name of an entry of a container: ``batch["image"]``, ``batch[3]``."""
    return f'{path}["{key}"]' if isinstance(key, str) else f"{path}[{key!r}]"


def attribute_path(path: str, name: str) -> str:
    """The name of a field: ``batch.image``."""
    return f"{path}.{name}"


def float_text(value: float) -> str:
    """A float as text without loss: hexadecimal digits, for a NaN its bits."""
    return struct.pack(">d", value).hex() if math.isnan(value) else value.hex()


@final
class TreeEncoder:
    """Turns values into JSON nodes, and collects the tensors in them.

    Attributes:
        tensors: name -> contiguous CPU tensor, to be written into one safetensors file.
        missing: what could not be stored: ``{"path", "type", "reason", "optional"}``. Private attributes of dictionary classes
            are optional: a step seldom needs them.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.missing: list[dict[str, Any]] = []
        self._nodes: dict[int, dict[str, Any]] = {}
        self._open: set[int] = set()
        self._alive: list[Any] = []
        self._storages: set[int] = set()
        self._references = 0
        self._optional = 0

    def encode(self, value: Any, path: str) -> Any:
        """The node of `value`, which messages call `path`. Never raises: what cannot be stored becomes a `missing` node."""
        if value is None or type(value) in (bool, str):
            return value
        if type(value) is int:
            return value if -(2**63) <= value < 2**63 else {"kind": "int", "value": hex(value)}
        if type(value) is float:
            return {"kind": "float", "value": float_text(value)}
        known = self._nodes.get(id(value))
        if known is not None:
            return self._refer(known)
        if id(value) in self._open:
            return self._miss(value, path, "it contains itself")
        if len(self._open) >= DEEPEST:
            return self._miss(value, path, f"it is nested more than {DEEPEST} levels deep")
        self._open.add(id(value))
        try:
            node = self._encode(value, path)
        except Exception as error:
            # A capture is written while a run is failing: one value that cannot be read must not cost the others.
            return self._miss(
                value, path, str(error) if isinstance(error, Unstorable) else f"{type(error).__name__}: {error}"
            )
        finally:
            self._open.discard(id(value))
        self._nodes[id(value)] = node
        self._alive.append(value)
        return node

    def _encode(self, value: Any, path: str) -> dict[str, Any]:
        cls = type(value)
        if isinstance(value, Tensor):
            return pack(value, lambda stored, suffix: self._put(stored, path + suffix))
        simple = _SIMPLE.get(cls)
        if simple is not None:
            return {"kind": _KINDS[cls], "value": simple(value)}
        if cls in (bytes, bytearray):
            raw = torch.frombuffer(bytearray(value), dtype=torch.uint8) if value else torch.empty(0, dtype=torch.uint8)
            return {"kind": cls.__name__, "name": self._put(raw, path)}
        if cls in (list, tuple):
            return {"kind": cls.__name__, "items": self._items(value, path)}
        if cls in (set, frozenset):
            return {"kind": cls.__name__, "items": [self._key(entry) for entry in value]}
        if cls is slice:
            return {"kind": "slice", "items": self._items((value.start, value.stop, value.step), path)}
        if isinstance(value, pathlib.PurePath) and cls.__module__.startswith("pathlib"):
            return {"kind": "path", "class": cls.__name__, "value": str(value)}
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)):
            return self._numpy(value, path, numpy)
        return self._instance(value, path)

    def _instance(self, value: Any, path: str) -> dict[str, Any]:
        cls = type(value)
        kind = kind_of(cls)
        if kind is None:
            raise Unstorable("captures do not know this type")
        node: dict[str, Any] = {"kind": kind}
        if cls not in _BUILTIN_MAPPINGS:
            named = reference(cls)
            if named is None:
                raise Unstorable("its class cannot be found by name: define it at the top of a module")
            node.update(named)
        if kind == "enum":
            node["members"] = _members(value)
        elif kind == "namedtuple":
            names = cls._fields
            if len(names) != len(value):
                raise Unstorable("its length is not that of its fields")
            node["items"] = [
                self.encode(entry, attribute_path(path, name)) for name, entry in zip(names, value, strict=True)
            ]
        else:
            if kind == "mapping":
                self._mapping(value, path, node)
            if attributes := self._attributes(value, path, kind):
                node["attributes"] = attributes
        return node

    def _mapping(self, value: Any, path: str, node: dict[str, Any]) -> None:
        base = base_of(type(value))
        node["base"] = base.__name__
        node["items"] = []
        # The built-in iterator: a subclass may compute its items anew on each access.
        for key, entry in list(base.items(value)):
            self._entry(key, entry, path, node["items"])
        factory = getattr(value, "default_factory", None) if base.__name__ == "defaultdict" else None
        if factory is not None:
            node["factory"] = _FACTORIES.get(factory)
            if node["factory"] is None:
                self._optionally(factory, attribute_path(path, "default_factory"))

    def _entry(self, key: Any, entry: Any, path: str, items: list[Any]) -> None:
        try:
            items.append([self._key(key), self.encode(entry, entry_path(path, key))])
        except Unstorable as error:
            self._miss(entry, f"{path}[{type(key).__name__} key]", f"its key cannot be stored: {error}")

    def _attributes(self, value: Any, path: str, kind: str) -> list[list[Any]]:
        own = dict(getattr(value, "__dict__", {}))
        if dataclasses.is_dataclass(value):  # one with slots has no dictionary
            own.update(
                (field.name, getattr(value, field.name))
                for field in dataclasses.fields(value)
                if hasattr(value, field.name)
            )
        nodes = []
        for name, entry in own.items():
            # What a UserDict wraps is what it is.
            inside = path if kind == "userdict" and name == "data" else attribute_path(path, name)
            private = kind != "dataclass" and name.startswith("_")
            self._optional += private
            nodes.append([name, self.encode(entry, inside)])
            self._optional -= private
        return nodes

    def _items(self, values: Iterable[Any], path: str) -> list[Any]:
        return [self.encode(entry, entry_path(path, index)) for index, entry in enumerate(values)]

    def _key(self, key: Any) -> Any:
        if isinstance(key, tuple) and type(key) is tuple:
            return {"kind": "tuple", "items": [self._key(entry) for entry in key]}
        plain = (
            isinstance(key, (str, int, float, bytes, enum.Enum, type(None), pathlib.PurePath)) or type(key) in _SIMPLE
        )
        if not plain and type(key).__module__ != "numpy":
            raise Unstorable(f"a {type(key).__name__} in a place that needs a plain value")
        lost = len(self.missing)
        node = self.encode(key, "key")
        if len(self.missing) > lost:
            raise Unstorable(self.missing.pop()["reason"])
        return node

    def _numpy(self, value: Any, path: str, numpy: Any) -> dict[str, Any]:
        array = numpy.asarray(value)
        scalar = isinstance(value, numpy.generic)
        if type(value) is not numpy.ndarray and not scalar:
            raise Unstorable("an array subclass that captures do not know")
        if array.dtype.kind == "O":
            return {"kind": "objects", "shape": list(array.shape), "items": self._items(array.ravel().tolist(), path)}
        if array.dtype.kind not in "biufcSUmM":
            raise Unstorable(f"an array of dtype {array.dtype}")
        order = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
        raw = array.tobytes(order)
        node = {
            "kind": "ndarray",
            "dtype": array.dtype.str,
            "shape": list(array.shape),
            "order": order,
            "scalar": scalar,
        }
        stored = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
        node["name"] = self._put(stored, path)
        return node

    def _put(self, tensor: Tensor, name: str) -> str:
        name = name.encode("utf-8", "replace").decode()  # a key may hold what no file can
        unique, number = name, 1
        while unique in self.tensors or unique == "__metadata__":
            number += 1
            unique = f"{name}#{number}"
        storage = tensor.untyped_storage()
        # safetensors writes whole storages, each once.
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in self._storages:
            tensor = tensor.clone()
        self._storages.add(tensor.untyped_storage().data_ptr())
        self.tensors[unique] = tensor
        return unique

    def _refer(self, node: dict[str, Any]) -> dict[str, Any]:
        if "id" not in node:
            self._references += 1
            node["id"] = self._references
        return {"kind": "same", "as": node["id"]}

    def _optionally(self, value: Any, path: str) -> None:
        self._optional += 1
        self._miss(value, path, "captures do not know this type")
        self._optional -= 1

    def _miss(self, value: Any, path: str, reason: str) -> dict[str, Any]:
        cls = type(value)
        entry = {
            "path": path,
            "type": f"{cls.__module__}.{cls.__qualname__}",
            "reason": reason,
            "optional": self._optional > 0,
        }
        self.missing.append(entry)
        return {"kind": "missing", **entry}


def _members(value: enum.Enum) -> list[str]:
    """The names whose union is the value: one, or several for flags."""
    members = type(value).__members__
    for name, member in members.items():
        if member is value:
            return [name]
    if isinstance(value, enum.Flag):
        names = [name for name, member in members.items() if member.value & value.value == member.value]
        if value.value == _union(members[name].value for name in names):
            return names
    raise Unstorable("it is not made of members of its class")


def _union(values: Iterable[int]) -> int:
    result = 0
    for value in values:
        result |= value
    return result


# Types whose value is a piece of text or a short list.
_SIMPLE: dict[type, Callable[[Any], Any]] = {
    complex: lambda value: [float_text(value.real), float_text(value.imag)],
    torch.Size: list,
    torch.dtype: lambda value: str(value)[6:],
    torch.device: str,
    torch.layout: lambda value: str(value)[6:],
    torch.memory_format: lambda value: str(value)[6:],
    type(Ellipsis): lambda _: "...",
    range: lambda value: [value.start, value.stop, value.step],
}
_KINDS = {
    complex: "complex",
    torch.Size: "size",
    torch.dtype: "dtype",
    torch.device: "device",
    torch.layout: "layout",
    torch.memory_format: "memory_format",
    type(Ellipsis): "ellipsis",
    range: "range",
}
_BUILTIN_MAPPINGS = frozenset([dict, OrderedDict, defaultdict])
