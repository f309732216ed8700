"""One graph, with all graphs inside it: stabilised in place."""

from __future__ import annotations

import warnings

import torch
from torch import fx

from nanguard.algebra.pattern import operators
from nanguard.errors import NanGuardWarning
from nanguard.incident import Swap
from nanguard.stabilizer.compiled.boundary import Boundary
from nanguard.stabilizer.compiled.branches import Selections
from nanguard.stabilizer.compiled.emit import carry_out
from nanguard.stabilizer.compiled.handed import hand_over
from nanguard.stabilizer.compiled.names import swap_of
from nanguard.stabilizer.compiled.plan import Plan, Policy
from nanguard.stabilizer.compiled.protection import protect
from nanguard.stabilizer.compiled.settings import Settings

__all__ = ["stabilised"]

# Higher-order operations that call a graph as it stands: regions under a checkpoint, and regions compiled once.
_REGIONS = frozenset({"invoke_subgraph", "tag_activation_checkpoint", "wrap", "wrap_activation_checkpoint"})


def stabilised(module: fx.GraphModule, policy: Policy, boundary: Boundary | None = None) -> list[Swap]:
    """Replace what is unstable in a graph that dynamo captured, and say what was replaced, one entry for each place.

    A graph that cannot be read is left as it was found, with a warning.

    Arguments:
        module: the graph.
        policy: how its nodes are stabilised.
        boundary: what is known about its inputs; takes what is known about its results.
    """
    try:
        swaps = _stabilised(module, policy, set(), boundary)
    except Exception as error:  # a user's model has to train, whatever a new version of torch puts into its graphs
        message = f"a compiled graph is left as it is, because it could not be read: {type(error).__name__}: {error}"
        warnings.warn(message, NanGuardWarning, stacklevel=2)
        return []
    merged: dict[tuple[str, str, int], Swap] = {}
    for swap in swaps:
        known = merged.setdefault((swap.rule, swap.file, swap.line), swap)
        if known is not swap:
            known.count += 1
    return list(merged.values())


def _stabilised(module: fx.GraphModule, policy: Policy, seen: set[int], boundary: Boundary | None = None) -> list[Swap]:
    if id(module) in seen:
        return []
    seen.add(id(module))
    swaps = []
    for node in module.graph.nodes:
        for region in _regions(module, node):
            swaps += _stabilised(region, _inside(policy, node), seen)
    plan = Plan(module.graph, policy, boundary or Boundary())
    if boundary is not None:
        hand_over(module.graph, plan, boundary)
        boundary.operators.update(*(operators(replacement.term) for replacement in plan.replacements))
    if plan.replacements:
        swaps += [swap_of(replacement) for replacement in plan.replacements]
        carry_out(module.graph, plan)
        module.recompile()
    selections = Selections(module.graph, plan)
    if selections.replacements:
        swaps += [swap_of(replacement) for replacement in selections.replacements]
        selections.carry_out()
        module.recompile()
    if boundary is not None and boundary.handed:
        protect(module.graph, [entry.place for entry in boundary.handed])
        module.recompile()
    return swaps


def _inside(policy: Policy, outer: fx.Node) -> Policy:
    """The policy within a region: its own, or else that of the node that calls it."""

    def decide(node: fx.Node) -> Settings | None:
        own = policy(node)
        return policy(outer) if own is None else own

    return decide


def _regions(module: fx.GraphModule, node: fx.Node) -> list[fx.GraphModule]:
    if not isinstance(node.target, torch._ops.HigherOrderOperator) or node.target.__name__ not in _REGIONS:
        return []
    called = [source for source in node.all_input_nodes if source.op == "get_attr"]
    found = [getattr(module, str(source.target), None) for source in called]
    return [region for region in found if isinstance(region, fx.GraphModule)]
