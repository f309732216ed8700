"""What happened in a failed step.

1. The step is run again from the state before it, recorded. Where that run is finite and a plain second one is, too, the
   failure was a transient. 2. The recording is walked back from the loss, or from the gradients where the loss is finite.
3. A bad value that came from outside is named; otherwise the operation, and what it was given, say the cause.
4. Further runs give evidence: the last healthy batch with the present weights, float64, the stabiliser. 5. The samples are
   those that the recording suggests, if each of them reproduces the same origin alone; otherwise they are searched for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nanguard.diagnosis import counterfactuals
from nanguard.diagnosis.advice import advice
from nanguard.diagnosis.cause import cause_of, guilty_operand
from nanguard.diagnosis.cutting import Cut, Parts, cut_of, samples_in
from nanguard.diagnosis.facts import facts_of, state_facts
from nanguard.diagnosis.leaves import leaf_path, meant_leaves, named_leaves, state_leaves
from nanguard.diagnosis.naming import clean_name
from nanguard.diagnosis.optimizing import infinite_setting, optimizer_fault
from nanguard.diagnosis.recording import Trace
from nanguard.diagnosis.rerun import MicroBatch, Outcome, Rerun
from nanguard.diagnosis.samples import SampleSearch
from nanguard.diagnosis.suspects import Diagnosis, from_outside, suspects
from nanguard.diagnosis.walk import Finding, blame
from nanguard.inputs import copy_of
from nanguard.trees import holds_only_tensors

__all__ = ["diagnose"]

_EAGER_FINITE = "The step fails again as it is, but not when it is recorded. Suspect compiled code."


def diagnose(
    micro: MicroBatch,
    rerun: Rerun,
    *,
    healthy: MicroBatch | None = None,
    samples: bool = True,
    counterfactual: bool = True,
    parts: Parts | None = None,
) -> Diagnosis:
    """Runs a failed step again, recorded, and says which operation did it, why, and for which samples.

    Args:
        micro: the call of the training step that failed.
        rerun: how to run it again.
        healthy: an earlier call that was well; where it fails now, the weights are the cause and no sample is.
        samples: whether to search for the smallest failing sub-batch.
        counterfactual: whether to run it under other circumstances, too, for evidence.
        parts: collates some of the samples anew, see `nanguard.diagnosis.cutting`.
    """
    with rerun.aside():
        return _diagnosed(_Case(micro, rerun, healthy, parts), micro, rerun, samples, counterfactual)


def _diagnosed(case: _Case, micro: MicroBatch, rerun: Rerun, samples: bool, counterfactual: bool) -> Diagnosis:
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


class _Case:
    """One failed step under examination. Final."""

    def __init__(self, micro: MicroBatch, rerun: Rerun, healthy: MicroBatch | None, parts: Parts | None) -> None:
        self._micro = micro
        self._rerun = rerun
        self._healthy = healthy
        self._meant = meant_leaves(healthy.args) if healthy is not None else frozenset()
        self._leaves: list[tuple[str, Tensor]] = []
        self._state: list[tuple[str, Tensor]] = []
        self._parts = parts

    def recorded(self, args: Sequence[Any], *, backward: bool = True) -> tuple[Outcome, Finding | None]:
        """Runs the step with these arguments and finds the origin."""
        module = self._rerun.module
        leaves = named_leaves(args)  # now: the step may put other tensors into its batch
        doubtful = [tensor for path, tensor in leaves if path not in self._meant]
        weights = [*doubtful, *module.parameters(), *module.buffers()]
        informed = not all(map(holds_only_tensors, args[:1]))
        trace = Trace(module, [tensor for _, tensor in leaves], weights, informed=informed)
        outcome = self._rerun(self._micro, args, trace, backward=backward, within=self._noting)
        self._leaves = leaves
        finding = blame(trace, outcome.blamed) if outcome.fails else None
        return outcome, finding

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """Takes note of the module's state when the step begins: the step may replace it."""
        self._state = state_leaves(self._rerun.module)
        yield

    # -- what it was

    def explain(self, finding: Finding, outcome: Outcome, *, samples: bool, counterfactual: bool) -> Diagnosis:
        """The whole diagnosis for an origin."""
        name, state = None, False
        if finding.external is not None:
            outside = [*self._state, *self._leaves]
            place = leaf_path(finding.others or (finding.external,), outside)
            if place is not None:
                name, state = outside[place[0]][0], place[0] < len(self._state)
                finding = replace(finding, external=place[1])
        found = self._named(finding, name, state=state)
        forward = outcome.forward
        by_weights = self._by_weights(finding, found, forward)
        text = found.advice or advice(found.cause, found.origin, facts=facts_of(finding, by_weights=by_weights))
        notes = self._evidence(found, finding, forward, by_weights) if counterfactual else ()
        positions, cut = None, None
        if samples and not by_weights and found.origin is not None and found.origin.phase != "optimizer":
            cut = self._cut(found, finding)
            positions, remark = self._samples(cut, found, finding, forward)
            notes = (*notes, *remark)
        return replace(
            found,
            samples=positions,
            verdict="reproduced",
            advice=" ".join(filter(None, [text, *notes])),
            collated=cut is not None and cut.collated,
        )

    def _named(self, finding: Finding, name: str | None, *, state: bool) -> Diagnosis:
        if finding.external is not None and name is not None:
            if state:
                facts = state_facts(self._rerun.module, name)
                by_optimizer = self._by_optimizer(name)
                return by_optimizer or from_outside(finding.origin, "parameters", name, finding.external, facts=facts)
            return from_outside(finding.origin, "bad_input", name, finding.external)
        cause = cause_of(finding)
        return Diagnosis(finding.origin, cause)

    def _by_optimizer(self, name: str) -> Diagnosis | None:
        parameter = {clean_name(key): entry for key, entry in self._rerun.module.named_parameters()}.get(name)
        if parameter is None or self._healthy is None:
            return None
        optimizers = self._rerun.optimizers()
        try:
            found = optimizer_fault(self._rerun.module, name, parameter, optimizers)
        except Exception:  # an optimizer that cannot be copied
            return None
        if found is None:
            return None
        setting = infinite_setting(parameter, optimizers)
        cause = cause_of(found) if setting is None else "overflow"
        facts = {} if setting is None else {"setting": setting}
        return Diagnosis(found.origin, cause, advice=advice(cause, found.origin, facts=facts))

    # -- whether the weights are the cause

    def _by_weights(self, finding: Finding, found: Diagnosis, forward: bool) -> bool:
        if found.origin is not None and found.origin.phase == "optimizer":
            return True
        if self._healthy is not None:
            case = (self._healthy, self._micro, self._rerun)
            if counterfactuals.fails_with(*case, backward=not forward):
                return True
            # What only some steps do, any batch may fail at, which says nothing where it depends on the batch what they do.
            return self._independent(finding, found) and counterfactuals.fails_with(
                *case, in_its_place=True, backward=not forward
            )
        # No batch is known to have been well. A weight that is used whatever the batch is fails with each of them, and so do
        # values that no batch has made, unless it depends on the sample whether they are used.
        if found.cause == "parameters":
            suspected = finding.external is not None and not self._picks(finding)
        else:
            suspected = self._independent(finding, found)
        return suspected and not self._spared(finding, found, forward)

    def _spared(self, finding: Finding, found: Diagnosis, forward: bool) -> bool:
        cut = self._cut(found, finding)
        if cut is None:
            return False
        suspects = _suggested(found, finding, named_leaves(self._micro.args), cut.size)
        return counterfactuals.spares_a_part(cut, self._micro, self._rerun, suspects, backward=not forward)

    def _independent(self, finding: Finding, found: Diagnosis) -> bool:
        """Whether what is to blame of an operation's inputs does not depend on the batch."""
        evidence = finding.evidence
        if evidence is None or finding.origin.phase != "forward":
            return False
        operand = guilty_operand(finding, found.cause)
        if operand is None and found.cause == "empty_reduction":
            return False  # nothing at all may well be what a batch has left
        decisive = range(len(evidence.guilty)) if operand is None else (operand,)
        return len(decisive) > 0 and set(decisive) <= set(evidence.independent)

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

    def _cut(self, found: Diagnosis, finding: Finding) -> Cut | None:
        if not self._micro.args:
            return None
        path = found.origin.tensor if found.cause == "bad_input" and found.origin is not None else None
        return cut_of(self._micro.args[0], self._micro.indices, path=path, rows=finding.rows, parts=self._parts)

    def _samples(
        self, cut: Cut | None, found: Diagnosis, finding: Finding, forward: bool
    ) -> tuple[tuple[int, ...] | None, tuple[str, ...]]:
        args = self._micro.args
        if cut is None:
            return None, ("The samples are not known: the batch shows no leading dimension that all of it shares.",)
        size = cut.size

        def fails_as(arguments: Sequence[Any]) -> bool | None:
            outcome, again = self.recorded(arguments, backward=not forward)
            if outcome.error is not None:
                return None
            return bool(outcome.fails) and outcome.forward == forward and finding.same_as(again)

        def fails(positions: Sequence[int]) -> bool | None:
            batch = cut.take(positions)
            return None if batch is None else fails_as((batch, *copy_of(args[1:])))

        guess = _suggested(found, finding, named_leaves(args), size)
        search = SampleSearch(size, fails)
        positions = search.run(guess)
        others = [position for position in range(size) if position not in guess]
        if len(positions) == size and guess and others and not search.each_alone:
            # Random draws fall otherwise in a smaller batch: keep its size, and fill it up with a sample that is well.
            as_large = cut.replaced(guess, others[0])
            if as_large is not None and fails_as((as_large, *copy_of(args[1:]))):
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
    return [] if mask is None else samples_in(mask, size)
