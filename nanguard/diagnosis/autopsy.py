"""What happened in a failed step.

1. The step is run again from the state before it, recorded. Where that run is finite and a plain second one is, too, the
   failure was a transient. 2. The recording is walked back from the loss, or from the gradients where the loss is finite.
3. A bad value that came from outside is named; otherwise the operation, and what it was given, say the cause.
4. Further runs give evidence: the last healthy batch with the present weights, float64, the stabiliser. 5. The samples are
   those that the recording suggests, if each of them reproduces the same origin alone; otherwise they are searched for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nanguard.diagnosis import counterfactuals
from nanguard.diagnosis.advice import advice
from nanguard.diagnosis.batches import batch_size, replaced, take
from nanguard.diagnosis.cause import cause_of, guilty_operand
from nanguard.diagnosis.facts import facts_of, state_facts
from nanguard.diagnosis.leaves import leaf_path, meant_leaves, named_leaves
from nanguard.diagnosis.naming import clean_name
from nanguard.diagnosis.optimizing import optimizer_fault
from nanguard.diagnosis.recording import Trace
from nanguard.diagnosis.rerun import MicroBatch, Outcome, Rerun
from nanguard.diagnosis.samples import SampleSearch
from nanguard.diagnosis.statistics import describe_tensor
from nanguard.diagnosis.walk import Finding, blame
from nanguard.incident import Cause, Origin, Verdict
from nanguard.inputs import copy_of
from nanguard.sentinel import nonfinite_names

__all__ = ["Diagnosis", "diagnose", "suspects"]

_BY_ITSELF = "it optimizes or fetches its data by itself"
_NOT_RUN_AGAIN = (
    "The step was not run again, because {}: what is said here comes from the inputs, parameters and buffers{}."
)
_EAGER_FINITE = "The step fails again as it is, but not when it is recorded. Suspect compiled code."


@dataclass(frozen=True)
class Diagnosis:
    """What the autopsy found; the fields are those of an `Incident`."""

    origin: Origin | None = None
    cause: Cause = "unknown"
    samples: tuple[int, ...] | None = None
    verdict: Verdict = "not_replayed"
    advice: str = ""


def diagnose(
    micro: MicroBatch,
    rerun: Rerun,
    *,
    healthy: MicroBatch | None = None,
    samples: bool = True,
    counterfactual: bool = True,
) -> Diagnosis:
    """Runs a failed step again, recorded, and says which operation did it, why, and for which samples.

    Args:
        micro: the call of the training step that failed.
        rerun: how to run it again.
        healthy: an earlier call that was well; where it fails now, the weights are the cause and no sample is.
        samples: whether to search for the smallest failing sub-batch.
        counterfactual: whether to run it under other circumstances, too, for evidence.
    """
    case = _Case(micro, rerun, healthy)
    outcome, finding = case.recorded(copy_of(micro.args))
    if outcome.error is not None:
        buffers = rerun.transaction.buffers(micro.before)
        return suspects(rerun.module, micro.args, buffers, why=f"that raised {type(outcome.error).__name__}")
    if not outcome.fails:
        if counterfactual and counterfactuals.fails_again(micro, rerun):
            return Diagnosis(verdict="reproduced", advice=_EAGER_FINITE)
        return Diagnosis(cause="transient", verdict="transient", advice=advice("transient", None))
    if finding is None:
        found = suspects(rerun.module, micro.args, rerun.transaction.buffers(micro.before), run=True)
        return replace(found, verdict="reproduced")
    return case.explain(finding, outcome, samples=samples, counterfactual=counterfactual)


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
        return _outside(Origin(), "parameters", weights[0], named[weights[0]], notes, facts)
    leaves = dict(named_leaves(args))
    if inputs := nonfinite_names(leaves.items()):
        return _outside(Origin(), "bad_input", inputs[0], leaves[inputs[0]], notes)
    return Diagnosis(advice=advice("unknown", None) if run else " ".join(notes))


def _outside(
    origin: Origin,
    cause: Cause,
    name: str,
    tensor: Tensor,
    notes: tuple[str, ...] = (),
    facts: Mapping[str, str] | None = None,
) -> Diagnosis:
    origin = replace(origin, tensor=name, operands=(describe_tensor(name, tensor),))
    return Diagnosis(origin, cause, advice=advice(cause, origin, notes, facts))


class _Case:
    """One failed step under examination. Final."""

    def __init__(self, micro: MicroBatch, rerun: Rerun, healthy: MicroBatch | None) -> None:
        self._micro = micro
        self._rerun = rerun
        self._healthy = healthy
        self._meant = meant_leaves(healthy.args) if healthy is not None else frozenset()
        self._leaves: list[tuple[str, Tensor]] = []
        self._size = None
        if micro.args:
            self._size = batch_size(micro.args[0], len(micro.indices) if micro.indices is not None else None)

    def recorded(self, args: Sequence[Any], *, backward: bool = True) -> tuple[Outcome, Finding | None]:
        """Runs the step with these arguments and finds the origin."""
        module = self._rerun.module
        leaves = named_leaves(args)  # now: the step may put other tensors into its batch
        doubtful = [tensor for path, tensor in leaves if path not in self._meant]
        trace = Trace(module, [tensor for _, tensor in leaves], [*doubtful, *module.parameters(), *module.buffers()])
        outcome = self._rerun(self._micro, args, trace, backward=backward)
        self._leaves = leaves
        finding = blame(trace, outcome.blamed) if outcome.fails else None
        return outcome, finding

    # -- what it was

    def explain(self, finding: Finding, outcome: Outcome, *, samples: bool, counterfactual: bool) -> Diagnosis:
        """The whole diagnosis for an origin."""
        name = None
        if finding.external is not None:
            named = leaf_path(finding.others or (finding.external,), self._leaves, self._rerun.module)
            if named is not None:
                name, finding = named[0], replace(finding, external=named[1])
        found = self._named(finding, name)
        forward = outcome.forward
        by_weights = self._by_weights(finding, found, forward)
        text = found.advice or advice(found.cause, found.origin, facts=facts_of(finding, by_weights=by_weights))
        notes = self._evidence(found, finding, forward, by_weights) if counterfactual else ()
        positions = None
        if samples and not by_weights and found.origin is not None and found.origin.phase != "optimizer":
            positions, remark = self._samples(found, finding, forward)
            notes = (*notes, *remark)
        return replace(
            found,
            samples=positions,
            verdict="reproduced",
            advice=" ".join(filter(None, [text, *notes])),
        )

    def _named(self, finding: Finding, name: str | None) -> Diagnosis:
        if finding.external is not None and name is not None:
            if not name.startswith(("batch", "args[")):
                by_optimizer = self._by_optimizer(name)
                return by_optimizer or self._state(finding.origin, name, finding.external)
            return _outside(finding.origin, "bad_input", name, finding.external)
        cause = cause_of(finding)
        return Diagnosis(finding.origin, cause)

    def _state(self, origin: Origin, name: str, tensor: Tensor) -> Diagnosis:
        return _outside(origin, "parameters", name, tensor, facts=state_facts(self._rerun.module, name))

    def _by_optimizer(self, name: str) -> Diagnosis | None:
        parameter = {clean_name(key): entry for key, entry in self._rerun.module.named_parameters()}.get(name)
        if parameter is None or self._healthy is None:
            return None
        try:
            found = optimizer_fault(self._rerun.module, name, parameter, self._rerun.optimizers())
        except Exception:  # an optimizer that cannot be copied
            return None
        if found is None:
            return None
        cause = cause_of(found)
        return Diagnosis(found.origin, cause, advice=advice(cause, found.origin))

    # -- whether the weights are the cause

    def _by_weights(self, finding: Finding, found: Diagnosis, forward: bool) -> bool:
        if found.origin is not None and found.origin.phase == "optimizer":
            return True
        if self._healthy is not None:
            return counterfactuals.fails_with(self._healthy, self._micro, self._rerun, backward=not forward)
        if found.cause == "parameters":
            # No batch is known to have been well. A weight that is used whatever the batch is fails with each of them.
            return finding.external is not None and not self._picks(finding)
        # What an operation was given there does not depend on the batch, so no batch can be well.
        evidence = finding.evidence
        if evidence is None or finding.origin.phase != "forward":
            return False
        operand = guilty_operand(finding, found.cause)
        if operand in evidence.independent:
            return True
        # Nothing at all may well be what a batch has left.
        return len(evidence.independent) == len(evidence.guilty) > 0 and found.cause != "empty_reduction"

    def _picks(self, finding: Finding) -> bool:
        return finding.kernel in ("aten.embedding", "aten.index", "aten.index_select", "aten.gather")

    # -- what further runs show

    def _evidence(self, found: Diagnosis, finding: Finding, forward: bool, by_weights: bool) -> tuple[str, ...]:
        notes = []
        if by_weights and found.cause != "parameters":
            notes.append("No sample is at fault: with these weights and random numbers any batch fails.")
        if finding.caller is not None and finding.caller.caller is not None:
            caller = finding.caller.caller
            notes.append(f"It was called from {caller.file}:{caller.line}.")
        if found.cause in ("log_of_zero", "overflow", "division_by_zero", "masked_branch", "singular_gradient"):
            swaps = counterfactuals.saving_swaps(self._micro, self._rerun, backward=not forward)
            if swaps:
                place = found.origin
                here = [s for s in swaps if place is not None and (s.file, s.line) == (place.file, place.line)]
                swap = (here or swaps)[0]
                # What is said of a branch is a pattern, and no line to copy.
                form = "" if swap.rule.startswith("NG4") else f": write {swap.replacement}"
                form += "" if here else f" in {swap.file}:{swap.line}"
                notes.append(f"With the stabiliser the step is finite ({swap.rule}){form}.")
                return tuple(notes)
        if found.cause in ("overflow", "unknown"):
            notes += self._in_double(backward=not forward)
        return tuple(notes)

    def _in_double(self, *, backward: bool) -> list[str]:
        fails = counterfactuals.fails_in_double(self._micro, self._rerun, backward=backward)
        if fails is None:
            return []
        if not fails:
            return ["In float64 the same step is finite."]
        narrower = counterfactuals.narrower_in_double(self._micro, self._rerun, backward=backward)
        if narrower is not None:
            return [f"The code itself computes this in {narrower}, also where all else is float64."]
        return ["In float64 it fails, too."]

    # -- whose fault it is

    def _samples(
        self, found: Diagnosis, finding: Finding, forward: bool
    ) -> tuple[tuple[int, ...] | None, tuple[str, ...]]:
        args, indices = self._micro.args, self._micro.indices
        part = self._micro.parts(args[0]) if self._micro.parts is not None and args else None
        size = len(indices) if part is not None and indices is not None else self._size
        if size is None:
            return None, ("The samples are not known: the batch shows no leading dimension that all of it shares.",)

        def fails_as(arguments: Sequence[Any]) -> bool | None:
            outcome, again = self.recorded(arguments, backward=not forward)
            if outcome.error is not None:
                return None
            return bool(outcome.fails) and outcome.forward == forward and finding.same_as(again)

        def fails(positions: Sequence[int]) -> bool | None:
            batch = part(positions) if part is not None else take(args[0], positions, size)
            return fails_as((batch, *copy_of(args[1:])))

        guess = _suggested(found, finding, named_leaves(args), size)
        search = SampleSearch(size, fails)
        positions = search.run(guess)
        others = [position for position in range(size) if position not in guess]
        if len(positions) == size and guess and others and part is None and not search.known_to_fail(others):
            # Random draws fall otherwise in a smaller batch: keep its size, and fill it up with a sample that is well.
            as_large = replaced(args[0], guess, others[0], size)
            if fails_as((as_large, *copy_of(args[1:]))):
                return tuple(guess), ()
        if not search.complete:
            return positions, (
                f"The search for the samples ended after {search.runs} runs; there may be fewer of them.",
            )
        return positions, ()


def _suggested(found: Diagnosis, finding: Finding, leaves: list[tuple[str, Tensor]], size: int) -> list[int]:
    """The samples that the recording suggests: where the bad input, or the result of the operation, is not finite."""
    if found.cause == "bad_input" and found.origin is not None:
        tensor = dict(leaves).get(found.origin.tensor or "")
        mask = None if tensor is None or tensor.layout is not torch.strided else ~torch.isfinite(tensor)
    else:
        mask = finding.rows
    if mask is None or mask.ndim == 0:
        return []
    for dim in range(min(mask.ndim, 2)):
        length = mask.shape[dim]
        if length and length % size == 0 and (dim == 0 or length == size):
            moved = mask.movedim(dim, 0).reshape(size, -1)
            return list(moved.any(1).nonzero().flatten().tolist())
    return []
