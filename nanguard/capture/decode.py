"""The way back from JSON nodes and tensors to Python values. Calls nothing that the file names."""

from __future__ import annotations

import enum
import pathlib
import struct
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor

from nanguard.capture.classes import base_of, resolve
from nanguard.capture.encode import DEEPEST, attribute_path, entry_path
from nanguard.capture.tensors import unpack
from nanguard.capture.unstored import Unstored
from nanguard.errors import CaptureError

__all__ = ["TreeDecoder"]

_FACTORIES: dict[str, Callable[[], Any]] = {kind.__name__: kind for kind in (list, dict, set, int, float, str, tuple)}
_PATHS = ("PurePosixPath", "PureWindowsPath", "PosixPath", "WindowsPath")


@final
class TreeDecoder:
    """Rebuilds values from the nodes of one file.

    Args:
        file: named in messages.
        tensors: name -> tensor of the safetensors file.
        fill: path -> value to use in its place.
        place: recorded device -> where the tensor goes; without it all stay on the CPU.

    Attributes:
        filled: the paths of `fill` that were met.
    """

    def __init__(
        self,
        file: pathlib.Path,
        tensors: Mapping[str, Tensor],
        fill: Mapping[str, Any] | None = None,
        place: Callable[[torch.device], torch.device] | None = None,
    ) -> None:
        self.filled: set[str] = set()
        self._file = file
        self._tensors = tensors
        self._fill = dict(fill or {})
        self._place = place
        self._same: dict[int, Any] = {}
        self._depth = 0

    def decode(self, node: Any, path: str) -> Any:
        """The value of `node`.

        Raises:
            CaptureError: where the node is damaged, or a class that it needs is not imported; names the file and the path.
        """
        if path in self._fill:
            self.filled.add(path)
            return self._fill[path]
        if node is None or isinstance(node, (bool, str)) or type(node) is int:
            return node
        self._depth += 1
        try:
            if self._depth > 2 * DEEPEST:
                raise ValueError("it is nested too deeply")
            value = self._decode(node, path)
        except CaptureError as error:
            raise (
                error if str(error).startswith(str(self._file)) else CaptureError(f"{self._file}: {path}: {error}")
            ) from None
        except Exception as error:
            # Whatever a damaged file leads to, the reader learns which entry of which file is to blame.
            reason = f"{type(error).__name__}: {error}"
            raise CaptureError(
                f"{self._file}: {path}: this entry is damaged ({reason}); copy the capture again"
            ) from None
        finally:
            self._depth -= 1
        if "id" in node:
            self._same[node["id"]] = value
        return value

    def _decode(self, node: Any, path: str) -> Any:
        if not isinstance(node, dict):
            raise ValueError(f"found {type(node).__name__}; expected an object")
        kind = node["kind"]
        simple = _SIMPLE.get(kind)
        if simple is not None:
            return simple(node["value"])
        method = _METHODS.get(kind)
        if method is None:
            raise ValueError(f"found kind {kind!r}; this version does not know it")
        return method(self, node, path)

    def _tensor(self, node: dict[str, Any], path: str) -> Tensor:
        tensor = unpack(node, self._get)
        device = tensor.device if self._place is None else self._place(torch.device(node["device"]))
        if device == tensor.device:
            return tensor
        moved = tensor.detach().to(device).requires_grad_(tensor.requires_grad)
        return torch.nn.Parameter(moved, moved.requires_grad) if isinstance(tensor, torch.nn.Parameter) else moved

    def _get(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise CaptureError(f"the tensor {name!r} is not in the file; copy the capture again")
        return self._tensors[name]

    def _bytes(self, node: dict[str, Any], path: str) -> bytes | bytearray:
        raw = bytes(self._get(node["name"]).numpy().tobytes())
        return bytearray(raw) if node["kind"] == "bytearray" else raw

    def _ndarray(self, node: dict[str, Any], path: str) -> Any:
        import numpy

        dtype = numpy.dtype(node["dtype"])
        if dtype.hasobject:
            raise ValueError("an array of objects has no bytes")
        raw = self._get(node["name"]).numpy().tobytes()
        # order="A"-like copies would give up the layout: build it, then fill it.
        array = numpy.frombuffer(raw, dtype=dtype).reshape(node["shape"], order=node["order"]).copy(order=node["order"])
        return array[()] if node["scalar"] else array

    def _objects(self, node: dict[str, Any], path: str) -> Any:
        import numpy

        flat: Any = numpy.empty(len(node["items"]), dtype=object)
        flat[:] = self._sequence(node, path)
        return flat.reshape(node["shape"])

    def _sequence(self, node: dict[str, Any], path: str) -> list[Any]:
        return [self.decode(entry, entry_path(path, index)) for index, entry in enumerate(node["items"])]

    def _keys(self, node: dict[str, Any], path: str) -> list[Any]:
        return [self.decode(entry, f"{path}{{...}}") for entry in node["items"]]

    def _namedtuple(self, node: dict[str, Any], path: str) -> Any:
        cls = resolve(node, "namedtuple")
        names = cls._fields
        if len(names) != len(node["items"]):
            raise CaptureError(f"{node['class']} has {len(names)} fields here, and {len(node['items'])} in the capture")
        values = [
            self.decode(entry, attribute_path(path, name)) for name, entry in zip(names, node["items"], strict=True)
        ]
        return tuple.__new__(cls, values)

    def _mapping(self, node: dict[str, Any], path: str) -> Any:
        cls: Any = _BASES[node["base"]]
        if "class" in node:
            cls = resolve(node, "mapping")
        base = base_of(cls)
        result = base.__new__(cls)
        for key_node, entry in node["items"]:
            key = self.decode(key_node, f"{path} key")
            base.__setitem__(result, key, self.decode(entry, entry_path(path, key)))
        if base is defaultdict:
            result.default_factory = self._factory(node, path)
        self._attributes(result, node, path)
        return result

    def _factory(self, node: dict[str, Any], path: str) -> Callable[[], Any] | None:
        if "factory" not in node:
            return None
        if node["factory"] is None:
            return Unstored(attribute_path(path, "default_factory"), "callable", "captures do not know this type")
        return _FACTORIES[node["factory"]]

    def _userdict(self, node: dict[str, Any], path: str) -> Any:
        cls = resolve(node, "userdict")
        result = object.__new__(cls)
        self._attributes(result, node, path, data=path)
        if not isinstance(result.__dict__.get("data"), dict):
            raise ValueError("it wraps no dictionary")
        return result

    def _dataclass(self, node: dict[str, Any], path: str) -> Any:
        result = object.__new__(resolve(node, "dataclass"))
        self._attributes(result, node, path)
        return result

    def _attributes(self, target: Any, node: dict[str, Any], path: str, data: str | None = None) -> None:
        fields = getattr(type(target), "__dataclass_fields__", {})
        own = getattr(target, "__dict__", None)
        for name, entry in node.get("attributes", ()):
            inside = data if data is not None and name == "data" else attribute_path(path, name)
            value = self.decode(entry, inside)
            if name.startswith("__") or not isinstance(name, str):
                raise ValueError(f"found the attribute {name!r}")
            if own is not None:
                own[name] = value
            elif name in fields:  # a dataclass with slots
                object.__setattr__(target, name, value)

    def _enum(self, node: dict[str, Any], path: str) -> Any:
        cls = resolve(node, "enum")
        members, names = cls.__members__, node["members"]
        if not members or any(name not in members for name in names) or (not names and not issubclass(cls, enum.Flag)):
            raise CaptureError(f"{node['class']} has no members {names}; it has {', '.join(members)}")
        first = members[names[0]] if names else next(iter(members.values()))
        if not names:
            return first ^ first  # the empty flag
        for name in names[1:]:
            first |= members[name]
        return first

    def _reference(self, node: dict[str, Any], path: str) -> Any:
        return self._same[node["as"]]

    def _missing(self, node: dict[str, Any], path: str) -> Unstored:
        return Unstored(str(node["path"]), str(node["type"]), str(node["reason"]))


def _float(text: str) -> float:
    if "x" in text or text.lstrip("-") == "inf":
        return float.fromhex(text)
    value: float = struct.unpack(">d", bytes.fromhex(text))[0]
    return value


def _torch_value(kind: type) -> Callable[[str], Any]:
    def find(name: str) -> Any:
        value = getattr(torch, name)
        if not isinstance(value, kind):
            raise ValueError(f"found {name!r}; expected a {kind.__name__}")
        return value

    return find


def _path(node: dict[str, Any]) -> pathlib.PurePath:
    if node["class"] not in _PATHS:
        raise ValueError(f"found the class {node['class']!r}")
    if node["class"] in ("PosixPath", "WindowsPath"):
        return pathlib.Path(node["value"])
    pure: pathlib.PurePath = getattr(pathlib, node["class"])(node["value"])
    return pure


_BASES = {"dict": dict, "OrderedDict": OrderedDict, "defaultdict": defaultdict}
_SIMPLE: dict[Any, Callable[[Any], Any]] = {
    "int": lambda text: int(text, 16),
    "float": _float,
    "complex": lambda parts: complex(_float(parts[0]), _float(parts[1])),
    "size": torch.Size,
    "dtype": _torch_value(torch.dtype),
    "device": torch.device,
    "layout": _torch_value(torch.layout),
    "memory_format": _torch_value(torch.memory_format),
    "ellipsis": lambda _: ...,
    "range": lambda parts: range(*parts),
}
_METHODS: dict[Any, Callable[[TreeDecoder, dict[str, Any], str], Any]] = {
    "tensor": TreeDecoder._tensor,
    "bytes": TreeDecoder._bytes,
    "bytearray": TreeDecoder._bytes,
    "ndarray": TreeDecoder._ndarray,
    "objects": TreeDecoder._objects,
    "list": TreeDecoder._sequence,
    "tuple": lambda decoder, node, path: tuple(decoder._sequence(node, path)),
    "set": lambda decoder, node, path: set(decoder._keys(node, path)),
    "frozenset": lambda decoder, node, path: frozenset(decoder._keys(node, path)),
    "slice": lambda decoder, node, path: slice(*decoder._sequence(node, path)),
    "path": lambda decoder, node, path: _path(node),
    "namedtuple": TreeDecoder._namedtuple,
    "mapping": TreeDecoder._mapping,
    "userdict": TreeDecoder._userdict,
    "dataclass": TreeDecoder._dataclass,
    "enum": TreeDecoder._enum,
    "same": TreeDecoder._reference,
    "missing": TreeDecoder._missing,
}
