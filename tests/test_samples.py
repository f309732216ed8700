"""The search for the samples at fault, on batches whose culprits are known."""

from __future__ import annotations

import collections
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanguard.diagnosis.samples import batch_size, failing_samples, take


def failing(culprit_sets, *, smallest=1):
    runs = []

    def fails(positions):
        runs.append(tuple(positions))
        if len(positions) < smallest:
            return None
        return any(set(culprits) <= set(positions) for culprits in culprit_sets)

    return fails, runs


@given(size=st.integers(1, 64), data=st.data())
def test_one_culprit_is_found_in_few_runs(size, data):
    culprit = data.draw(st.integers(0, size - 1))
    fails, runs = failing([{culprit}])
    assert failing_samples(size, fails) == (culprit,)
    assert len(runs) <= 2 * math.ceil(math.log2(max(size, 2))) + 2


@given(st.sets(st.integers(0, 31), min_size=1, max_size=3))
def test_all_culprits_are_found(culprits):
    fails, _ = failing([{culprit} for culprit in culprits])
    assert failing_samples(32, fails, most_runs=200) == tuple(sorted(culprits))


@given(st.sets(st.integers(0, 15), min_size=2, max_size=2))
def test_two_that_only_fail_together(pair):
    fails, _ = failing([pair])
    assert failing_samples(16, fails, most_runs=500) == tuple(sorted(pair))


@given(st.integers(0, 15))
def test_a_model_that_cannot_run_on_one_sample(culprit):
    fails, runs = failing([{culprit}], smallest=2)
    assert failing_samples(16, fails, most_runs=100) == (culprit,)
    assert all(positions for positions in runs)


def test_the_search_ends_when_its_runs_are_used_up():
    fails, runs = failing([set(range(40))])
    assert failing_samples(64, fails, most_runs=10) is None
    assert len(runs) <= 10


Point = collections.namedtuple("Point", "x y")


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(4, 2), 4),
        ([torch.zeros(4, 2), torch.zeros(4)], 4),
        ({"a": torch.zeros(4), "b": {"c": torch.zeros(4, 1, 1)}, "scale": torch.tensor(1.0)}, 4),
        (Point(torch.zeros(3), torch.zeros(3, 5)), 3),
        ((torch.zeros(4), torch.zeros(3)), None),
        ([], None),
        ("text", None),
    ],
)
def test_batch_size(batch, size):
    assert batch_size(batch) == size


def test_take_keeps_structure_and_what_is_no_sample():
    batch = Point({"a": torch.arange(4), "name": "x"}, [torch.arange(8).view(4, 2), torch.tensor(5)])
    sub = take(batch, [2, 0])
    assert isinstance(sub, Point)
    assert sub.x["a"].tolist() == [2, 0]
    assert sub.x["name"] == "x"
    assert sub.y[0].tolist() == [[4, 5], [0, 1]]
    assert sub.y[1].item() == 5
