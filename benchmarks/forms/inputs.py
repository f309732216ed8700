"""Inputs that forms share. Every factory makes fresh tensors; `mild` ones are harmless, `extreme` ones are not."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from forms.registry import Inputs

__all__ = [
    "TARGET",
    "binary",
    "classes",
    "embeddings",
    "free",
    "inputs",
    "pair",
    "randn",
    "scores",
    "select",
    "vector",
]

INF = math.inf
TARGET = torch.tensor([0, 2, 1, 3])

MILD = torch.tensor(
    [[1.5, -0.3, 0.2, 2.1, -1.0], [0.4, 1.9, -2.2, 0.0, 0.7], [-1.1, 0.6, 1.3, -0.4, 2.4], [0.9, -1.7, 0.1, 1.2, -0.6]]
)
# Gaps of two thousand, an underflow, an overflow everywhere, and an underflow everywhere.
EXTREME = torch.tensor(
    [[2.0, 1, 0.1, -3, 0.5], [1000, 1, -1000, 3, -2], [3, 2, 120, 1, -1], [-400, -500, -600, -450, -420]]
)
MASKED = torch.tensor(
    [[2.0, -INF, 0.1, -3, 0.5], [1000, -INF, -1000, 3, -INF], [-INF, 2, 120, 1, -1], [-INF, -INF, -600, -450, -INF]]
)
# Probabilities that round to 1, on and off the target.
SATURATED = torch.tensor([[40.0, 0, 1, -2, 3], [0, 18, 0, 1, -1], [2, 25, 1, 0, -1], [0, 1, 30, -30, 2]])
HALF = torch.tensor([[2.0, 1, 0, -3, 5], [60, 1, -60, 3, -2], [3, 2, 40, 1, -1], [-20, -50, -60, -45, -30]])


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers, the same every time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def inputs(**kinds: Callable[[], tuple[Tensor, ...]]) -> Inputs:
    """Inputs of several kinds by name."""
    return dict(kinds)


def select(found: Inputs, kinds: str) -> Inputs:
    """Some of the kinds, by their names or by `new=old`."""
    chosen = {}
    for kind in kinds.split():
        new, _, old = kind.partition("=")
        chosen[new] = found[old or new]
    return chosen


def classes(kinds: str = "mild extreme masked saturated half bfloat", target: bool = True) -> Inputs:
    """Logits of 4 samples and 5 classes, with the target classes."""

    def given(logits: Tensor, dtype: torch.dtype = torch.float32) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: (logits.to(dtype), TARGET.clone()) if target else (logits.to(dtype),)

    found = inputs(
        mild=given(MILD),
        extreme=given(EXTREME),
        masked=given(MASKED),
        saturated=given(SATURATED),
        half=given(HALF, torch.float16),
        bfloat=given(HALF, torch.bfloat16),
    )
    return select(found, kinds)


def vector(kinds: str = "mild extreme saturated half", masked: bool = False) -> Inputs:
    """One vector of logits or scores."""
    found = inputs(
        mild=lambda: (MILD[0].clone(),),
        extreme=lambda: (EXTREME[1].clone(),),
        low=lambda: (EXTREME[3].clone(),),
        saturated=lambda: (SATURATED[1].clone(),),
        half=lambda: (HALF[1].half(),),
        bfloat=lambda: (HALF[1].bfloat16(),),
        masked=lambda: (MASKED[2].clone(),),
    )
    return select(found, kinds + " masked" * masked)


SCORES_MILD = torch.tensor([1.2, -0.7, 0.3, 2.2, -1.9, 0.0])
SCORES = torch.tensor([95.0, -95, 130, -130, 1000, -1000])
SCORES_SATURATED = torch.tensor([30.0, -30, 18, -18, 16, -9])
LABELS = torch.tensor([1.0, 0, 0, 1, 0, 1])


def scores(kinds: str = "mild extreme saturated half bfloat") -> Inputs:
    """Real numbers of both signs."""
    found = inputs(
        mild=lambda: (SCORES_MILD.clone(),),
        extreme=lambda: (SCORES.clone(),),
        saturated=lambda: (SCORES_SATURATED.clone(),),
        half=lambda: (torch.tensor([20.0, -20, 9, -9, 60, -60]).half(),),
        bfloat=lambda: (torch.tensor([20.0, -20, 9, -9, 128, -128]).bfloat16(),),
    )
    return select(found, kinds)


def binary(kinds: str = "mild extreme saturated half bfloat") -> Inputs:
    """Scores with labels of 0 and 1, which disagree with half of the scores; declare them constant."""

    def labelled(factory: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: (factory()[0], LABELS.to(factory()[0].dtype))

    return {kind: labelled(factory) for kind, factory in scores(kinds).items()}


def pair(kinds: str = "mild extreme half") -> Inputs:
    """Logits of two models for the same 4 samples and 5 classes."""
    found = inputs(
        mild=lambda: (MILD.clone(), MILD.roll(1, 1) * 0.5),
        extreme=lambda: (EXTREME.clone(), EXTREME.roll(1, 1) * 0.5),
        saturated=lambda: (SATURATED.clone(), SATURATED.roll(1, 1) * 0.5),
        half=lambda: (HALF.half(), (HALF.roll(1, 1) * 0.5).half()),
        bfloat=lambda: (HALF.bfloat16(), (HALF.roll(1, 1) * 0.5).bfloat16()),
        masked=lambda: (MASKED.clone(), MASKED * 0.5),
    )
    return select(found, kinds)


def embeddings(kinds: str = "mild extreme", labels: bool = False, count: int = 2) -> Inputs:
    """Features of 4 samples in two views; unnormalised and large where extreme. With labels for supervised contrast."""

    def given(scale: float) -> Callable[[], tuple[Tensor, ...]]:
        def factory() -> tuple[Tensor, ...]:
            base = randn(4, 3, seed=3)
            views = [(base + randn(4, 3, seed=4 + view, scale=0.3)) * scale for view in range(count)]
            return (*views, *([torch.tensor([0, 1, 0, 1])] if labels else []))

        return factory

    return select(inputs(mild=given(1.0), extreme=given(12.0), huge=given(60.0)), kinds)


def free(
    mild: Callable[[], tuple[Tensor, ...]],
    extreme: Callable[[], tuple[Tensor, ...]],
    **more: Callable[[], tuple[Tensor, ...]],
) -> Inputs:
    """Inputs of a form's own."""
    return {"mild": mild, "extreme": extreme, **more}
