"""What of a captured step has to be good besides its loss and gradients, and how a run of it shows that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from torch import nn

from nanguard.capture.load import Capture
from nanguard.diagnosis import Ends
from nanguard.policy import Watch
from nanguard.watching import ModuleWatch, StepResults

__all__ = ["Around", "around_of"]

Around = Callable[[Ends], AbstractContextManager[Callable[[Any], None]]]


def around_of(capture: Capture, module: nn.Module) -> Around | None:
    """What a run of the step happens in, as `Rerun.ends` has it; `None` where loss and gradients are all there is."""
    watch = capture.watch
    if capture.function == "validation_step":
        return StepResults(module, "positive" if watch is None else watch["infinities"])
    return None if watch is None else partial(_watched, module, watch)


@contextmanager
def _watched(module: nn.Module, watch: Mapping[str, Any], ends: Ends) -> Iterator[Callable[[Any], None]]:
    # Patterns that the present code has no module for are no error: it may have been changed since.
    options = Watch.model_construct(modules=tuple(watch["modules"]), infinities=watch["infinities"])
    hooks = ModuleWatch(module, options)
    try:
        with hooks.ends(ends) as returned:
            yield returned
    finally:
        hooks.end()
