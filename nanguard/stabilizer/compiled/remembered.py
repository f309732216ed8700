"""Logarithms with a long history: the graph computes them once, and all that follows is computed from there."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, fx

from nanguard.algebra import Apply, Leaf, Term
from nanguard.algebra import operators as ops
from nanguard.algebra.decisions import stem
from nanguard.stabilizer.compiled.memory import example

__all__ = ["Remembered", "begun_anew"]


@final
class Remembered:
    """The logarithm of a value, to be computed right behind it. Where nothing needs it, nobody computes it.

    Attributes:
        node: what computes the value.
        term: the logarithm.
        is_factor: whether it is the factor of a number of either sign, and not its exponent.
        example: what it would be when the graph is traced.
        written: the node that computes it, as soon as there is one.
    """

    def __init__(self, node: fx.Node, term: Term, is_factor: bool, example: Tensor) -> None:
        self.node, self.term, self.is_factor, self.example = node, term, is_factor, example
        self.written: fx.Node | None = None

    def write(self, graph: fx.Graph) -> fx.Node:
        """The node that computes it."""
        assert self.written is not None
        return self.written


def begun_anew(node: fx.Node, term: Term, values: Sequence[Tensor]) -> tuple[Term, list[Remembered]]:
    """The same logarithm of what a node computes, but from what is remembered of it, and that.

    Arguments:
        node: the node.
        term: the logarithm.
        values: examples of what it consists of.
    """
    value, inner = example(node), stem(term)
    if not all(type(size) is int for size in (*value.shape, *inner.shape)):
        return term, []
    floating = [part.dtype for part in values if part.is_floating_point()]
    dtype = functools.reduce(torch.promote_types, floating, torch.promote_types(value.dtype, torch.float32))
    with value.fake_mode:
        like = torch.empty(inner.shape, dtype=dtype, device=value.device).requires_grad_(value.requires_grad)
    signed = inner is term and inner.signed
    parts = [Remembered(node, term, is_factor, like) for is_factor in ((False, True) if signed else (False,))]
    leaves = [Leaf(part, inner.shape, 0, value.requires_grad) for part in parts]
    begun: Term = Apply(ops.FACTOR, tuple(leaves), inner.shape) if signed else leaves[0]
    if inner is not term and isinstance(term, Apply):
        begun = Apply(term.operator, (begun,), term.shape, **term.params)
    return begun, parts
