"""The tensors that a step gets from outside, by the name that a user would write: ``batch["image"]``, ``encoder.weight``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nanguard.diagnosis.naming import clean_name
from nanguard.diagnosis.records import storage_of
from nanguard.diagnosis.statistics import is_finite, plain, readable
from nanguard.trees import named_tensors

__all__ = ["leaf_path", "meant_leaves", "named_leaves"]

_MACHINERY = frozenset(vars(nn.Module()))


def named_leaves(args: Sequence[Any]) -> list[tuple[str, Tensor]]:
    """The tensors in the arguments of a training step with their paths; the first argument is called ``batch``."""
    roots = ["batch", *(f"args[{position}]" for position in range(1, len(args)))]
    return [pair for root, argument in zip(roots, args, strict=False) for pair in named_tensors(argument, root)]


def meant_leaves(args: Sequence[Any]) -> frozenset[str]:
    """Paths of the tensors in a healthy call that hold infinities: there they are meant."""
    return frozenset(
        path for path, tensor in named_leaves(args) if not is_finite(tensor) and not bool(torch.isnan(tensor).any())
    )


def leaf_path(
    tensors: Sequence[Tensor], inputs: list[tuple[str, Tensor]], module: nn.Module
) -> tuple[str, Tensor] | None:
    """The first parameter, buffer, attribute or input of a step that one of these tensors is (a view of), with its name."""
    weights = [*module.named_parameters(), *module.named_buffers(), *_attributes(module)]
    outside = [*((clean_name(name), entry) for name, entry in weights), *inputs]
    storages = {storage_of(tensor) for tensor in tensors}
    readables = [(name, readable(entry)) for name, entry in outside]
    found = [(name, entry) for name, entry in readables if storage_of(entry) in storages]
    # Several leaves may share memory, as columns of one table: the one at fault is the one that is not finite.
    bad = [(name, entry) for name, entry in found if plain(entry) and not is_finite(entry)]
    name, _ = next(iter(bad or found), ("", None))
    if not name:
        return None
    storage = storage_of(dict(found)[name])
    return name, next(tensor for tensor in tensors if storage_of(tensor) == storage)


def _attributes(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors that modules hold as plain attributes, also in lists and dictionaries."""
    for prefix, module in root.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, (Tensor, list, tuple, dict)) and name not in _MACHINERY:
                yield from named_tensors(value, f"{prefix}.{name}" if prefix else name)
