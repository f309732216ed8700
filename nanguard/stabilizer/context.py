"""The public face of the stabiliser."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import TracebackType
from typing import ParamSpec, TypeVar, cast, final

import torch

from nanguard.incident import Advice, Swap
from nanguard.stabilizer.blocks import active_blocks
from nanguard.stabilizer.compiled import watch
from nanguard.stabilizer.mode import StabilizerMode
from nanguard.stabilizer.regions import is_recomputing
from nanguard.stabilizer.report import Report, Swaps

__all__ = ["stabilize"]

P = ParamSpec("P")
R = TypeVar("R")


@final
class stabilize:
    """Compute unstable expressions stably, wherever they are written.

    Inside the block, whatever takes the logarithm of a tensor that came out of `exp`, `softmax`, `sigmoid` and the like,
    possibly scaled, summed, indexed or clamped on the way and in other functions or modules, gets the value and the
    derivatives of exact arithmetic; so does a softmax or sigmoid written out as a quotient. Everything else is
    bit-identical. Other threads are not affected. Regions under `torch.utils.checkpoint` make the same swaps when the
    backward pass recomputes them, wherever and whenever that is. Calls being traced are left as they are.

    Arguments:
        epsilon: ``"keep"`` preserves the value of ``log(p + eps)`` and ``log(p.clamp(min=eps))`` exactly; ``"drop"`` treats an
            epsilon of at most 1e-3 on a probability, or on a sum of exponentials, as a guard against log 0 and computes log p
            itself. Where p is exactly 0 (a masked logit) the guard stays.
        saturated: ``"report"`` tells where `torch.distributions` and `F.binary_cross_entropy` put bounds on probabilities that
            change the result; ``"repair"`` computes it without those bounds, as from logits.
        swaps: the list to fill, one entry for each place; without it every block starts a list of its own.
        advice: the list to fill with what is left as it is but should be written otherwise. Without it that is
            ``swaps.advice``, and each place is told once, when the block ends, by a warning of category `NumericalAdvice`.

    Raises:
        ValueError: for any other `epsilon` or `saturated`.
        TypeError: where a coroutine or generator function, or a class, is decorated: its code would run outside the block.

    Example:
        >>> with nanguard.stabilize() as swaps:
        ...     loss = -torch.log(torch.softmax(model(x), 1)[rows, y]).mean()
        >>> loss.backward()
        >>> for swap in swaps:
        ...     print(swap)

        As a decorator, ``@nanguard.stabilize()`` does the same for every call.
    """

    def __init__(
        self,
        epsilon: str = "keep",
        *,
        saturated: str = "report",
        swaps: list[Swap] | None = None,
        advice: list[Advice] | None = None,
    ) -> None:
        if epsilon not in ("keep", "drop"):
            raise ValueError(f"stabilize: epsilon is {epsilon!r}; expected 'keep' or 'drop'")
        if saturated not in ("report", "repair"):
            raise ValueError(f"stabilize: saturated is {saturated!r}; expected 'report' or 'repair'")
        self._epsilon = epsilon
        self._saturated = saturated
        self._swaps = swaps
        self._advice = advice
        self._report = None if swaps is None else Report(swaps, advice, tells=advice is None)

    def __reduce__(self) -> tuple[Callable[..., stabilize], tuple[object, ...]]:
        return _rebuilt, (self._epsilon, self._saturated, self._swaps, self._advice)

    @watch.run_as_is
    def __enter__(self) -> Swaps:
        """Activate it for this thread.

        Returns:
            The list that is filled with swaps while the block runs, which has another one in its attribute `advice`. A list of
            the user's own is given back as it is.
        """
        if torch.compiler.is_dynamo_compiling():  # dynamo traces a function that has a block of its own
            watch.tell(watch.entering(self._epsilon == "drop", self._saturated == "repair"))
            return Swaps()
        # What a checkpointed function swaps in a block of its own is counted when it first runs, not when it is recomputed.
        again = is_recomputing()
        report = None if again else self._report
        if report is None:
            report = Report(Swaps(), [] if again else self._advice, tells=not again and self._advice is None)
        mode = StabilizerMode(self._epsilon == "drop", report, self._saturated == "repair")
        mode.__enter__()
        active_blocks().append(mode)
        report.begin()
        return cast(Swaps, report.swaps)

    @watch.run_as_is
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Deactivate it and forget everything but the swaps."""
        if torch.compiler.is_dynamo_compiling():
            watch.tell(watch.leave)
            return
        mode = active_blocks().pop()
        try:
            mode.__exit__(kind, error, trace)
        finally:
            mode.close()
            mode.report.end(failed=error is not None)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Decorate a function or method."""
        kinds = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
        if any(is_kind(function) for is_kind in kinds):
            name = getattr(function, "__qualname__", repr(function))
            raise TypeError(
                f"stabilize: {name} is a coroutine or generator function, whose body would run outside the block; "
                "use `with nanguard.stabilize():` inside it, around code that neither awaits nor yields"
            )
        if isinstance(function, type):
            raise TypeError(
                f"stabilize: {function.__qualname__} is a class, whose methods would run outside the block; decorate the "
                "method that computes the loss, such as forward or training_step"
            )
        if not callable(function):
            raise TypeError(f"stabilize: {function!r} is not callable; expected @stabilize(), or `with stabilize():`")

        epsilon, saturated = self._epsilon, self._saturated

        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            # Dynamo cannot trace a block that was made outside.
            with stabilize(epsilon, saturated=saturated) if torch.compiler.is_dynamo_compiling() else self:
                return function(*args, **kwargs)

        return wrapper


def _rebuilt(epsilon: str, saturated: str, swaps: list[Swap] | None, advice: list[Advice] | None) -> stabilize:
    return stabilize(epsilon, saturated=saturated, swaps=swaps, advice=advice)
