"""The tensors that a step gets from outside, by the name that a user would write: ``batch["image"]``, ``encoder.weight``."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from nanguard.diagnosis.naming import clean_name
from nanguard.diagnosis.records import storage_of
from nanguard.diagnosis.statistics import is_finite, plain, stored
from nanguard.trees import attributes_of, named_tensors
from nanguard.values import is_users

__all__ = ["leaf_path", "meant_leaves", "named_leaves", "state_leaves"]

_STRUCTURE = frozenset(nn.Module().__dict__)
_DEEPEST = 4
_LONGEST = 1024


def named_leaves(args: Sequence[Any]) -> list[tuple[str, Tensor]]:
    """The tensors in the arguments of a training step with their paths; the first argument is called ``batch``."""
    roots = ["batch", *(f"args[{position}]" for position in range(1, len(args)))]
    return [pair for root, argument in zip(roots, args, strict=False) for pair in named_tensors(argument, root)]


def meant_leaves(args: Sequence[Any]) -> frozenset[str]:
    """Paths of the tensors in a healthy call that hold infinities: there they are meant."""
    return frozenset(
        path for path, tensor in named_leaves(args) if not is_finite(tensor) and not bool(torch.isnan(tensor).any())
    )


def state_leaves(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters, buffers, and what modules hold as plain attributes, also in containers, by their qualified names."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return [*((clean_name(name), entry) for name, entry in named), *_attributes(module)]


def leaf_path(tensors: Sequence[Tensor], outside: Sequence[tuple[str, Tensor]]) -> tuple[int, Tensor] | None:
    """The first of the leaves `outside` that one of these tensors is (a view of): its position, and the tensor."""
    storages = {storage_of(tensor) for tensor in tensors}
    held = [(position, stored(entry)) for position, (_, entry) in enumerate(outside)]
    found = [(position, entry) for position, entry in held if storage_of(entry) in storages]
    # Several leaves may share memory, as columns of one table: the one at fault is the one that is not finite.
    bad = [(position, entry) for position, entry in found if plain(entry) and not is_finite(entry)]
    for position, entry in bad or found:
        return position, next(tensor for tensor in tensors if storage_of(tensor) == storage_of(entry))
    return None


def _attributes(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in root.named_modules():
        for name, value in vars(module).items():
            if name not in _STRUCTURE:
                yield from _inside(value, f"{prefix}.{name}" if prefix else name, 0)


def _inside(value: Any, path: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors in an attribute, also of modules that stand in a list and so are nobody's submodules."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, nn.Module):
        if depth:
            yield from (
                (f"{path}.{name}", entry) for name, entry in (*value.named_parameters(), *value.named_buffers())
            )
    elif depth < _DEEPEST:
        for step, child in _entries(value):
            yield from _inside(child, path + step, depth + 1)


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (list, tuple, deque)):
        yield from ((f"[{position}]", child) for position, child in enumerate(islice(value, _LONGEST)))
    elif isinstance(value, dict):
        for key, child in islice(value.items(), _LONGEST):
            yield f'["{key}"]' if isinstance(key, str) else f"[{key!r}]", child
    elif is_users(type(value)) and not callable(value):
        yield from ((f".{name}", child) for name, child in attributes_of(value))
