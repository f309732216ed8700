"""Every bug of the zoo is explained as it should be, every healthy module is left alone, and no diagnosis leaves a trace."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader
from trainers import assert_same, fit, policy
from zoo import BUGS, CONTROLS, Bug
from zoo.base import SIZE

from nanguard.algebra.registry import lookup
from nanguard.diagnosis.advice import advice
from nanguard.diagnosis.table import ADVICE
from nanguard.diagnosis.traits import TRAITS
from nanguard.incident import Cause, Incident, Origin

ERROR = {"capture": {"enabled": False}, "budget": {"consecutive": 50}}


def run(tmp: Path, bug: Any, action: str, **sections: Any) -> Any:
    guard = policy(tmp, action, **ERROR, **sections)
    return fit(tmp, bug.make, bug.loader(), guard, **bug.trainer)


def marked_line(source: Any) -> tuple[str, int, str]:
    """File, number and text of the line with the mark."""
    lines, first = inspect.getsourcelines(source)
    (offset,) = [offset for offset, line in enumerate(lines) if line.rstrip().endswith("# <- here")]
    return inspect.getsourcefile(source) or "", first + offset, lines[offset].strip()


def explained(incident: Incident, bug: Bug) -> None:
    """Asserts all that should be said about a bug."""
    origin = incident.origin
    found = {
        "op": origin and origin.op,
        "phase": origin and origin.phase,
        "module": origin and origin.module,
        "cause": incident.cause,
        "samples": incident.samples,
        "verdict": incident.verdict,
        "tensor": origin and origin.tensor,
        "batch_idx": incident.batch_idx,
    }
    assert found == {name: getattr(bug, name) for name in found}, incident.render()
    if bug.library is not None:
        assert f"/{bug.library}/" in (origin.file or ""), incident.render()
        assert "called from" in incident.advice
    elif origin is not None and origin.op is not None and origin.phase != "optimizer":
        assert (origin.file, origin.line, origin.code) == marked_line(bug.source), incident.render()
    if bug.samples is not None and bug.indices == "obvious":
        assert incident.dataset_indices == tuple(SIZE * bug.batch_idx + position for position in bug.samples)
    assert incident.advice
    missing = [text for text in bug.says if text not in incident.advice]
    wrong = [text for text in bug.omits if text in incident.advice]
    assert not missing + wrong, incident.advice


@pytest.mark.parametrize("name", BUGS)
def test_a_bug(tmp_path: Path, name: str) -> None:
    bug = BUGS[name]
    guarded = run(tmp_path, bug, "skip_step")
    assert guarded.incidents
    assert bug.count in (None, len(guarded.incidents))
    explained(guarded.incidents[0], bug)
    plain = run(tmp_path, bug, "skip_step", diagnosis={"enabled": False})
    assert [incident.batch_idx for incident in plain.incidents] == [i.batch_idx for i in guarded.incidents]
    assert {incident.cause for incident in plain.incidents} == {"unknown"}
    assert_same(guarded, plain)


@pytest.mark.parametrize("name", CONTROLS)
def test_a_healthy_module(tmp_path: Path, name: str) -> None:
    entry = CONTROLS[name]
    val = entry.loader() if "validation_step" in vars(entry.make) else None
    found = fit(tmp_path, entry.make, entry.loader(), policy(tmp_path, "raise", **ERROR), val=val, **entry.trainer)
    assert found.incidents == []


@pytest.mark.parametrize("entry", ADVICE, ids=lambda e: " ".join([e.cause, *e.ops, *e.facts])[:50])
def test_advice_names_rules_that_there_are(entry: Any) -> None:
    for code in re.findall(r"NG\d+", entry.text):
        assert lookup(code).code == code
    assert entry.text.count(". ") <= 1
    origin = Origin(op=entry.ops[0] if entry.ops else None, phase=entry.phase)
    for fact in entry.facts or ("",):
        assert advice(entry.cause, origin, facts={fact: f"<{fact}>"})


@pytest.mark.parametrize(
    "entry", [entry for entry in ADVICE if entry.facts], ids=lambda e: " ".join([e.cause, *e.facts])
)
def test_advice_for_a_fact_is_reached_with_it_alone(entry: Any) -> None:
    origin = Origin(op=entry.ops[0] if entry.ops else None, phase=entry.phase)
    without = advice(entry.cause, origin)
    for fact in entry.facts:
        assert advice(entry.cause, origin, facts={fact: "so"}) != without


def test_every_fact_is_one_that_a_recording_may_have() -> None:
    known = {*TRAITS, "weight", "zero", "minus one", "exponent", "state", "statistics", "setting"}
    assert {fact for entry in ADVICE for fact in entry.facts} <= known


@pytest.mark.parametrize("cause", Cause.__args__)  # type: ignore[attr-defined]
def test_there_is_advice_for_every_cause(cause: Any) -> None:
    assert advice(cause, Origin())


# -- the zoo itself


def test_every_cause_and_phase_has_its_bugs() -> None:
    assert {bug.cause for bug in BUGS.values()} == set(Cause.__args__)  # type: ignore[attr-defined]
    assert {bug.phase for bug in BUGS.values()} == {"forward", "backward", "optimizer", None}


def test_there_are_enough() -> None:
    assert len(BUGS) >= 90
    assert len(CONTROLS) >= 25


@pytest.mark.parametrize("name", [name for name, bug in BUGS.items() if bug.count == 1 and bug.verdict == "reproduced"])
def test_without_the_bad_batch_it_is_well(tmp_path: Path, name: str) -> None:
    """The bug needs its batch: without it nothing happens, so that the module is no accident of another kind."""
    bug = BUGS[name]
    loader = bug.loader()
    batches = [batch for position, batch in enumerate(loader) if position != 1]
    found = fit(tmp_path, bug.make, DataLoader(batches[:1], batch_size=None), policy(tmp_path, **ERROR), **bug.trainer)
    assert found.incidents == []
