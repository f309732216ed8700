"""All generators, saved cheaply and put back exactly."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanguard.rng import RngState


def draws() -> list[Any]:
    return [random.random(), random.gauss(0, 1), np.random.randn(3).tolist(), np.random.rand(), torch.rand(3).tolist()]


ACTIONS: dict[str, Callable[[], Any]] = {
    "numpy gaussian": lambda: np.random.randn(),
    "numpy uniform": lambda: np.random.rand(),
    "numpy shuffle": lambda: np.random.permutation(10),
    "numpy seed": lambda: np.random.seed(1),
    "python": lambda: random.random(),
    "python gaussian": lambda: random.gauss(0, 1),
    "torch": lambda: torch.rand(1),
    "nothing": lambda: None,
}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(sorted(ACTIONS)), max_size=12), st.integers(0, 12))
def test_restoring_repeats_what_came_after_saving(actions: list[str], at: int) -> None:
    np.random.seed(1)
    for action in actions[:at]:
        RngState.save()
        ACTIONS[action]()
    saved = RngState.save()
    first = draws()
    for action in actions[at:]:
        ACTIONS[action]()
        RngState.save()
    saved.restore()
    assert draws() == first


def test_a_cached_gaussian_is_not_forgotten() -> None:
    np.random.seed(3)
    RngState.save()
    np.random.randn()
    with_cache = RngState.save()
    again = RngState.save()
    expected = np.random.randn()  # taken from the cache: the generator itself does not move
    without = RngState.save()
    after = np.random.randn()
    for state, value in ((with_cache, expected), (again, expected), (without, after)):
        state.restore()
        once_more = RngState.save()
        assert np.random.randn() == value
        once_more.restore()
        assert np.random.randn() == value


def test_an_unmoved_generator_is_not_read_again() -> None:
    np.random.seed(3)
    one = RngState.save()
    assert RngState.save().numpy is one.numpy
    np.random.rand()
    assert RngState.save().numpy is not one.numpy


def test_other_bit_generators() -> None:
    if not hasattr(np.random, "set_bit_generator"):
        pytest.skip("NumPy before 1.24 has one global bit generator")
    before = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(5))
        saved = RngState.save()
        first = np.random.rand(3)
        saved.restore()
        assert np.array_equal(np.random.rand(3), first)
    finally:
        np.random.set_bit_generator(before)


def test_saving_draws_nothing() -> None:
    saved = RngState.save()
    first = draws()
    saved.restore()
    for _ in range(3):
        RngState.save()
    assert draws() == first


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_generators() -> None:
    torch.rand(1, device="cuda")
    saved = RngState.save()
    first = torch.rand(3, device="cuda")
    saved.restore()
    assert torch.equal(torch.rand(3, device="cuda"), first)
    assert all(state.device.type == "cpu" for state in saved.cuda.values())
