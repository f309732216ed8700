"""The tensors that a step gets from outside, by the name that a user would write: ``batch["image"]``, ``encoder.weight``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from nanguard.trees import named_tensors

__all__ = ["leaf_path", "named_leaves"]


def named_leaves(args: Sequence[Any]) -> list[tuple[str, Tensor]]:
    """The tensors in the arguments of a training step with their paths; the first argument is called ``batch``."""
    roots = ["batch", *(f"args[{position}]" for position in range(1, len(args)))]
    return [pair for root, argument in zip(roots, args, strict=False) for pair in named_tensors(argument, root)]


def leaf_path(tensor: Tensor, inputs: list[tuple[str, Tensor]], module: nn.Module) -> str | None:
    """The name of a tensor (or of what it is a view of) among the inputs, parameters and buffers of a step."""
    outside = [*inputs, *module.named_parameters(), *module.named_buffers()]
    return next((name for name, candidate in outside if candidate is tensor or _same_storage(candidate, tensor)), None)


def _same_storage(one: Tensor, other: Tensor) -> bool:
    try:
        return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError, ValueError):  # sparse, lazy and wrapped tensors have none
        return False
