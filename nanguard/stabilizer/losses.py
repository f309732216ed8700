"""Losses that are replaced as a whole: what surrounds their elements."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import _reduction
from torch.nn import functional as F

__all__ = ["BinaryCrossEntropy"]


@final
class BinaryCrossEntropy:
    """One call of `F.binary_cross_entropy`.

    Arguments:
        call: the call itself.
        bound: its arguments by name.
    """

    def __init__(self, call: Callable[[], Tensor], bound: Mapping[str, Any]) -> None:
        self._target: Tensor = bound["target"]
        self._weight: Tensor | None = bound["weight"]
        self._reduction: str = bound["reduction"]
        if bound["size_average"] is not None or bound["reduce"] is not None:
            self._reduction = _reduction.legacy_get_string(bound["size_average"], bound["reduce"], emit_warning=False)
        self._call = call

    @property
    def is_replaceable(self) -> bool:
        """Whether what the call does is known: a derivative at the weight is an error."""
        return self._weight is None or not self._weight.requires_grad

    def dtype(self) -> torch.dtype:
        """The dtype of the result. Raises what the call raises."""
        with torch.no_grad():
            return self._call().dtype

    def elements(self, p: Tensor) -> Tensor:
        """The loss of each probability, as torch computes it."""
        return F.binary_cross_entropy(p, self._target, reduction="none")

    def whole(self, elements: Tensor, dtype: torch.dtype) -> Tensor:
        """The result, given the loss of each probability."""
        if self._weight is not None:
            elements = elements * self._weight
        if self._reduction != "none":
            elements = elements.mean() if self._reduction == "mean" else elements.sum()
        return elements.to(dtype)
