"""Which values of a graph share memory, and which nodes write into it."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from typing import Any, final

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["Memory", "example", "is_plain", "tensors_in", "written"]

# Nothing that they do shows in a version counter.
_UNCOUNTED = frozenset({"detach_", "requires_grad_", "share_memory_"})
# What may end that derivatives flow into a tensor.
_DETACHING = frozenset({"detach_", "requires_grad_", "setattr", "__set__", "set_"})
# What hands memory out, or puts other memory in its place.
_ESCAPES = frozenset({"data_ptr", "numpy", "storage", "untyped_storage"})
# Functions whose buffers are edited although no name says so.
_BUFFERS = {"batch_norm": (1, 2), "instance_norm": (1, 2)}
_SAFE_MODULES = ("torch", "_operator", "operator", "builtins", "math", "nanguard")


def example(node: Any) -> Any:
    """What a node computed when the graph was traced: a fake tensor, a list of them, a number, or `None` where unknown."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of a value that may be a list of them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from tensors_in(entry)


def is_plain(value: Any) -> bool:
    """Whether it stands for an ordinary dense tensor, of no subclass and under no transform, that counts its versions."""
    if type(value) is not FakeTensor or value.layout is not torch.strided or value.device.type == "meta":
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(value):
        return False
    return not (value.is_inference() or value.is_neg() or value.is_nested or value.is_complex())


def storage_key(value: Tensor) -> int | None:
    """What tensors of the same memory have in common; `None` for those without memory of their own."""
    try:
        key: int = value.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None
    return key


def written(node: fx.Node) -> list[fx.Node]:
    """The nodes whose memory a node writes into, or may write into where nobody can tell."""
    if node.op in ("placeholder", "get_attr", "output"):
        return []
    if node.op == "call_module" or not _is_safe(node.target):
        return list(node.all_input_nodes)
    found = _nodes(node.kwargs.get("out"))
    overloads = _overloads(node.target)
    if overloads:
        if any(argument.alias_info is not None and argument.alias_info.is_write for argument in overloads):
            return list(node.all_input_nodes)
        return found
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    subject = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))
    if _writes_first(name, node.target) or node.kwargs.get("inplace"):
        found += _nodes(subject)
    for place in _BUFFERS.get(name, ()):
        found += _nodes(node.args[place]) if place < len(node.args) else []
    if name in _BUFFERS:
        found += _nodes([node.kwargs.get("running_mean"), node.kwargs.get("running_var")])
    return found


def _writes_first(name: str, target: Any) -> bool:
    """Whether a function writes into its first argument, by its name."""
    if name in ("setitem", "delitem", "setattr", "__setitem__", "__delitem__", "__set__"):
        return True
    if getattr(target, "__module__", None) == "_operator":  # `iadd` is the in-place twin of `add`; `and_` is none
        return name.startswith("i") and (hasattr(operator, name[1:]) or hasattr(operator, f"{name[1:]}_"))
    if name.startswith("__i") and name.endswith("__"):
        return name not in ("__invert__", "__int__", "__index__")
    return name in _ESCAPES or (name.endswith("_") and not name.endswith("__"))


def _is_safe(target: Any) -> bool:
    """Whether the name of a function tells what it writes into; nothing is known about functions of users."""
    if isinstance(target, (str, torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return True
    if isinstance(target, torch._ops.HigherOrderOperator):
        return False
    module = getattr(target, "__module__", None)
    if module is None:  # methods of Tensor, and functions written in C
        return type(target).__name__ in ("builtin_function_or_method", "method_descriptor", "method-wrapper")
    return module.partition(".")[0] in _SAFE_MODULES or module.startswith("pybind11")


def _overloads(target: Any) -> list[Any]:
    """The arguments of a dispatcher operation, of all its overloads."""
    if isinstance(target, torch._ops.OpOverload):
        return list(target._schema.arguments)
    if isinstance(target, torch._ops.OpOverloadPacket):
        return [argument for name in target.overloads() for argument in getattr(target, name)._schema.arguments]
    return []


def _nodes(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    return found


@final
class Memory:
    """The memory of one graph.

    Attributes:
        edited: memory that anything writes into, ever.
        tracked: memory into which derivatives flow, or flowed once.
        unseen: memory that something writes into although no node says so.
        inputs: memory that comes from outside. In another call it may overlap, although it did not when the graph was traced.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.edited: set[int | None] = set()
        self.tracked: set[int | None] = set()
        self.inputs: set[int | None] = set()
        counts: Counter[int | None] = Counter()
        versions: dict[int | None, int] = {}
        for node in graph.nodes:
            for value in tensors_in(example(node)):
                key = storage_key(value)
                versions[key] = max(versions.get(key, 0), 0 if value.is_inference() else value._version)
                if value.requires_grad:
                    self.tracked.add(key)
                if node.op in ("placeholder", "get_attr"):
                    self.inputs.add(key)
            keys = {storage_key(value) for target in written(node) for value in tensors_in(example(target))}
            self.edited |= keys
            name = getattr(node.target, "__name__", node.target)
            if name not in _UNCOUNTED:
                counts.update(keys)
            if name in _DETACHING:
                self.tracked |= keys
        self.edited |= {key for key, version in versions.items() if version}
        self.unseen = {key for key, version in versions.items() if version > counts[key]}

    def touched(self, node: fx.Node) -> set[int | None] | None:
        """The memory that a node may write into; `None` stands for all memory there is."""
        keys: set[int | None] = set()
        for target in written(node):
            value = example(target)
            if value is None and target.op != "get_attr":  # a get_attr without an example is a graph of its own
                return None
            keys |= {storage_key(tensor) for tensor in tensors_in(value)}
        if None in keys:
            return None
        return keys | self.inputs if keys & self.inputs else keys

    def is_trusted(self, value: Any) -> bool:
        """Whether a term may depend on a value: a plain tensor whose every edit is seen."""
        if not is_plain(value):
            return False
        key = storage_key(value)
        return key is not None and key not in self.unseen

    def is_tracked(self, value: Tensor) -> bool:
        """Whether derivatives may flow into a value; in memory that is edited, the example tells what it became in the end."""
        return value.requires_grad or (self.is_edited(value) and storage_key(value) in self.tracked)

    def is_edited(self, value: Any) -> bool:
        """Whether anything ever writes into the memory of a value."""
        return any(storage_key(tensor) in self.edited for tensor in tensors_in(value))
