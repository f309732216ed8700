"""One replayed step: forward, backward and, where the module optimizes by itself, its own steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from nanguard.capture.load import Capture
from nanguard.capture.manual import Ended, Optimizers
from nanguard.capture.memory import ModuleMemory
from nanguard.capture.showing import Around
from nanguard.diagnosis import Ends
from nanguard.errors import CaptureError
from nanguard.incident import Trigger
from nanguard.sentinel import all_finite, nonfinite_names
from nanguard.source import is_users_hook
from nanguard.watching import loss_in

__all__ = ["FailedStep", "Outcome", "after_backward_of", "numerics", "run_step", "users_hook"]


@final
@dataclass(frozen=True, eq=False)
class Outcome:
    """What a step did.

    Attributes:
        loss: detached, or `None` where there was none.
        trigger: what was not finite, or `None`.
        where: names of what is not finite: of parameters (or their gradients), of watched modules, of results.
        gradients: parameter name -> gradient without the loss scale.
    """

    loss: Tensor | None
    trigger: Trigger | None
    where: list[str]
    gradients: dict[str, Tensor]


@final
class FailedStep:
    """A step that failed in a replay and can be run again, for whoever explains it.

    Attributes:
        module: in the captured state; its random numbers, weights, buffers and attributes are those from before the step after
            each `rewind`.
        args, kwargs: a copy of what the step was given.
        capture: the capture.
    """

    def __init__(
        self,
        module: nn.Module,
        arguments: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]],
        step: Callable[..., Any],
        start: ModuleMemory,
        capture: Capture,
    ) -> None:
        self.module = module
        self.args, self.kwargs = arguments()
        self._arguments = arguments
        self._step = step
        self._start = start
        self.capture = capture

    def rewind(self) -> None:
        """Back to just before the step, with a fresh copy of its arguments."""
        self._start.put_back()
        self.capture.rng.restore()
        self.args, self.kwargs = self._arguments()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the step gives, of a training step the loss with its graph, under the captured autocast and stabiliser."""
        output = self._step(*args, **kwargs)
        return output if self.capture.function == "validation_step" else loss_of(output)


def run_step(
    capture: Capture, module: nn.Module, step: Callable[[], Any], optimizers: Optimizers | None, around: Around | None
) -> Outcome:
    """Runs a step as it ran when it was captured.

    Args:
        capture: the capture.
        module: in the captured state.
        step: the call.
        optimizers: of a module that optimizes by itself.
        around: shows what has to be good besides loss and gradients.
    """
    ends = Ends(None)
    with contextlib.ExitStack() as stack:
        returned = None if around is None else stack.enter_context(around(ends))
        if capture.function == "validation_step":
            output = step()
            if returned is not None:
                returned(output)
            loss = loss_in(output)
            names = [mark.name for mark in ends.bad]
            return Outcome(None if loss is None else loss.detach(), "loss" if names else None, names, {})
        outcome = run_manual(capture, module, step, optimizers) if optimizers else run_automatic(capture, module, step)
    if outcome.trigger is None and ends.bad:
        return replace(outcome, trigger="activations", where=[mark.name or "the root" for mark in ends.bad])
    return outcome


def run_automatic(capture: Capture, module: nn.Module, step: Callable[[], Any]) -> Outcome:
    """Runs a step of automatic optimization, and computes the gradients of all parameters that require one."""
    loss = loss_of(step())
    if loss is None:
        return Outcome(None, None, [], {})
    scale = _scale(capture)
    if loss.requires_grad:
        divisor = int(capture.manifest["step"]["accumulate"])
        shared = loss / divisor if divisor > 1 else loss
        backward: Any = getattr(module, "backward", torch.Tensor.backward)
        scaled = shared if scale == 1.0 else shared * scale
        backward(scaled) if hasattr(module, "backward") else scaled.backward()
        after_backward = after_backward_of(capture, module)
        if after_backward is not None:
            after_backward()
    return _judged(module, loss.detach(), scale)


