"""The autopsy of a failed step: the operation, the cause and the samples, from second runs that leave no trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nanguard.diagnosis.cause import advice, cause_of
from nanguard.diagnosis.leaves import leaf_path, named_leaves
from nanguard.diagnosis.rerun import MicroBatch, Outcome, Rerun
from nanguard.diagnosis.samples import batch_size, failing_samples, take
from nanguard.diagnosis.trace import Trace, describe_tensor
from nanguard.incident import Cause, Origin, Verdict
from nanguard.inputs import copy_of
from nanguard.sentinel import nonfinite_names

__all__ = ["Diagnosis", "MicroBatch", "Outcome", "Rerun", "batch_size", "diagnose", "suspects"]


@dataclass(frozen=True)
class Diagnosis:
    """What the autopsy found; the fields are those of an `Incident`."""

    origin: Origin | None = None
    cause: Cause = "unknown"
    samples: tuple[int, ...] | None = None
    verdict: Verdict = "not_replayed"
    advice: str = ""


def diagnose(micro: MicroBatch, rerun: Rerun, *, healthy: MicroBatch | None = None, samples: bool = True) -> Diagnosis:
    """Runs a failed step again, recorded, and says which operation did it, why, and for which samples.

    Args:
        micro: the call of the training step that failed.
        rerun: how to run it again.
        healthy: an earlier call that was well; where it fails now, the weights are the cause and no sample is.
        samples: whether to search for the smallest failing sub-batch.
    """
    args = copy_of(micro.args)  # the step may write into its batch
    buffers = rerun.transaction.buffers(micro.before)
    trace = Trace(rerun.module)
    trace.suspect([*_tensors(args), *rerun.module.parameters(), *rerun.module.buffers()])
    named = named_leaves(args)  # now: the step may put other tensors into its batch
    outcome = rerun(micro, args, trace)
    if outcome.error is not None:
        return suspects(rerun.module, micro.args, buffers)
    if not outcome.bad:
        return Diagnosis(cause="transient", verdict="transient", advice=advice("transient", None))
    found = _origin(trace, outcome, rerun.module, named) or suspects(rerun.module, micro.args, buffers)
    if samples and found.cause != "parameters":
        found = replace(found, samples=_samples(found, micro, rerun, outcome, healthy))
    return replace(found, verdict="reproduced")


def suspects(module: nn.Module, args: Sequence[Any], buffers: Mapping[str, Tensor]) -> Diagnosis:
    """What can be said without a second run: parameters, buffers and inputs that are non-finite themselves.

    Args:
        module: its parameters are looked at.
        args: arguments of the training step.
        buffers: the module's buffers as they were before the step, by name.
    """
    named = {**dict(module.named_parameters()), **buffers}
    if weights := nonfinite_names(named.items()):
        return _outside(Origin(), "parameters", weights[0], named[weights[0]])
    leaves = dict(named_leaves(args))
    if inputs := nonfinite_names(leaves.items()):
        return _outside(Origin(), "bad_input", inputs[0], leaves[inputs[0]])
    return Diagnosis()


def _origin(trace: Trace, outcome: Outcome, module: nn.Module, named: list[tuple[str, Tensor]]) -> Diagnosis | None:
    finding = trace.blame(outcome.bad)
    if finding is None:
        return None
    if finding.external is not None:
        name = leaf_path(finding.external, named, module)
        if name is not None:
            cause: Cause = "bad_input" if name.startswith("batch") else "parameters"
            return _outside(finding.origin, cause, name, finding.external)
    cause = cause_of(finding)
    return Diagnosis(finding.origin, cause, advice=advice(cause, finding.origin))


def _outside(origin: Origin, cause: Cause, name: str, tensor: Tensor) -> Diagnosis:
    origin = replace(origin, tensor=name, operands=(describe_tensor(name, tensor),))
    return Diagnosis(origin, cause, advice=advice(cause, origin))


def _samples(
    found: Diagnosis, micro: MicroBatch, rerun: Rerun, outcome: Outcome, healthy: MicroBatch | None
) -> tuple[int, ...] | None:
    if healthy is not None and rerun(micro, copy_of(healthy.args)).fails:
        return None
    size = batch_size(micro.args[0]) if micro.args else None
    if size is None:
        return None

    def fails(positions: Sequence[int]) -> bool | None:
        again = rerun(micro, (take(micro.args[0], positions), *copy_of(micro.args[1:])))
        return again.fails and again.loss_finite == outcome.loss_finite if again.fails is not None else None

    if found.cause == "bad_input" and found.origin is not None:
        rows = _bad_rows(dict(named_leaves(micro.args)).get(found.origin.tensor or ""), size)
        rest = [position for position in range(size) if position not in rows]
        if rows and (not rest or fails(rest) is False):
            return tuple(rows)
    return failing_samples(size, fails)


def _bad_rows(tensor: Tensor | None, size: int) -> list[int]:
    if tensor is None or tensor.layout is not torch.strided or tensor.ndim == 0 or tensor.shape[0] != size:
        return []
    return (~torch.isfinite(tensor)).reshape(size, -1).any(1).nonzero().flatten().tolist()


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    return [tensor for _, tensor in named_leaves(args)]
