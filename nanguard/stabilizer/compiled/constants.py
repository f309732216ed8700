"""Tensors of one number that are written down in a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from nanguard.algebra import Apply, Term
from nanguard.algebra.operators import FULL
from nanguard.stabilizer.compiled.memory import example, is_plain

__all__ = ["constant_in"]

# Functions that make a tensor of their first argument.
_OF_FIRST = frozenset({torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor})
_CONVERSIONS = frozenset({"double", "float", "to", "type_as"})


def constant_in(node: fx.Node, known: Term | None) -> Term | None:
    """The logarithm of a constant of no dimensions that a node makes, or converts: `known` is that of its first argument."""
    value = example(node)
    if not is_plain(value) or value.dim() or not value.is_floating_point() or node.kwargs.get("requires_grad"):
        return None
    number = _number(node, known)
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        return None
    return Apply(FULL, (), (), constant=_rounded(number, value))


def _number(node: fx.Node, known: Term | None) -> Any:
    args = node.args
    if node.op == "call_function" and "out" not in node.kwargs:
        if node.target in _OF_FIRST:
            return args[0] if args else None
        if node.target is torch.full:
            return args[1] if len(args) == 2 else node.kwargs.get("fill_value")
    elif node.op == "call_method":
        if node.target == "new_full":
            return args[2] if len(args) == 3 else node.kwargs.get("fill_value")
        if node.target in _CONVERSIONS and isinstance(known, Apply) and known.operator is FULL:
            return known.params["constant"]
    return None


def _rounded(number: float, like: Tensor) -> float:
    """The number as a tensor of that dtype holds it."""
    with unset_fake_temporarily(), torch._C.DisableTorchFunction():
        rounded: float = torch.tensor(number, dtype=torch.float64, device="cpu").to(like.dtype).item()
    return rounded
