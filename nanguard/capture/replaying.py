"""Runs a captured step again, without a Trainer and without a trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from nanguard.capture.applying import apply_attributes, apply_training, apply_weights
from nanguard.capture.explaining import explained
from nanguard.capture.load import Capture, load_capture
from nanguard.capture.manifest import MANIFEST, replay_command
from nanguard.capture.manual import Optimizers
from nanguard.capture.memory import ModuleMemory, kept
from nanguard.capture.modules import device_of
from nanguard.capture.result import ReplayResult
from nanguard.capture.running import FailedStep, Outcome, numerics, run_step
from nanguard.capture.sections import decoded
from nanguard.capture.settings import settings_as, version_notes
from nanguard.capture.showing import around_of
from nanguard.capture.standin import TrainerStandIn, attach
from nanguard.errors import CaptureError, DidNotReproduce
from nanguard.incident import Incident

__all__ = ["assert_finite_step", "replay"]

Source = Literal["captured", "current"]


def replay(
    capture: Capture | str | Path,
    module: nn.Module,
    *,
    strict: bool = False,
    weights: Source = "captured",
    attributes: Source = "captured",
    optimizer: Source = "captured",
    stabilize: bool | None = None,
    fill: Mapping[str, Any] | None = None,
    trainer: Mapping[str, Any] | None = None,
    step: Callable[..., Any] | None = None,
    diagnose: bool = True,
) -> ReplayResult:
    """Runs a captured step again, bit-exact on the same machine and versions.

    The module, the random number generators and torch's settings are afterwards what they were.

    Args:
        capture: a capture or its path.
        module: the LightningModule, on the device to replay on.
        strict: raise `DidNotReproduce` where the step does not fail in the same way.
        weights: ``captured`` where the capture holds them, or the module's ``current`` ones.
        attributes: whether plain attributes of submodules (counters, temperatures) are the captured ones.
        optimizer: whether the optimizers of manual optimization get the captured state.
        stabilize: turns the stabiliser on or off; `None` has it as it was.
        fill: path -> value for what the capture could not store, such as ``{'batch["parser"]': parser}``.
        trainer: further attributes of ``self.trainer`` that the step asks for.
        step: called as ``step(module, *args, **kwargs)`` in place of the method that was captured; returns the loss.
        diagnose: run a step that fails again, to name the operation, the cause and the samples. Manual optimization, whose
            steps move the weights, is not run again.

    Raises:
        CaptureError: where the capture is damaged, incomplete, or does not fit the module.
        DidNotReproduce: see `strict`.
        Exception: whatever the training step itself raises.
    """
    capture = capture if isinstance(capture, Capture) else load_capture(capture)
    _check(capture, module, step, fill or {}, weights=weights, attributes=attributes, optimizer=optimizer)
    module = getattr(module, "_orig_mod", module)  # what torch.compile wraps
    device = device_of(module)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(capture.function == "training_step"))
        stack.enter_context(kept(module))
        stack.enter_context(settings_as(capture.manifest["settings"]))
        notes = _restored(capture, module, weights, attributes, device)
        automatic = step is not None or capture.function == "validation_step"
        manual = not automatic and not getattr(module, "automatic_optimization", True)
        optimizers = _prepare(capture, module, trainer or {}, manual, optimizer, device)
        function: Any = getattr(module, capture.function) if step is None else partial(step, module)
        start = ModuleMemory(module) if diagnose and not optimizers else None

        def arguments() -> tuple[tuple[Any, ...], dict[str, Any]]:
            return capture.arguments(fill, device)

        def call(*args: Any, **kwargs: Any) -> Any:
            # The backward pass of automatic optimization is outside, as in a run.
            with numerics(capture, device, stabilize):
                return function(*args, **kwargs)

        args, kwargs = arguments()
        run = partial(call, *args, **kwargs)
        _rewind_rng(capture)
        outcome = run_step(capture, module, run, optimizers, around_of(capture, module))
        incident = _incident(capture, module, outcome)
        if incident is not None and start is not None:
            incident = explained(FailedStep(module, arguments, call, start, capture), incident)
        gradients = {name: gradient.detach().clone() for name, gradient in outcome.gradients.items()}
    reproduced = incident is not None and _same_failure(capture.incident, incident)
    if incident is not None:
        incident = replace(incident, verdict="reproduced" if reproduced else incident.verdict)
    result = ReplayResult(outcome.loss, incident is None, reproduced, incident, gradients, tuple(notes))
    if strict and not reproduced:
        raise DidNotReproduce(_unlike(capture, result))
    return result


def assert_finite_step(module: nn.Module, capture: Capture | str | Path, **options: Any) -> None:
    """Replays a captured step on the present code, with the captured weights, and fails where it is still not finite.

    Args:
        module: the module, built by the present code.
        capture: a capture or its path.
        options: those of `replay`.

    Raises:
        AssertionError: with the rendering of the incident, the loss then and now, and the command that replays the capture.
        CaptureError: where the step cannot be replayed.
    """
    __tracebackhide__ = True
    result = replay(capture, module, **options)
    if result.incident is not None:
        notes = "".join(f"\nnote: {note}" for note in result.notes)
        raise AssertionError(f"the captured step is not finite:{notes}\n{result.incident.render()}")


def _check(
    capture: Capture, module: Any, step: Callable[..., Any] | None, fill: Mapping[str, Any], **sources: str
) -> None:
    for name, value in sources.items():
        if value not in ("captured", "current"):
            raise CaptureError(f"replay: {name}: found {value!r}; expected 'captured' or 'current'")
    if not isinstance(module, nn.Module):
        hint = "; it is a class: call it" if isinstance(module, type) else ""
        raise CaptureError(f"replay: module: found {module!r}; expected a LightningModule{hint}")
    if step is None and not callable(getattr(module, capture.function, None)):
        raise CaptureError(
            f"replay: module: found {type(module).__name__}, which has no {capture.function}; expected a LightningModule, or a "
            "function that computes the loss: replay(..., step=lambda module, *args, **kwargs: ...)"
        )
    lacking = [
        e for e in capture.missing if not e.get("optional") and not any(_covers(path, e["path"]) for path in fill)
    ]
    if lacking:
        shown = "".join(f"\n  {entry['path']} ({entry.get('type')}): {entry.get('reason')}" for entry in lacking[:10])
        raise CaptureError(
            f"{capture.path}: {len(lacking)} of the batch's entries could not be stored:{shown}\n"
            f"  give what the step needs, such as replay(..., fill={{{lacking[0]['path']!r}: value}})"
        )


def _covers(path: str, missing: str) -> bool:
    return missing == path or (missing.startswith(path) and missing[len(path)] in "[.")


def _restored(capture: Capture, module: nn.Module, weights: str, attributes: str, device: torch.device) -> list[str]:
    notes = version_notes(capture.versions, capture.manifest["machine"], device)
    apply_training(capture, module)
    notes += apply_attributes(capture, module, captured=attributes == "captured")
    if weights == "captured" and not apply_weights(capture, module):
        notes.append("the capture holds no weights: the module's own were used")
    return notes


def _prepare(
    capture: Capture, module: nn.Module, extra: Mapping[str, Any], manual: bool, optimizer: str, device: torch.device
) -> Optimizers | None:
    """Attaches the stand-in for a Trainer; the optimizers where the module steps them itself."""
    held: list[Optimizers] = []

    def backward(*args: Any, **kwargs: Any) -> None:
        held[0].backward(*args, **kwargs)

    facts = {**decoded(capture.path / MANIFEST, capture.manifest["step"]["trainer"]), **extra}
    validating = capture.function == "validation_step"
    facts = {"training": not validating, "validating": validating, **facts}
    facts.setdefault("accumulate_grad_batches", capture.manifest["step"]["accumulate"])
    stand_in = TrainerStandIn(
        facts, step=capture.step, epoch=capture.epoch, rank=capture.rank, device=device, backward=backward
    )
    attach(module, stand_in, capture.function)
    if not manual:
        return None
    states = capture.optimizers() if optimizer == "captured" else None
    held.append(Optimizers(module, states, float(capture.manifest["step"]["scale"])))
    stand_in.use(held[0])
    return held[0]


def _rewind_rng(capture: Capture) -> None:
    try:
        capture.rng.restore()
    except (ValueError, TypeError, RuntimeError, KeyError, AttributeError, OverflowError) as error:
        raise CaptureError(f"{capture.path}: entry 'rng' is damaged ({error}); copy the capture again") from None


def _incident(capture: Capture, module: nn.Module, outcome: Outcome) -> Incident | None:
    if outcome.trigger is None:
        return None
    facts = []
    if outcome.loss is not None:
        was = "" if capture.loss is None else f" ({_shown(capture.loss)} when captured)"
        facts.append(f"loss={_shown(outcome.loss)}{was}")
    if outcome.where:
        more = f" and {len(outcome.where) - 3} more" if len(outcome.where) > 3 else ""
        what = "parameters" if outcome.trigger == "parameters" else "gradients"
        if outcome.trigger == "activations":
            what = "outputs of watched modules"
        if capture.function == "validation_step":
            what = "results of the validation step"
        facts.append(f"non-finite {what}: {', '.join(outcome.where[:3])}{more}")
    return Incident(
        step=capture.step,
        epoch=capture.epoch,
        batch_idx=capture.batch_idx,
        rank=capture.rank,
        trigger=outcome.trigger,
        capture=str(capture.path),
        replay=replay_command(capture.path, module, capture.function),
        detail="; ".join(facts),
    )


def _shown(loss: Any) -> str:
    return (
        f"{float(loss):.9g}"
        if not isinstance(loss, torch.Tensor) or loss.numel() == 1
        else f"tensor of {tuple(loss.shape)}"
    )


def _same_failure(then: Incident, now: Incident) -> bool:
    # What other triggers notice (inputs, the scaler) shows in a replay as a loss or a gradient.
    if then.trigger in ("loss", "gradients") and now.trigger != then.trigger:
        return False
    if then.origin is None or now.origin is None:
        return True
    # A replay does not take the step before, but meets what that has made of the weights.
    if then.origin.phase == "optimizer":
        return now.cause == "parameters" and now.origin.tensor == then.origin.tensor
    return all(getattr(then.origin, name) == getattr(now.origin, name) for name in ("op", "phase", "module"))


def _unlike(capture: Capture, result: ReplayResult) -> str:
    if result.incident is None:
        loss = "no loss" if result.loss is None else f"loss={_shown(result.loss)}"
        found = f"a finite step ({loss})"
    else:
        found = result.incident.render().splitlines()[0]
    notes = "".join(f"\n  note: {note}" for note in result.notes)
    return (
        f"{capture.path}: the captured step did not fail in the same way.\n"
        f"  found: {found}\n"
        f"  expected: {capture.incident.render().splitlines()[0]}{notes}\n"
        "  replay with the code, the versions and the machine of the run; where those are the same, the failure came from "
        "outside the step"
    )
