"""The public face of the stabiliser."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from types import TracebackType
from typing import ParamSpec, TypeVar, final

from nanguard.incident import Swap
from nanguard.stabilizer.mode import StabilizerMode
from nanguard.stabilizer.report import Report

__all__ = ["stabilize"]

P = ParamSpec("P")
R = TypeVar("R")

_THREAD = threading.local()


@final
class stabilize:
    """Compute unstable expressions stably, wherever they are written.

    Inside the block, whatever takes the logarithm of a tensor that came out of `exp`, `softmax`, `sigmoid` and the like,
    possibly scaled, summed, indexed or clamped on the way and in other functions or modules, gets the value and the
    derivatives of exact arithmetic; so does a softmax or sigmoid written out as a quotient. Everything else is
    bit-identical. Other threads are not affected. Regions under `torch.utils.checkpoint` and calls being traced are left
    as they are.

    Arguments:
        epsilon: ``"keep"`` preserves the value of ``log(p + eps)`` and ``log(p.clamp(min=eps))`` exactly; ``"drop"`` treats an
            epsilon of at most 1e-3 on a probability, or on a sum of exponentials, as a guard against log 0 and computes log p
            itself. Where p is exactly 0 (a masked logit) the guard stays.
        swaps: the list to fill, one entry for each place; without it every block starts a list of its own.

    Raises:
        ValueError: for any other `epsilon`.
        TypeError: where a coroutine or generator function is decorated: its body would run outside the block.

    Example:
        >>> with nanguard.stabilize() as swaps:
        ...     loss = -torch.log(torch.softmax(model(x), 1)[rows, y]).mean()
        >>> loss.backward()
        >>> for swap in swaps:
        ...     print(swap)

        As a decorator, ``@nanguard.stabilize()`` does the same for every call.
    """

    def __init__(self, epsilon: str = "keep", *, swaps: list[Swap] | None = None) -> None:
        if epsilon not in ("keep", "drop"):
            raise ValueError(f"stabilize: epsilon is {epsilon!r}; expected 'keep' or 'drop'")
        self._epsilon = epsilon
        self._swaps = swaps
        self._report = None if swaps is None else Report(swaps)

    def __reduce__(self) -> tuple[Callable[..., stabilize], tuple[str, list[Swap] | None]]:
        return _rebuilt, (self._epsilon, self._swaps)

    def __enter__(self) -> list[Swap]:
        """Activate it for this thread, and give the list that is filled with swaps while the block runs."""
        mode = StabilizerMode(self._epsilon == "drop", self._report or Report([]))
        mode.__enter__()  # type: ignore[no-untyped-call]
        _active().append(mode)
        return mode.report.swaps

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Deactivate it and forget everything but the swaps."""
        mode = _active().pop()
        try:
            mode.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        finally:
            mode.close()

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Decorate a function or method."""
        kinds = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
        if any(is_kind(function) for is_kind in kinds):
            name = getattr(function, "__qualname__", repr(function))
            raise TypeError(
                f"stabilize: {name} is a coroutine or generator function, whose body would run outside the block; "
                "use `with nanguard.stabilize():` inside it, around code that neither awaits nor yields"
            )
        if not callable(function):
            raise TypeError(f"stabilize: {function!r} is not callable; expected @stabilize(), or `with stabilize():`")

        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            with self:
                return function(*args, **kwargs)

        return wrapper


def _active() -> list[StabilizerMode]:
    """The active blocks of this thread, which end in the opposite order."""
    if not hasattr(_THREAD, "modes"):
        _THREAD.modes = []
    modes: list[StabilizerMode] = _THREAD.modes
    return modes


def _rebuilt(epsilon: str, swaps: list[Swap] | None) -> stabilize:
    return stabilize(epsilon, swaps=swaps)
