"""Where a tensor is not finite, and where it is 0: the same as the plain formulas say, for all dtypes and layouts."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nanguard.diagnosis.statistics import anywhere, nonfinite, zeros_of

BLOCK = 2**16
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda tensor: tensor,
    "transposed": lambda tensor: tensor.transpose(0, -1) if tensor.ndim else tensor,
    "channels last": lambda tensor: (
        tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor.unsqueeze(0)
    ),
    "every other": lambda tensor: tensor[..., ::2] if tensor.ndim else tensor,
    "expanded": lambda tensor: tensor.expand(3, *tensor.shape),
    "negated": torch._neg_view,
    "learned": lambda tensor: tensor.clone().requires_grad_(),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, -0.0, 0.0, 1e-45, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64])
def test_as_the_plain_formulas_say(dtype: torch.dtype, value: float | None, view: str) -> None:
    generator = torch.Generator().manual_seed(1)
    for shape in [(), (1,), (2, 3, 4), (1, 5, 1), (BLOCK + 1,), (300, 700), (3, BLOCK), (4, 1, 30, 20), (0, 3)]:
        for stride in (1, 3, 40_000):
            tensor = torch.randn(shape, generator=generator).to(dtype)
            # Without one it is the largest number, of which a sum overflows.
            tensor.view(-1)[::stride] = torch.finfo(dtype).max if value is None else value
            tensor = VIEWS[view](tensor)
            expected = torch.isfinite(tensor).logical_not()
            found = nonfinite(tensor)
            assert (found is None) == (not bool(expected.any()))
            assert found is None or torch.equal(found, expected)
            assert anywhere(expected) == bool(expected.any())
            assert torch.equal(zeros_of(tensor), tensor == 0)


def test_in_inference_mode() -> None:
    with torch.inference_mode():
        tensor = torch.tensor([1.0, math.inf, math.nan])
        inside = nonfinite(tensor)
    outside = nonfinite(tensor)
    assert inside is not None
    assert outside is not None
    assert inside.tolist() == outside.tolist() == [False, True, True]