def users_hook(module: nn.Module, name: str) -> Callable[..., Any] | None:
    """A hook of LightningModule, where the module has one of its own."""
    return getattr(module, name, None) if is_users_hook(module, name) else None


def after_backward_of(capture: Capture, module: nn.Module) -> Callable[[], Any] | None:
    """What the module does with its gradients once it has them, where they were at fault: it may ask for a whole Trainer."""
    return users_hook(module, "on_after_backward") if capture.incident.trigger == "gradients" else None


def run_manual(capture: Capture, module: nn.Module, step: Callable[[], Any], optimizers: Optimizers) -> Outcome:
    """Runs a step that optimizes by itself, up to its end or to the first gradient that is not finite."""
    returned, ended = None, False
    try:
        returned = loss_of(step())
    except Ended:
        ended = True
    loss = optimizers.losses[-1] if optimizers.losses and (ended or returned is None) else returned
    loss = None if loss is None else loss.detach()
    scale = _scale(capture)
    if ended or not optimizers.stepped:
        return _judged(module, loss, scale)
    gradients = _gradients(module, 1.0)  # a step has taken the scale out
    bad = nonfinite_names(module.named_parameters())
    if loss is not None and not all_finite([loss]):
        return Outcome(loss, "loss", [], gradients)
    return Outcome(loss, "parameters" if bad else None, bad, gradients)


def loss_of(output: Any) -> Tensor | None:
    """The loss in what a training step may return: a tensor, a dictionary with ``loss``, or nothing.

    Raises:
        CaptureError: for anything else.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if loss is None or isinstance(loss, Tensor):
        return loss
    raise CaptureError(
        f"the training step returned {type(output).__name__}; expected a tensor, a dictionary with the key 'loss', or None"
    )


@contextlib.contextmanager
def numerics(capture: Capture, device: torch.device, stabilize: bool | None) -> Iterator[None]:
    """Autocast and the stabiliser as they were; `stabilize` overrides the latter."""
    precision = capture.manifest["step"]["precision"]
    recorded = capture.manifest["step"]["stabilize"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(_default_dtype((precision or {}).get("default_dtype")))
        stack.enter_context(_autocast(precision, device))
        if recorded.get("enabled") if stabilize is None else stabilize:
            from nanguard.stabilizer import stabilize as stabilizer

            epsilon, saturated = recorded.get("epsilon", "keep"), recorded.get("saturated", "report")
            stack.enter_context(stabilizer(epsilon, saturated=saturated, advice=[]))  # told when it was captured
        yield


def _autocast(precision: Mapping[str, Any] | None, device: torch.device) -> Any:
    name = (precision or {}).get("autocast_dtype")
    if name is None:
        return torch.autocast(device.type, enabled=False)
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise CaptureError(f"entry 'step.precision': found autocast_dtype {name!r}; expected a dtype of torch")
    return torch.autocast(device.type, dtype=dtype)


@contextlib.contextmanager
def _default_dtype(name: str | None) -> Iterator[None]:
    if name is None:
        yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, str(name).removeprefix("torch.")))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _judged(module: nn.Module, loss: Tensor | None, scale: float) -> Outcome:
    named = [(name, parameter.grad) for name, parameter in module.named_parameters()]
    # The scaled gradients are judged: those are what overflows.
    finite = all_finite(gradient for _, gradient in named if gradient is not None)
    bad = [] if finite else nonfinite_names(named)
    if loss is not None and not all_finite([loss]):
        return Outcome(loss, "loss", bad, _gradients(module, scale))
    return Outcome(loss, "gradients" if bad else None, bad, _gradients(module, scale))


def _gradients(module: nn.Module, scale: float) -> dict[str, Tensor]:
    named = [(name, parameter.grad) for name, parameter in module.named_parameters()]
    return {name: gradient / scale if scale != 1.0 else gradient for name, gradient in named if gradient is not None}


def _scale(capture: Capture) -> float:
    return float(capture.manifest["step"]["scale"])
