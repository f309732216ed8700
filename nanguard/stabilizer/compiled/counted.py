"""The record of what was swapped in a compiled graph, which counts its calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from nanguard.incident import Swap

__all__ = ["counted"]


def counted(compiled: Callable[..., Any], swaps: list[Swap], note: Callable[[Iterable[Swap]], None]) -> Any:
    """A compiled graph that notes its swaps whenever it runs."""
    if not swaps:
        return compiled

    def run(*args: Any, **kwargs: Any) -> Any:
        note(swaps)
        return compiled(*args, **kwargs)

    return run
