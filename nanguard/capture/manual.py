"""Manual optimization in a replay: the module's own optimizers, with a look at the gradients before each step."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from nanguard.errors import CaptureError
from nanguard.sentinel import all_finite

__all__ = ["Ended", "Optimizers"]

_ADVICE = "replay with the code that wrote it, or with optimizer='current'"


@final
class Ended(BaseException):
    """The replayed step has failed; not an `Exception`, so that the step does not catch it."""


@final
class Optimizers:
    """The optimizers and schedulers of a module that optimizes by itself, built by its `configure_optimizers`.

    Args:
        module: the module.
        states: what `load_state_dict` of each is given; `None` leaves them new.
        scale: the loss scale, taken out of the gradients before a step.

    Attributes:
        optimizers, schedulers: in the module's order. Their `step` raises `Ended` where a gradient is not finite.
        stepped: how many steps were taken.
        losses: the losses that were backpropagated.

    Raises:
        CaptureError: where the states do not fit the optimizers.
    """

    def __init__(self, module: nn.Module, states: list[dict[str, Any]] | None, scale: float) -> None:
        self.stepped = 0
        self.losses: list[Tensor] = []
        self._module = module
        self._scale = scale
        configure: Any = getattr(module, "configure_optimizers", None)
        self.optimizers, self.schedulers = _parse(configure() if configure is not None else None)
        if states is not None:
            _load(self.optimizers, states)
        for optimizer in self.optimizers:
            self._watch(optimizer)

    def backward(self, loss: Tensor, optimizer: Any = None, *args: Any, **kwargs: Any) -> None:
        """Backpropagates a loss, scaled as then; raises `Ended` where it is not finite."""
        self.losses.append(loss.detach())
        scaled = loss if self._scale == 1.0 else loss * self._scale
        own: Any = getattr(self._module, "backward", None)
        if own is not None:
            own(scaled, *args, **kwargs)
        else:
            scaled.backward(*args, **kwargs)
        if not all_finite([loss]):
            raise Ended

    def _watch(self, optimizer: Any) -> None:
        step = optimizer.step

        def checked(closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
            if closure is None:
                self._check(optimizer)
                result = step()
            else:
                result = step(closure=self._watched(closure, optimizer))
            self.stepped += 1
            return result

        functools.update_wrapper(checked, step)  # schedulers ask for the marks that they have left on it
        # In the instance, where users and schedulers look first; these optimizers live as long as the replay.
        optimizer.step = checked
        # What Lightning's own wrapper of an optimizer offers beyond.
        optimizer.optimizer = optimizer
        optimizer.toggle_model = lambda sync_grad=True: _toggled(self._module, optimizer)

    def _watched(self, closure: Callable[[], Any], optimizer: Any) -> Callable[[], Any]:
        def checked() -> Any:
            with torch.enable_grad():
                result = closure()
            self._check(optimizer)
            return result

        return checked

    def _check(self, optimizer: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not all_finite(gradients):
            raise Ended
        if self._scale != 1.0:
            for gradient in gradients:
                gradient.div_(self._scale)


@contextlib.contextmanager
def _toggled(module: nn.Module, optimizer: Any) -> Iterator[None]:
    """Only the parameters of one optimizer get gradients inside the block."""
    toggle: Any = getattr(module, "toggle_optimizer", None)
    untoggle: Any = getattr(module, "untoggle_optimizer", None)
    if toggle is not None:
        toggle(optimizer)
    try:
        yield
    finally:
        if untoggle is not None:
            untoggle(optimizer)


def _parse(configured: Any) -> tuple[list[Any], list[Any]]:
    """The forms that `configure_optimizers` may return: nothing, one, several, a dictionary or two lists."""
    if configured is None:
        return [], []
    if isinstance(configured, Mapping):
        return [configured["optimizer"]], _schedulers([configured.get("lr_scheduler")])
    if not isinstance(configured, (list, tuple)):
        return [configured], []
    if len(configured) == 2 and isinstance(configured[0], (list, tuple)):
        return list(configured[0]), _schedulers(configured[1])
    if configured and all(isinstance(entry, Mapping) for entry in configured):
        return [entry["optimizer"] for entry in configured], _schedulers([e.get("lr_scheduler") for e in configured])
    return list(configured), []


def _schedulers(configured: Any) -> list[Any]:
    entries = configured if isinstance(configured, (list, tuple)) else [configured]
    found = [entry["scheduler"] if isinstance(entry, Mapping) else entry for entry in entries]
    return [scheduler for scheduler in found if scheduler is not None]


def _load(optimizers: list[Any], states: Iterable[dict[str, Any]]) -> None:
    states = list(states)
    if len(states) != len(optimizers):
        raise CaptureError(
            f"configure_optimizers returns {len(optimizers)} optimizers here, and the capture holds {len(states)}; {_ADVICE}"
        )
    for index, (optimizer, state) in enumerate(zip(optimizers, states, strict=True)):
        _load_one(index, optimizer, state)


def _load_one(index: int, optimizer: Any, state: dict[str, Any]) -> None:
    try:
        optimizer.load_state_dict(state)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        kind = type(optimizer).__name__
        raise CaptureError(f"optimizer {index} ({kind}): the captured state does not fit: {error}; {_ADVICE}") from None
