"""What the recording says about a failure that matters for the advice: names of facts, each with a text for it."""

from __future__ import annotations

import torch
from torch import nn

from nanguard.diagnosis.naming import clean_name
from nanguard.diagnosis.records import Descent
from nanguard.diagnosis.walk import Finding

__all__ = ["facts_of", "state_facts"]

# Which input the value to blame is, where it is not the first.
_BLAMED = {
    **{
        f"aten.{name}": 1
        for name in ("div", "true_divide", "remainder", "fmod", "floor_divide", "xlogy", "special_xlogy")
    },
    "aten.addcdiv": 2,
}
_MOST_WEIGHTS = 3


def facts_of(finding: Finding, *, by_weights: bool) -> dict[str, str]:
    """What is known of the value to blame, and of where it failed.

    The traits that `nanguard.diagnosis.traits` gives it; ``weight``, where it depends on no batch; ``zero`` and ``minus one``,
    where it failed at those; and ``exponent``, of a power.

    Args:
        finding: the origin.
        by_weights: whether any batch fails; otherwise ``weight`` says nothing.
    """
    kernel, given = finding.told
    facts = _of_operand(given, _BLAMED.get(kernel, 0))
    exponent = given[1] if len(given) > 1 else None
    if kernel == "aten.pow" and isinstance(exponent, float):
        facts["exponent"] = f"{exponent:.3g}"
    if not by_weights:
        facts.pop("weight", None)
    return facts | _at(finding)


def state_facts(module: nn.Module, name: str) -> dict[str, str]:
    """What is known of non-finite state of a module: whether it is no parameter, and whether it is running statistics."""
    if name in {clean_name(key) for key, _ in module.named_parameters()}:
        return {}
    return {"statistics" if name.rpartition(".")[2] in ("running_mean", "running_var") else "state": ""}


def _of_operand(given: tuple[Descent | float, ...], position: int) -> dict[str, str]:
    operand = given[position] if position < len(given) else None
    if not isinstance(operand, Descent):
        return {}
    facts = dict(operand.traits)
    if not operand.batch and 0 < len(operand.weights) <= _MOST_WEIGHTS:
        named = " and ".join(sorted(operand.weights))
        facts["weight"] = f"is {named}" if operand.leaf else f"is made of {named} alone"
    return facts


def _at(finding: Finding) -> dict[str, str]:
    evidence = finding.forward or finding.evidence
    guilty = evidence.guilty[:1] if evidence is not None else ()
    values = guilty[0] if guilty else torch.empty(0)
    found = {"zero": 0.0, "minus one": -1.0}
    return {name: "" for name, value in found.items() if values.numel() and bool((values == value).all())}
