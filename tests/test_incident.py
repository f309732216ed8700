"""Records: immutable, JSON there and back, readable."""

from __future__ import annotations

import dataclasses
import json
import pickle
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanguard import Incident, NonFiniteError, Origin, Swap, TensorStats
from nanguard.incident import Action, Cause, Phase, Trigger, Verdict

numbers = st.none() | st.floats()
positions = st.none() | st.lists(st.integers(0, 2**40), max_size=4).map(tuple)
stats = st.builds(
    TensorStats, st.text(), st.lists(st.integers(0, 9), max_size=3).map(tuple), st.text(), numbers, numbers
)
origins = st.builds(
    Origin,
    op=st.none() | st.text(),
    phase=st.sampled_from(get_args(Phase)),
    module=st.none() | st.text(),
    line=st.none() | st.integers(),
    operands=st.lists(stats, max_size=2).map(tuple),
)
incidents = st.builds(
    Incident,
    step=st.integers(),
    epoch=st.integers(),
    batch_idx=st.integers(),
    trigger=st.sampled_from(get_args(Trigger)),
    origin=st.none() | origins,
    cause=st.sampled_from(get_args(Cause)),
    samples=positions,
    dataset_indices=positions,
    verdict=st.sampled_from(get_args(Verdict)),
    action=st.sampled_from(get_args(Action)),
    capture=st.none() | st.text(),
)


@given(incidents)
def test_json_there_and_back(incident):
    again = Incident.from_json(incident.to_json())
    assert again.to_json() == incident.to_json()  # NaN is not equal to itself, its JSON is
    json.loads(incident.to_json(), parse_constant=pytest.fail)


def test_immutable():
    incident = Incident(1, 2, 3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        incident.step = 4


@pytest.mark.parametrize("data", [{}, {"step": 1, "epoch": 1, "batch_idx": 1, "colour": "red"}])
def test_from_dict_refuses_what_it_does_not_know(data):
    with pytest.raises(ValueError, match="Incident"):
        Incident.from_dict(data)


def test_the_rendering_says_what_where_and_which():
    origin = Origin(
        "aten.log",
        "forward",
        "net.head",
        "model.py",
        42,
        "p.log()",
        (TensorStats("input 0", (4, 3), "float32", 0.0, 1.0, zeros=2),),
    )
    incident = Incident(
        7,
        1,
        3,
        trigger="loss",
        origin=origin,
        cause="log_of_zero",
        samples=(2,),
        dataset_indices=(1204,),
        verdict="reproduced",
        advice="Use F.log_softmax.",
        action="skipped",
        capture="captures/step-00000007-rank0",
        replay="nanguard replay captures/step-00000007-rank0 --module model:Net",
        detail="loss inf",
    )
    assert str(incident).splitlines() == [
        "non-finite values in the loss at step 7, epoch 1, batch 3 (skipped)",
        "  found    loss inf",
        "  origin   aten.log in the forward of `net.head` (model.py:42)",
        "  code     p.log()",
        "  operand  input 0: float32 4x3 in [0, 1], 2 zero",
        "  cause    log of zero",
        "  samples  2 of the batch = 1204 of the dataset",
        "  verdict  reproduced",
        "  advice   Use F.log_softmax.",
        "  capture  captures/step-00000007-rank0",
        "  replay   with the command on the next line",
        "nanguard replay captures/step-00000007-rank0 --module model:Net",
    ]


def test_the_error_carries_the_incident_and_pickles():
    error = NonFiniteError(Incident(1, 0, 1, trigger="loss", action="raised"))
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, FloatingPointError)
    assert again.incident == error.incident
    assert str(again) == error.incident.render()


def test_swaps_are_equal_by_place_and_say_how_often():
    swap = Swap("NG101", "a.py", 3, "p.log()", "F.log_softmax(x, 1)")
    assert swap == dataclasses.replace(swap, count=5)
    assert str(dataclasses.replace(swap, count=5)) == "a.py:3: NG101 p.log() -> F.log_softmax(x, 1) (5 times)"
