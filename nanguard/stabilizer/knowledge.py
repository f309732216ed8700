"""What is known about which tensor, for as long as it is true."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, final

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from nanguard.algebra import Term
from nanguard.stabilizer.regions import Region

__all__ = ["Knowledge", "Known", "is_plain", "owns_memory"]

# Larger terms, and longer histories, are forgotten: an exponential moving average must not keep all that went into it alive.
LARGEST_TERM = 256
LONGEST_HISTORY = 256


@final
class Known:
    """The logarithm of one tensor.

    Attributes:
        term: the logarithm.
        parents: what is known about the tensors that it was computed from.
        pinned: whether somebody watches derivatives at this tensor (a hook, `retain_grad`), which a swap would bypass.
        region: the checkpointed region that it was learnt in.
        basis: a large softmax itself, as part of its graph, and in what version.
    """

    __slots__ = (
        "__weakref__",
        "_storages",
        "basis",
        "basis_version",
        "depth",
        "node",
        "parents",
        "pinned",
        "region",
        "requires_grad",
        "tensor",
        "term",
        "version",
    )

    def __init__(self, tensor: weakref.ref[Tensor], value: Tensor, term: Term, parents: tuple[Known, ...]) -> None:
        self.tensor = tensor
        self.term = term
        self.parents = parents
        self.pinned = False
        self.region: Region | None = None
        self.basis: Tensor | None = None
        self.basis_version = 0
        self.version = value._version
        self.requires_grad = value.requires_grad
        self.node = _node_of(value)
        self.depth: int = 1 + max((parent.depth for parent in parents), default=0)
        self._storages: frozenset[int | None] | None = None

    @property
    def storages(self) -> frozenset[int | None]:
        """The memory that it depends on. Edits are rare, and most tensors are gone before there is one."""
        if self._storages is None:
            tensors = (self.tensor(), *(leaf.value for leaf in self.term.leaves))
            self._storages = frozenset(storage_key(part) for part in tensors if part is not None)
        return self._storages

    def is_pinned(self) -> bool:
        """Whether it, or anything known that it came from, is pinned."""
        stack, seen = [self], {id(self)}
        while stack:
            known = stack.pop()
            if known.pinned:
                return True
            for parent in known.parents:
                if id(parent) not in seen:
                    seen.add(id(parent))
                    stack.append(parent)
        return False

    def holds(self, tensor: Tensor) -> bool:
        """Whether neither the tensor nor anything that the term depends on has changed since."""
        if tensor._version != self.version or tensor.requires_grad != self.requires_grad:
            return False
        if _node_of(tensor) != self.node:  # a custom function has handed on a view, with a derivative of its own
            return False
        return all(leaf.value._version == leaf.version for leaf in self.term.leaves)


@final
class Knowledge:
    """The known tensors of one active block. It keeps no tensor alive but the leaves of terms, and those only as long as the
    tensors that they are terms of.

    Attributes:
        region: the checkpointed region that the code is in. What was learnt outside of it is not found.
    """

    def __init__(self) -> None:
        self._known: dict[int, Known] = {}
        self._escaped: dict[int, StorageWeakRef] = {}
        self.region: Region | None = None

    def __len__(self) -> int:
        return len(self._known)

    @property
    def has_escapes(self) -> bool:
        """Whether any memory can be edited unseen, or ever could."""
        return bool(self._escaped)

    def might_know(self, args: tuple[Any, ...]) -> bool:
        """Whether any of these arguments, or of the entries of a list among them, was ever recorded. Cheap, and no promise."""
        known = self._known
        if not known:
            return False
        return any(id(arg) in known or (type(arg) in (list, tuple) and self.might_know(tuple(arg))) for arg in args)

    def find(self, tensor: Tensor) -> Known | None:
        """What is known about a tensor, and still true."""
        known = self._known.get(id(tensor))
        if known is None or known.tensor() is not tensor:
            return None
        if self.region is not None and not self.region.holds(known.region):
            return None
        if not known.holds(tensor):
            del self._known[id(tensor)]
            return None
        return known

    def record(self, tensor: Tensor, term: Term, parents: tuple[Known, ...], basis: Tensor | None = None) -> None:
        """Note the logarithm of a tensor."""
        key = id(tensor)
        known = Known(weakref.ref(tensor, lambda _: self._drop(key, known)), tensor, term, parents)
        known.region = self.region
        if basis is not None:
            known.basis, known.basis_version = basis, basis._version
        if term.size > LARGEST_TERM or known.depth > LONGEST_HISTORY:
            self._known.pop(key, None)
            return
        self._known[key] = known

    def edited(self, tensor: Any) -> None:
        """Forget all that shares memory with a tensor about to be edited: `.data` shares memory, but no version counter."""
        storage = storage_key(tensor) if self._known and isinstance(tensor, Tensor) else None
        if storage is not None:
            self._forget(storage)

    def escaped(self, tensor: Any) -> None:
        """Forget a tensor's memory for good: from now on it can be edited unseen."""
        storage = storage_key(tensor) if isinstance(tensor, Tensor) else None
        if storage is not None:
            self._escaped[storage] = StorageWeakRef(tensor.untyped_storage())
            self._forget(storage)

    def is_trusted(self, tensor: Tensor) -> bool:
        """Whether a term may depend on it: a plain tensor whose every edit is seen."""
        if not is_plain(tensor):
            return False
        if not self._escaped:
            return True
        storage = storage_key(tensor)
        found = self._escaped.get(storage) if storage is not None else None
        return found is None or found.expired()

    def pin(self, tensor: Any) -> None:
        """Note that somebody watches derivatives at this tensor."""
        known = self._known.get(id(tensor))
        if known is not None:
            known.pinned = True

    def clear(self) -> None:
        """Forget everything."""
        self._known.clear()
        self._escaped.clear()

    def _forget(self, storage: int) -> None:
        for key in [key for key, known in self._known.items() if storage in known.storages]:
            del self._known[key]

    def _drop(self, key: int, known: Known) -> None:
        if self._known.get(key) is known:
            del self._known[key]


def _node_of(tensor: Tensor) -> int | None:
    """Which derivative a tensor has."""
    node = tensor.grad_fn
    return None if node is None else node._sequence_nr()


def is_plain(tensor: Tensor) -> bool:
    """Whether it is an ordinary dense tensor, of no subclass, that counts its versions."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    return plain and not (tensor.is_inference() or tensor.is_neg() or tensor.is_meta or tensor.is_nested)


def owns_memory(tensor: Tensor) -> bool:
    """Whether torch alone holds the memory: what it shares with NumPy, a buffer or another process cannot be resized."""
    try:
        return bool(tensor.untyped_storage().resizable())
    except (NotImplementedError, RuntimeError):  # under functorch
        return True


def storage_key(tensor: Tensor) -> int | None:
    """What tensors of the same memory have in common; `None` for those without memory (under functorch)."""
    try:
        key: int = tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None
    return key


def entries(value: Any) -> Iterator[Any]:
    """A value, or the entries of a list of them, as in-place functions take it."""
    if isinstance(value, (tuple, list)):
        yield from value
    else:
        yield value
