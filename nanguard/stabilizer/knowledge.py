"""What is known about which tensor, for as long as it is true."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any, final

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from nanguard.algebra import Term
from nanguard.stabilizer.basis import Basis
from nanguard.stabilizer.lineage import Lineage
from nanguard.stabilizer.memory import (
    addresses_of_foreign,
    is_plain,
    keeps_too_much_alive,
    lie_in,
    storage_key,
)
from nanguard.stabilizer.outline import filled
from nanguard.stabilizer.region import Region

__all__ = ["Knowledge", "Known", "entries", "node_of", "origins_of"]

# Larger terms, and longer histories, are forgotten: an exponential moving average must not keep all that went into it alive.
LARGEST_TERM = 256
LONGEST_HISTORY = 256

# Of longer recursions only the latest are kept: whatever is edited, what was computed stays true.
_MOST_ORIGINS = 256
_NOTHING: frozenset[int | None] = frozenset()


@final
class Known:
    """The logarithm of one tensor.

    Arguments:
        tensor: a weak reference to it.
        value: the tensor itself.
        outline: the logarithm, with numbers in the place of tensors.
        values: these tensors.
        versions: the versions that they had when it was computed.
        parents: what is known about the tensors that it was computed from.
        lesson: what it was learnt by, and will be again from calls that look the same; `None` where that cannot be said.

    Attributes:
        node: which derivative the tensor has.
        lineage: where somebody may watch derivatives that a swap would bypass.
        region: the checkpointed region that it was learnt in.
        basis: what a large softmax can be had from later.
        exact: whether the tensor has all its digits.
        again: whether it is, or comes from, a quotient that may have been replaced.
        origins: memory that it depended on before what was computed took its place. Edits of that make it forgotten as well.
    """

    __slots__ = (
        "__weakref__",
        "_storages",
        "_term",
        "again",
        "basis",
        "depth",
        "exact",
        "lesson",
        "lineage",
        "node",
        "origins",
        "outline",
        "parents",
        "region",
        "requires_grad",
        "tensor",
        "values",
        "version",
        "versions",
    )

    def __init__(
        self,
        tensor: weakref.ref[Tensor],
        value: Tensor,
        outline: Term,
        values: Sequence[Tensor],
        versions: Sequence[int],
        parents: tuple[Known, ...],
        lesson: object = None,
    ) -> None:
        self.tensor = tensor
        self.outline = outline
        self.values = values
        self.versions = versions
        self.parents = parents
        self.lesson = lesson
        self.lineage: Lineage = Lineage(tuple([parent.lineage for parent in parents]))
        self.exact = False
        self.region: Region | None = None
        self.basis: Basis | None = None
        self.version = value._version
        self.requires_grad = value.requires_grad
        self.node = node_of(value)
        depth, again, origins = 0, False, _NOTHING
        for parent in parents:
            depth = max(depth, parent.depth)
            again = again or parent.again
            if parent.origins and parent.origins is not origins:
                origins = origins | parent.origins if origins else parent.origins
        self.depth: int = depth + 1
        self.again: bool = again
        self.origins: frozenset[int | None] = origins
        self._storages: frozenset[int | None] | None = None
        self._term: Term | None = None

    @property
    def term(self) -> Term:
        """The logarithm."""
        if self._term is None:
            self._term = filled(self.outline, self.values, self.versions)
        return self._term

    @property
    def storages(self) -> frozenset[int | None]:
        """The memory that it depends on. Edits are rare, and most tensors are gone before there is one."""
        if self._storages is None:
            tensors = self.depends_on()
            self._storages = self.origins.union(storage_key(part) for part in tensors if part is not None)
        return self._storages

    def depends_on(self) -> tuple[Tensor | None, ...]:
        """The tensor, what its term is made of, and what its node has saved."""
        return (self.tensor(), *self.values, *(() if self.basis is None else self.basis.saved()))

    def begin_anew(self, outline: Term, values: Sequence[Tensor], lesson: object) -> None:
        """Remember another form of the same logarithm. Nobody can watch derivatives where there are none."""
        self.origins = origins_of(self.values, (self,))
        self.outline, self.values, self.lesson = outline, values, lesson
        self.versions = [value._version for value in values]
        self.basis = self._storages = self._term = None
        self.parents, self.depth = (), 1
        if not self.requires_grad:
            self.lineage.parents = ()

    def holds(self, tensor: Tensor) -> bool:
        """Whether neither the tensor nor anything that the term depends on has changed since."""
        if tensor._version != self.version:
            return False
        node = tensor.grad_fn
        if node is None:
            if self.node is not None or tensor.requires_grad != self.requires_grad:
                return False
        elif node._sequence_nr() != self.node:
            return False  # a custom function has handed on a view, with a derivative of its own
        # A loop, as this is asked about every argument of every call.
        for value, version in zip(self.values, self.versions):  # noqa: B905, SIM110
            if value._version != version:
                return False
        return True


@final
class Knowledge:
    """The known tensors of one active block. It keeps no tensor alive but the leaves of terms, and those only as long as the
    tensors that they are terms of.

    Attributes:
        region: the checkpointed region that the code is in. What was learnt outside of it is not found.
        has_escapes: whether any memory can be edited unseen, or ever could.
    """

    def __init__(self) -> None:
        self._known: dict[int, Known] = {}
        self._escaped: dict[int, StorageWeakRef] = {}
        self.has_escapes = False
        self._pins = False
        self.region: Region | None = None

    def __len__(self) -> int:
        return len(self._known)

    def might_know(self, args: tuple[Any, ...]) -> bool:
        """Whether any of these arguments, or of the entries of a list among them, was ever recorded. Cheap, and no promise."""
        known = self._known
        if known:
            for arg in args:
                if id(arg) in known or (type(arg) in (list, tuple) and self.might_know(tuple(arg))):
                    return True
        return False

    def find(self, tensor: Tensor) -> Known | None:
        """What is known about a tensor, and still true."""
        known = self._known.get(id(tensor))
        if known is None or known.tensor() is not tensor:
            return None
        if self.region is not None and not self.region.holds(known.region):
            return None
        if known.holds(tensor):
            return known
        del self._known[id(tensor)]
        return None

    def record(
        self,
        tensor: Tensor,
        outline: Term,
        values: Sequence[Tensor],
        versions: Sequence[int],
        parents: tuple[Known, ...],
        lesson: object = None,
        basis: Basis | None = None,
        exact: bool = False,
        again: bool = False,
        origins: frozenset[int | None] | None = None,
        watched: tuple[Known, ...] = (),
    ) -> None:
        """Note the logarithm of a tensor. The arguments are those of `Known`.

        Where what it was computed from is left behind, derivatives may still be `watched` there.
        """
        key = id(tensor)
        # The callback must not know the entry: a forgotten one would keep its tensors alive until garbage is collected.
        reference = weakref.ref(tensor, lambda dead: self._drop(key, dead))
        known = Known(reference, tensor, outline, values, versions, parents, lesson)
        known.region = self.region
        known.exact = exact
        known.basis = basis
        if again:
            known.again = True
        if watched and known.requires_grad:
            known.lineage.parents = tuple([parent.lineage for parent in watched])
        if origins:
            known.origins = origins
        if (
            outline.size > LARGEST_TERM
            or known.depth > LONGEST_HISTORY
            or (not known.requires_grad and keeps_too_much_alive(values, tensor))
        ):
            self._known.pop(key, None)
            return
        self._known[key] = known

    def edited(self, tensor: Any) -> None:
        """Forget all that shares memory with a tensor about to be edited: `.data` shares memory, but no version counter."""
        storage = storage_key(tensor) if self._known and isinstance(tensor, Tensor) else None
        if storage is not None:
            self._forget(storage)
            addresses = addresses_of_foreign(tensor)
            if addresses is not None:
                known = self._known
                for key in [key for key, entry in known.items() if lie_in(entry.depends_on(), addresses)]:
                    del known[key]

    def escaped(self, tensor: Any) -> None:
        """Forget a tensor's memory for good: from now on it can be edited unseen."""
        storage = storage_key(tensor) if isinstance(tensor, Tensor) else None
        if storage is not None:
            self._escaped[storage] = StorageWeakRef(tensor.untyped_storage())
            self.has_escapes = True
            self._forget(storage)

    def is_trusted(self, tensor: Tensor) -> bool:
        """Whether a term may depend on it: a plain tensor whose every edit is seen."""
        return is_plain(tensor) and self.is_unescaped(tensor)

    def is_unescaped(self, tensor: Tensor) -> bool:
        """Whether its memory is not known to be edited unseen."""
        if not self._escaped:
            return True
        storage = storage_key(tensor)
        found = self._escaped.get(storage) if storage is not None else None
        return found is None or found.expired()

    def pin(self, tensor: Any) -> None:
        """Note that somebody watches derivatives at this tensor."""
        known = self._known.get(id(tensor))
        if known is not None:
            known.lineage.pinned = self._pins = True

    def are_pinned(self, several: tuple[Known, ...]) -> bool:
        """Whether any of them, or anything known that it came from, is pinned."""
        return self._pins and any(known.lineage.is_pinned() for known in several)

    def clear(self) -> None:
        """Forget everything."""
        self._known.clear()
        self._escaped.clear()
        self.has_escapes = False

    def _forget(self, storage: int) -> None:
        for key in [key for key, known in self._known.items() if storage in known.storages]:
            del self._known[key]

    def _drop(self, key: int, dead: weakref.ref[Tensor]) -> None:
        known = self._known.get(key)
        if known is not None and known.tensor is dead:
            del self._known[key]


def origins_of(values: Sequence[Tensor], parents: Sequence[Known]) -> frozenset[int | None]:
    """The memory of these tensors, and what these depended on."""
    new = frozenset(map(storage_key, values))
    found = new.union(*(parent.origins for parent in parents))
    return found if len(found) <= _MOST_ORIGINS else new


def node_of(tensor: Tensor) -> int | None:
    """Which derivative a tensor has."""
    node = tensor.grad_fn
    return None if node is None else node._sequence_nr()


def entries(value: Any) -> Iterator[Any]:
    """A value, or the entries of a list of them, as in-place functions take it."""
    if isinstance(value, (tuple, list)):
        yield from value
    else:
        yield value
