"""What an autopsy says, and what can be said without one: inputs, parameters and buffers that are non-finite themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from nanguard.diagnosis.advice import advice
from nanguard.diagnosis.facts import state_facts
from nanguard.diagnosis.leaves import named_leaves
from nanguard.diagnosis.naming import clean_name
from nanguard.diagnosis.statistics import describe_tensor
from nanguard.incident import Cause, Origin, Verdict
from nanguard.sentinel import nonfinite_names

__all__ = ["Diagnosis", "from_outside", "suspects"]

_BY_ITSELF = "it optimizes or fetches its data by itself"
_NOT_RUN_AGAIN = (
    "The step was not run again, because {}: what is said here comes from the inputs, parameters and buffers{}."
)


@dataclass(frozen=True)
class Diagnosis:
    """What the autopsy found; the fields are those of an `Incident`.

    With `collated` the samples are those that the loader has chosen, in that order; otherwise they are rows of the batch.
    """

    origin: Origin | None = None
    cause: Cause = "unknown"
    samples: tuple[int, ...] | None = None
    verdict: Verdict = "not_replayed"
    advice: str = ""
    collated: bool = False


def suspects(
    module: nn.Module,
    args: Sequence[Any],
    buffers: Mapping[str, Tensor],
    *,
    run: bool = False,
    why: str = _BY_ITSELF,
    watched: bool = False,
) -> Diagnosis:
    """What can be said without a second run: parameters, buffers and inputs that are non-finite themselves.

    Args:
        module: its parameters are looked at.
        args: arguments of the training step.
        buffers: the module's buffers as they were before the step, by name.
        run: whether the step was run again all the same, to no avail.
        why: what kept it from being run again.
        watched: whether hooks on modules have seen the step, too.
    """
    notes = () if run else (_NOT_RUN_AGAIN.format(why, ", and from the watched modules" if watched else " alone"),)
    named = {clean_name(name): tensor for name, tensor in {**dict(module.named_parameters()), **buffers}.items()}
    if weights := nonfinite_names(named.items()):
        facts = state_facts(module, weights[0])
        return from_outside(Origin(), "parameters", weights[0], named[weights[0]], notes, facts)
    leaves = dict(named_leaves(args))
    if inputs := nonfinite_names(leaves.items()):
        return from_outside(Origin(), "bad_input", inputs[0], leaves[inputs[0]], notes)
    return Diagnosis(advice=advice("unknown", None) if run else " ".join(notes))


def from_outside(
    origin: Origin,
    cause: Cause,
    name: str,
    tensor: Tensor,
    notes: tuple[str, ...] = (),
    facts: Mapping[str, str] | None = None,
) -> Diagnosis:
    """The diagnosis for a value that came from outside the step, and the operation that used it."""
    origin = replace(origin, tensor=name, operands=(describe_tensor(name, tensor),))
    return Diagnosis(origin, cause, advice=advice(cause, origin, notes, facts))
