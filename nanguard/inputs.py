"""The batch as it was before the step, although some steps write into it.

Copying every batch would cost more than all the rest. So the first batch is copied, the version counters of its tensors tell
which of them the step writes into, and from then on only those are copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

__all__ = ["InputKeeper", "copy_of"]


def copy_of(args: Any) -> Any:
    """The same structure with tensors of their own; what was one tensor in two places stays one."""
    copies: dict[int, Tensor] = {}

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in copies:
            clone = leaf.detach().clone(memory_format=torch.preserve_format)
            copies[id(leaf)] = clone.requires_grad_(leaf.requires_grad)
        return copies[id(leaf)]

    return tree_map(copy, args)


_LEAVES = (Tensor, int, float, str)


@final
class InputKeeper:
    """Keeps the arguments of a step as they were before it."""

    def __init__(self) -> None:
        self._written: set[int] | None = None
        self._seen: list[tuple[int, Tensor, int]] = []

    def keep(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """Arguments equal to these, which the step that is about to run will not change."""
        if self._seen:
            self.learn()
        leaves, spec = _flat(args), None
        if leaves is None or self._written is None or self._written:
            leaves, spec = tree_flatten(tuple(args))
        self._seen = [
            (position, leaf, leaf._version)
            for position, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor) and not leaf.is_inference()
        ]
        if spec is None or (self._written is not None and not self._written):
            return tuple(args)
        for position, leaf, _ in self._seen:
            if self._written is None or position in self._written:
                leaves[position] = copy_of(leaf)
        kept: tuple[Any, ...] = tree_unflatten(leaves, spec)
        return kept

    def learn(self) -> bool:
        """Takes note of what the step has written into; whether anything of it had not been copied."""
        if self._written is not None and all(leaf._version == version for _, leaf, version in self._seen):
            self._seen = []
            return False
        written = {position for position, leaf, version in self._seen if leaf._version != version}
        first = self._written is None
        surprising = not first and not written <= (self._written or set())
        self._written = (self._written or set()) | written
        self._seen = []
        return surprising


def _flat(args: Sequence[Any]) -> list[Any] | None:
    """The leaves of a tuple of tensors, in the order of pytree, which takes ten times as long; `None` for anything else."""
    leaves: list[Any] = []
    for entry in args:
        if type(entry) in (tuple, list):
            leaves.extend(entry)
        else:
            leaves.append(entry)
    return leaves if all(type(leaf) in _LEAVES for leaf in leaves) else None
