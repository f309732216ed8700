"""From a call of torch to a `Call` of the algebra."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from nanguard.algebra import Apply, Call, Law, Leaf, Operand, Term, Unrecognised, untracked
from nanguard.algebra.call import is_logarithm
from nanguard.algebra.operators import FULL
from nanguard.stabilizer import environment
from nanguard.stabilizer.knowledge import Knowledge, Known
from nanguard.stabilizer.memory import is_plain, is_real, owns_memory
from nanguard.stabilizer.outline import counts_up, looks, may_count_up

__all__ = ["Reading"]

_CONSTANTS = (bool, int, float, str, range, torch.dtype, torch.device)


@final
class Reading:
    """One call as the algebra sees it, together with what was known about its operands at that moment.

    Attributes:
        sound: whether every tensor among the arguments may be depended on.
        parents: what is known of the operands.
        tensors: the operands.
        subject: the tensor that a query asks about.
        repeats: whether what was derived holds for all calls that look the same: no numbers were looked at.
    """

    def __init__(self, knowledge: Knowledge, bound: Mapping[str, Any], keep_source: bool) -> None:
        self._knowledge = knowledge
        self._keep_source = keep_source
        self._transformed = environment.in_transform()
        self.sound = True
        self.repeats = True
        self.parents: tuple[Known, ...] = ()
        self.tensors: list[Tensor] = []
        subject = bound.get("input")
        self.subject: Tensor | None = subject if isinstance(subject, Tensor) else None
        self._arguments = {name: self._argument(value) for name, value in bound.items()}

    def term(self, law: Law, position: int, results: list[Any]) -> Term | None:
        """The logarithm of one of the results, or `None` where nothing is known about it."""
        result = results[position]
        first = self.tensors[0] if self.tensors else result
        if not is_real(result) or not is_plain(result) or result.device != first.device:
            return None
        if not self._traceable(law) or (result.requires_grad and not self.tensors):
            return None
        shapes = tuple(tuple(part.shape) for part in results)
        same_dtype = result.dtype == first.dtype
        call = Call(self._arguments, shapes[position], position, shapes, same_dtype)
        before = looks()
        try:
            term = law.derive(call)
        except Unrecognised:
            return None
        finally:
            self.repeats = self.repeats and looks() == before
        if term.shape != shapes[position]:
            return None
        # Of a query the result is not there yet, only what it asks about: it may have other operands to differentiate at.
        asks = law.role == "query" or law.role == "misuse"
        tracked = result.requires_grad or (asks and self.differentiable)
        return term if tracked or self._transformed else untracked(term)

    @property
    def differentiable(self) -> bool:
        """Whether one of the operands is differentiated at."""
        return any(tensor.requires_grad for tensor in self.tensors)

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
        constant = _constant(tensor, None if known is not None and is_logarithm(known.outline) else known)
        if constant is not None:
            return Operand(self._leaf(tensor), constant=constant)
        if self._keep_source:
            tensor = tensor.clone()
        leaf = self._leaf(tensor) if is_real(tensor) else self._index(tensor)
        term = known.term if known is not None else None
        return Operand(leaf, term, real=is_real(tensor), mask=tensor.dtype is torch.bool)

    def _leaf(self, tensor: Tensor) -> Leaf:
        if not owns_memory(tensor):
            tensor = tensor.clone()  # NumPy may write into it unseen
        return Leaf(tensor, tuple(tensor.shape), tensor._version, tensor.requires_grad or self._transformed)

    def _index(self, tensor: Tensor) -> Leaf:
        leaf = self._leaf(tensor)
        if self._transformed or not may_count_up(tensor):
            return leaf
        return Leaf(leaf.value, leaf.shape, leaf.version, leaf.tracked, partial(counts_up, leaf.value))

    def _nested(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            self.sound &= self._knowledge.is_trusted(value)
            return self._index(value) if self.sound else value
        if isinstance(value, tuple):
            return tuple(map(self._nested, value))
        if isinstance(value, list):
            return list(map(self._nested, value))
        if isinstance(value, slice):
            return slice(self._nested(value.start), self._nested(value.stop), self._nested(value.step))
        # Arrays and other sequences can be edited unseen.
        self.sound &= value is None or value is Ellipsis or isinstance(value, _CONSTANTS)
        return value


def _constant(tensor: Tensor, known: Known | None) -> float | None:
    """The number that all elements are, where that is known without waiting for a device."""
    if known is not None:
        full = known.term
        return full.params["constant"] if isinstance(full, Apply) and full.operator is FULL else None
    if tensor.ndim or tensor.requires_grad or tensor.device.type != "cpu" or not is_real(tensor):
        return None
    return tensor.item() if type(tensor) is Tensor and not environment.in_transform() else None
