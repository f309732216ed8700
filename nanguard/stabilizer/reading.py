"""From a call of torch to a `Call` of the algebra."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from nanguard.algebra import Call, Law, Leaf, Operand, Term, Unrecognised, untracked
from nanguard.stabilizer import environment
from nanguard.stabilizer.knowledge import Knowledge, Known, is_plain, owns_memory

__all__ = ["Reading"]

_CONSTANTS = (bool, int, float, str, range, torch.dtype, torch.device)


@final
class Reading:
    """One call as the algebra sees it, together with what was known about its operands at that moment.

    Attributes:
        sound: whether every tensor among the arguments may be depended on.
        parents: what is known of the operands.
        tensors: the operands.
    """

    def __init__(self, knowledge: Knowledge, bound: Mapping[str, Any], keep_source: bool) -> None:
        self._knowledge = knowledge
        self._keep_source = keep_source
        self._transformed = environment.in_transform()
        self.sound = True
        self.parents: tuple[Known, ...] = ()
        self.tensors: list[Tensor] = []
        self._arguments = {name: self._argument(value) for name, value in bound.items()}

    @property
    def first(self) -> Tensor | None:
        """The first operand."""
        return self.tensors[0] if self.tensors else None

    def term(self, law: Law, position: int, results: list[Any]) -> Term | None:
        """The logarithm of one of the results, or `None` where nothing is known about it."""
        result, first = results[position], self.tensors[0] if self.tensors else None
        if first is None or not _is_real(result) or not is_plain(result) or result.device != first.device:
            return None
        if not self._traceable(law):
            return None
        shapes = tuple(tuple(part.shape) for part in results)
        call = Call(self._arguments, shapes[position], position, shapes, result.dtype == first.dtype)
        try:
            term = law.derive(call)
        except Unrecognised:
            return None
        if term.shape != shapes[position]:
            return None
        return term if result.requires_grad or self._transformed else untracked(term)

    def _traceable(self, law: Law) -> bool:
        """Whether it is certain that derivatives flow through the result, or certain that they do not."""
        return not self._transformed or (law.name != "detach" and torch.is_grad_enabled())

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._operand(value)
        if type(value) in (tuple, list) and value and all(isinstance(entry, Tensor) for entry in value):
            return tuple(map(self._operand, value))
        return self._nested(value) if isinstance(value, (tuple, list, slice)) else value

    def _operand(self, tensor: Tensor) -> Operand:
        trusted = self._knowledge.is_trusted(tensor)
        known = self._knowledge.find(tensor) if trusted else None
        if known is not None:
            self.parents = (*self.parents, known)
        self.tensors.append(tensor)
        if not trusted:
            return Operand(Leaf(tensor, tuple(tensor.shape)), None, trusted=False)
        if self._keep_source:
            tensor = tensor.clone()
        leaf = self._leaf(tensor)
        return Operand(leaf, known.term if known is not None else None, real=_is_real(tensor))

    def _leaf(self, tensor: Tensor) -> Leaf:
        if not owns_memory(tensor):
            tensor = tensor.clone()  # NumPy may write into it unseen
        return Leaf(tensor, tuple(tensor.shape), tensor._version, tensor.requires_grad or self._transformed)

    def _nested(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            self.sound &= self._knowledge.is_trusted(value)
            return self._leaf(value) if self.sound else value
        if isinstance(value, tuple):
            return tuple(map(self._nested, value))
        if isinstance(value, list):
            return list(map(self._nested, value))
        if isinstance(value, slice):
            return slice(self._nested(value.start), self._nested(value.stop), self._nested(value.step))
        # Arrays and other sequences can be edited unseen.
        self.sound &= value is None or value is Ellipsis or isinstance(value, _CONSTANTS)
        return value


def _is_real(tensor: Tensor) -> bool:
    return tensor.is_floating_point()
