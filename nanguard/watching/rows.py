"""What a tensor looks like, as a row of numbers on its device: nothing here waits for the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from nanguard.incident import TensorStats
from nanguard.sentinel import values_of

__all__ = ["WIDTH", "Infinities", "Row", "measure"]

Infinities = Literal["none", "positive", "all"]
WIDTH = 6  # min and max of the finite elements, counts of NaN, +inf, -inf and zeros


@final
@dataclass(eq=False)
class Row:
    """What was measured of one tensor.

    Attributes:
        shape, dtype: of the tensor.
        device: the numbers, 1-D of length `WIDTH`, float64, on the tensor's device, until they are read.
        values: the same numbers, once they have been read.
    """

    shape: tuple[int, ...]
    dtype: str
    device: Tensor | None
    values: Sequence[float] = ()

    def bad(self, infinities: Infinities) -> bool:
        """Whether it holds a NaN, or an infinity of the kind that counts."""
        if not self.values:
            return False
        _, _, nan, positive, negative, _ = self.values
        return nan > 0 or (infinities != "none" and positive > 0) or (infinities == "all" and negative > 0)

    def stats(self, name: str) -> TensorStats:
        """As the record that incidents hold."""
        low, high, nan, positive, negative, zeros = self.values
        none = low > high  # nothing is finite
        return TensorStats(
            name,
            self.shape,
            self.dtype,
            None if none else low,
            None if none else high,
            nan=int(nan),
            posinf=int(positive),
            neginf=int(negative),
            zeros=int(zeros),
        )


def measure(tensor: Tensor) -> Row | None:
    """Measures a tensor, of any real or complex floating dtype; `None` for others, for empty ones, and inside `torch.func`."""
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__ and not hasattr(tensor, "to_local"):
        return None  # a tensor that stands for something else
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor) or tensor.is_meta:
        return None
    # The stabiliser, and whatever else watches the user's calls, must not take these for calls of the user.
    with torch.no_grad(), torch._C.DisableTorchFunction():
        values = values_of(tensor)
        if values is None or values.numel() == 0 or values.is_nested:
            return None
        shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        return Row(shape, dtype, _numbers(values.detach()))


def _numbers(values: Tensor) -> Tensor:
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    if values.dtype not in (torch.float32, torch.float64):
        values = values.to(torch.float32)  # halves and eight-bit floats are exact there
    if values.is_cpu:
        # Nothing waits for a CPU, so a look decides whether there is anything to count.
        low, high = torch.aminmax(values)
        if math.isfinite(low.item()) and math.isfinite(high.item()):
            zeros = values.numel() - int(torch.count_nonzero(values))
            return torch.tensor([low.item(), high.item(), 0, 0, 0, zeros], dtype=torch.float64)
    finite = torch.isfinite(values)
    numbers = [
        values.where(finite, math.inf).amin(),
        values.where(finite, -math.inf).amax(),
        values.isnan().sum(),
        (values == math.inf).sum(),
        (values == -math.inf).sum(),
        (values == 0).sum(),
    ]
    return torch.stack([number.to(torch.float64) for number in numbers])
