"""Results of a step that have to be good besides its loss and gradients, seen while it is run again."""

from __future__ import annotations

import math
from typing import Literal, final

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from nanguard.diagnosis.recording import Trace
from nanguard.diagnosis.records import Mark, storage_of
from nanguard.diagnosis.statistics import plain
from nanguard.sentinel import values_of

__all__ = ["Ends", "bad_elements"]

_COMPARABLE = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))


@final
class Ends:
    """Takes note of bad results at the moment when they are there: what follows may overwrite them.

    Args:
        trace: records the run, if anything does.

    Attributes:
        bad: in the order in which they were seen.
    """

    def __init__(self, trace: Trace | None) -> None:
        self._trace = trace
        self.bad: list[Mark] = []

    def see(self, name: str, tensor: Tensor, infinities: Literal["none", "positive", "all"]) -> None:
        """Looks at a result, which has a name, for NaN and for the infinities that count."""
        with torch.no_grad(), torch._C.DisableTorchFunction(), _disable_current_modes():
            if tensor.is_meta or (values := values_of(tensor)) is None or values.is_nested:
                return
            mask = bad_elements(values.detach(), infinities)
            if mask is None:
                return
            writes = [] if self._trace is None else list(self._trace.bad.get(storage_of(values), ()))
            self.bad.append(Mark(values.detach(), mask if plain(values) else None, writes, name))


def bad_elements(tensor: Tensor, infinities: Literal["none", "positive", "all"]) -> Tensor | None:
    """Where a tensor holds NaN or an infinity that counts, a boolean tensor of its shape; `None` for nowhere."""
    if tensor.is_complex():
        parts = [bad_elements(part, infinities) for part in (tensor.real, tensor.imag)]
        found = [part for part in parts if part is not None]
        return None if not found else found[0] if len(found) == 1 else found[0] | found[1]
    if tensor.dtype not in _COMPARABLE:
        tensor = tensor.to(torch.float32)
    mask = torch.isnan(tensor)
    if infinities != "none":
        mask |= torch.isinf(tensor) if infinities == "all" else tensor == math.inf
    return mask if bool(mask.any()) else None
