"""The tensors that a step gets from outside, by the name that a user would write: ``batch["image"]``,
``encoder.weight``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path

__all__ = ["leaf_path", "named_leaves"]


def named_leaves(args: Sequence[Any]) -> list[tuple[str, Tensor]]:
    """The tensors in the arguments of a training step with their paths; the first argument is called ``batch``."""
    named = []
    for position, argument in enumerate(args):
        root = "batch" if position == 0 else f"args[{position}]"
        for path, leaf in tree_flatten_with_path(argument)[0]:
            if isinstance(leaf, Tensor):
                named.append((root + "".join(_step(key) for key in path), leaf))
    return named


def leaf_path(tensor: Tensor, args: Sequence[Any], module: nn.Module) -> str | None:
    """The name of a tensor (or of what it is a view of) among the inputs, parameters and buffers of a step."""
    outside = [*named_leaves(args), *module.named_parameters(), *module.named_buffers()]
    for name, candidate in outside:
        if candidate is tensor or _same_storage(candidate, tensor):
            return name
    return None


def _same_storage(one: Tensor, other: Tensor) -> bool:
    if one.layout is not torch.strided or other.layout is not torch.strided:
        return False
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)


def _step(key: Any) -> str:
    # Keys of torch's pytree: mappings and sequences carry what a subscript takes, dataclasses and named tuples a name.
    if hasattr(key, "key"):
        return f"[{str(key.key)!r}]".replace("'", '"') if isinstance(key.key, str) else f"[{key.key!r}]"
    if hasattr(key, "idx"):
        return f"[{key.idx}]"
    return f".{getattr(key, 'name', key)}"
