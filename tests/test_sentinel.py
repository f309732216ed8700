"""The sentinel: NaN and infinities anywhere are found, and nothing else is."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanguard.sentinel import all_finite, finite_flags, nonfinite_names, norms, small_norms

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
BAD = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", BAD)
@given(size=st.integers(1, 300), data=st.data())
@settings(max_examples=10, deadline=None)
def test_one_bad_element_anywhere_is_found(dtype, value, size, data):
    tensors = [torch.ones(3, 5, dtype=dtype), torch.zeros(size, dtype=dtype), torch.ones((), dtype=torch.float32)]
    assert all_finite(tensors)
    tensors[1][data.draw(st.integers(0, size - 1))] = value
    assert not all_finite(tensors)
    assert finite_flags(tensors) == [True, False, True]
    assert not bool(torch.isfinite(norms(tensors)).all())


@pytest.mark.parametrize(
    ("dtype", "largest"), [(torch.float16, 6e4), (torch.bfloat16, 3e38), (torch.float32, 3e38), (torch.float64, 1e308)]
)
def test_an_overflowing_norm_of_finite_values_is_no_alarm(dtype, largest):
    assert all_finite([torch.full((100, 100), largest, dtype=dtype), torch.ones(3)])


def test_what_cannot_hold_nan_counts_as_finite():
    assert all_finite([])
    assert norms([]) is None
    assert all_finite([torch.tensor([1, 2]), torch.tensor([True]), torch.empty(0), torch.empty(0, 3)])


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_values(layout):
    dense = torch.eye(4)
    assert all_finite([dense.to_sparse(layout=layout)])
    dense[2, 2] = float("nan")
    assert not all_finite([dense.to_sparse(layout=layout)])


def test_strided_views_and_gradients_with_history():
    base = torch.ones(4, 4, requires_grad=True)
    view = (base * 2).t()[1:, ::2]
    assert all_finite([view])
    assert not norms([view]).requires_grad


def test_names():
    bad = torch.tensor([1.0, float("nan")])
    assert nonfinite_names([("a", torch.ones(2)), ("b", bad), ("c", None), ("d", bad)]) == ["b", "d"]


def test_nothing_is_drawn_or_changed():
    tensor = torch.randn(5, 5)
    state, copy = torch.get_rng_state(), tensor.clone()
    all_finite([tensor])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(tensor, copy)


@pytest.mark.parametrize("value", BAD)
def test_the_norms_of_a_few_small_tensors(value):
    tensors = [torch.ones(3), torch.full((2, 2), -1e15), torch.zeros((), dtype=torch.float64)]
    assert small_norms(tensors) == pytest.approx([3**0.5, 2e15, 0.0])
    tensors[1][0, 1] = value
    assert [math.isfinite(norm) for norm in small_norms(tensors)] == [True, False, True]
    for other in (
        torch.ones(70000),
        torch.ones(2, dtype=torch.float16),
        torch.ones(2).to_sparse(),
        torch.ones(2, device="meta"),
    ):
        assert small_norms([torch.ones(2), other]) is None
    assert small_norms([torch.ones(1)] * 17) is None
    assert small_norms([]) == []
