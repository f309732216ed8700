"""Exponentials in a compiled graph whose results have their logarithms taken outside.

The derivative of such a logarithm takes another way, and none arrives at the result itself. What is compiled makes zeros of
that, and would multiply them by exponentials that have overflowed: 0 * inf. So these exponentials let zeros through.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from nanguard.stabilizer.compiled.reading import lawful
from nanguard.stabilizer.exponentials import exponential

__all__ = ["protect"]


def protect(graph: fx.Graph, places: Iterable[int]) -> None:
    """Let the exponentials that these results of a graph come from pass on zeros."""
    results = next(node.args[0] for node in graph.nodes if node.op == "output")
    stack, seen = [results[place] for place in places], set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        stack += node.all_input_nodes
        found = lawful(node)
        if found is None:
            continue
        law, spelling, args, kwargs = found
        if law.name == "exp" and len(args) == 1 and not kwargs and not spelling.in_place:
            node.op, node.target, node.args, node.kwargs = "call_function", exponential, (args[0],), {}
