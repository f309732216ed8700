"""The search for the samples at fault, on batches whose culprits are known."""

from __future__ import annotations

import collections
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanguard.diagnosis.cutting import cut_of
from nanguard.diagnosis.samples import SampleSearch, batch_size, failing_samples, take


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
        (((torch.zeros(3, 5),) * 4, ({"boxes": torch.zeros(2, 4)},) * 4), 4),
        ([], None),
        ("text", None),
    ],
)
def test_batch_size(batch, size):
    assert batch_size(batch) == size


def test_several_rows_for_each_sample_are_told_from_the_second_dimension():
    assert batch_size([torch.zeros(8, 4), torch.zeros(8)], 4) == 8
    assert batch_size([torch.zeros(8, 4, 2), torch.zeros(4)], 4) == 4
    assert batch_size(torch.zeros(7, 4), 4) == 4


def test_take_keeps_structure_and_what_is_no_sample():
    batch = Point({"a": torch.arange(4), "name": "x"}, [torch.arange(8).view(4, 2), torch.tensor(5)])
    sub = take(batch, [2, 0])
    assert isinstance(sub, Point)
    assert sub.x["a"].tolist() == [2, 0]
    assert sub.x["name"] == "x"
    assert sub.y[0].tolist() == [[4, 5], [0, 1]]
    assert sub.y[1].item() == 5


@given(st.sets(st.integers(0, 63), min_size=1))
def test_a_suggestion_that_is_right_costs_one_run_for_each_sample(culprits):
    fails, runs = failing([{culprit} for culprit in culprits])
    search = SampleSearch(64, fails)
    assert search.run(sorted(culprits)) == tuple(sorted(culprits))
    assert search.complete
    assert len(runs) <= len(culprits) + 1


@given(st.sets(st.integers(0, 63), min_size=1, max_size=4), st.sets(st.integers(0, 63), max_size=4))
def test_a_suggestion_that_is_wrong_does_no_harm(culprits, guess):
    fails, _ = failing([{culprit} for culprit in culprits])
    search = SampleSearch(64, fails)
    assert search.run(sorted(guess)) == tuple(sorted(culprits))


@pytest.mark.parametrize("size", [2, 7, 64])
def test_where_every_sample_fails(size):
    fails, runs = failing([{position} for position in range(size)])
    assert SampleSearch(size, fails).run() == tuple(range(size))
    assert len(runs) <= 2 * math.ceil(math.log2(size)) + size


@pytest.mark.parametrize("size", [2, 7, 16])
def test_where_any_two_fail_together(size):
    pairs = [{one, other} for one in range(size) for other in range(one)]
    fails, _ = failing(pairs)
    assert SampleSearch(size, fails, 500).run() == tuple(range(size))


def test_a_search_that_ends_early_says_so():
    fails, runs = failing([set(range(40))])
    search = SampleSearch(64, fails, 10)
    assert set(range(40)) <= set(search.run())
    assert not search.complete
    assert search.runs == len(runs) == 10


def test_lists_with_an_entry_for_each_sample():
    ragged = {"words": [torch.arange(n) for n in (3, 1, 2)], "names": ["a", "b", "c"], "y": torch.arange(3)}
    assert batch_size(ragged) == 3
    sub = take(ragged, [2, 0])
    assert [words.tolist() for words in sub["words"]] == [[0, 1], [0, 1, 2]]
    assert (sub["names"], sub["y"].tolist()) == (["c", "a"], [2, 0])
    uncollated = [{"x": torch.ones(4), "y": torch.tensor(float(n))} for n in range(5)]
    assert batch_size(uncollated) == 5
    assert [sample["y"].item() for sample in take(uncollated, [4, 1])] == [4, 1]


def test_the_batch_may_be_the_second_dimension():
    batch = {"frames": torch.arange(12).view(3, 4), "y": torch.arange(4)}
    assert batch_size(batch, 4) == 4
    assert take(batch, [1], 4)["frames"].tolist() == [[1], [5], [9]]


def test_two_views_are_no_two_samples():
    views = [torch.zeros(8, 3), torch.zeros(8, 5)]
    assert batch_size(views) == 8
    assert [view.shape[0] for view in take(views, [1, 2])] == [2, 2]


def test_samples_that_are_replaced_keep_their_places():
    cut = cut_of(torch.arange(5), None)
    assert cut is not None
    assert cut.replaced([1, 3], 0).tolist() == [0, 1, 0, 3, 0]
