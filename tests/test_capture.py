"""A capture on disk: written wholly or not at all, within its limits, and read back with errors that name the entry."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from replay_models import Gan, Net, a_batch

import nanguard
from nanguard import CaptureError, Incident
from nanguard.capture import CaptureLimitReached, StepSnapshot, find_captures, replay_command, write_capture
from nanguard.capture.contents import summary
from nanguard.cli import main
from nanguard.rng import RngState

ROOT = Path(__file__).parent.parent
INCIDENT = Incident(123, 1, 4, trigger="loss", detail="loss=nan")


def snapshot(batch: Any = None, **options: Any) -> StepSnapshot:
    batch = a_batch() if batch is None else batch
    known = {
        "step": 123,
        "epoch": 1,
        "batch_idx": 4,
        "args": (batch, 4),
        "rng": RngState.save(),
        "module": Net(width=5),
    }
    return StepSnapshot(**{**known, **options})


def edit(path: Path, change: Any) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_a_capture_holds_what_it_should(tmp_path: Path) -> None:
    path = write_capture(tmp_path / "new" / "captures", snapshot(loss=float("inf"), rank=2), INCIDENT)
    assert path == tmp_path / "new" / "captures" / "step-00000123-rank2"
    assert sorted(os.listdir(path)) == ["batch.safetensors", "manifest.json", "module.safetensors", "rng.safetensors"]
    found = nanguard.load_capture(str(path))
    assert (found.step, found.epoch, found.batch_idx, found.rank, found.loss) == (123, 1, 4, 2, float("inf"))
    assert found.incident.detail == "loss=nan"
    assert found.incident.capture == str(path)
    assert found.incident.replay == f"nanguard replay {path} --module replay_models:Net"
    assert found.args[1] == 4
    assert found.batch is found.args[0]
    assert torch.equal(found.batch["x"], a_batch()["x"])
    assert found.kwargs == {}
    assert found.versions["torch"] == torch.__version__
    assert found.missing == ()
    assert found.optimizer_state is None
    assert repr(found) == f"<Capture {path}: step 123, epoch 1, batch 4, loss>"
    with pytest.raises(AttributeError):
        found.path = tmp_path  # type: ignore[misc]


def test_odd_layouts_survive_the_file(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(2, 3, 4)
    batch = [
        base[:1, :1, ::2],
        base[..., 0][:1],
        base.T,
        base[:0],
        base[0],
        base[1],
        base.expand(2, 2, 3, 4),
        base[0, 0, 0],
    ]
    back = nanguard.load_capture(write_capture(tmp_path, snapshot(batch), INCIDENT)).batch
    assert [tensor.stride() for tensor in back] == [tensor.stride() for tensor in batch]
    assert all(torch.equal(one, other) for one, other in zip(back, batch, strict=True))


def test_keys_that_no_file_can_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batch = {
        chr(0xD800): torch.ones(1),
        chr(0xD801): torch.zeros(1),
        "[bold]": torch.ones(2),
        "": torch.ones(3),
        "__metadata__": 1,
    }
    path = write_capture(tmp_path, snapshot(batch), INCIDENT)
    back = nanguard.load_capture(path).batch
    assert list(back) == list(batch)
    assert (back[chr(0xD800)], back[chr(0xD801)]) == (1, 0)
    assert main(["show", str(path)]) == 0
    assert 'batch["[bold]"]' in capsys.readouterr().out


def test_an_incident_moves_with_its_capture(tmp_path: Path) -> None:
    path = write_capture(tmp_path / "a", snapshot(), INCIDENT)
    moved = path.rename(tmp_path / "elsewhere")
    found = nanguard.load_capture(moved).incident
    assert found.capture == str(moved)
    assert found.replay == f"nanguard replay {moved} --module replay_models:Net"


def test_what_is_not_asked_for_is_not_stored(tmp_path: Path) -> None:
    model = Gan()
    optimizers, _ = model.configure_optimizers()
    path = write_capture(tmp_path, snapshot(module=model, optimizers=optimizers), INCIDENT, module=False)
    assert sorted(os.listdir(path)) == ["batch.safetensors", "manifest.json", "rng.safetensors"]
    assert nanguard.load_capture(path).module_state is None


def test_taken_names_get_a_suffix(tmp_path: Path) -> None:
    (tmp_path / "step-00000123-rank0").write_text("a file in the way")
    names = [write_capture(tmp_path, snapshot(), INCIDENT).name for _ in range(2)]
    assert names == ["step-00000123-rank0-2", "step-00000123-rank0-3"]


def test_writers_at_the_same_time_do_not_meet(tmp_path: Path) -> None:
    threads = [threading.Thread(target=write_capture, args=(tmp_path, snapshot(), INCIDENT)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = find_captures(tmp_path)
    assert len(found) == 4
    assert {Path(str(nanguard.load_capture(path).incident.capture)) for path in found} == set(found)


def test_writing_draws_no_random_number(tmp_path: Path) -> None:
    taken = snapshot()
    before = RngState.save()
    write_capture(tmp_path, taken, INCIDENT)
    after = RngState.save()
    assert torch.equal(before.torch, after.torch)
    assert before.python == after.python


def test_limits_write_nothing_and_delete_nothing(tmp_path: Path) -> None:
    write_capture(tmp_path / "run1", snapshot(), INCIDENT, max_count=1)
    with pytest.raises(CaptureLimitReached, match=r"holds 1 captures, and .* is 1; no more are written"):
        write_capture(tmp_path, snapshot(), INCIDENT, max_count=1)
    with pytest.raises(CaptureLimitReached, match=r"capture.max_gib is 1e-06; it is not written"):
        write_capture(tmp_path, snapshot(), INCIDENT, max_gib=1e-6)
    assert len(find_captures(tmp_path)) == 1
    assert os.listdir(tmp_path) == ["run1"]
    write_capture(tmp_path, snapshot(), INCIDENT, max_count=2, max_gib=1)


def test_a_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CaptureError, match=r"the capture of step 123 cannot be written: .*; expected a folder"):
            write_capture(directory, snapshot(), INCIDENT)
    assert os.listdir(tmp_path) == ["file"]


SETUP = """
import os, resource, sys
import torch
from nanguard import CaptureError, Incident
from nanguard.capture import StepSnapshot, write, write_capture
from nanguard.cli import main
from nanguard.rng import RngState

def taken(batch):
    module = torch.nn.Linear(2, 2)
    return StepSnapshot(step=123, epoch=0, batch_idx=0, args=(batch,), module=module, rng=RngState.save())

INCIDENT = Incident(123, 0, 0)
"""
FULL = """
for elements, limit in ((1_000_000, 100_000), (10, 1000)):
    step = taken(torch.ones(elements))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        write_capture(sys.argv[1], step, INCIDENT)
    except CaptureError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        print(error)
"""
KILLED = """
write._write_manifest = lambda *args: os.kill(os.getpid(), 9)
write_capture(sys.argv[1], taken(torch.ones(2)), INCIDENT)
"""
WATCHED = """
written = []

def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, os.PathLike)) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        path = str(arguments[0])
        if path.startswith(sys.argv[1]):
            written.append(os.path.relpath(path, sys.argv[1]))

step = taken(torch.ones(2))
sys.addaudithook(watch)
write_capture(sys.argv[1], step, INCIDENT)
print(*written)
"""
THEIRS = """
sys.path.insert(0, sys.argv[1])
import their_types
print(write_capture(sys.argv[1], taken(their_types.Batch(torch.ones(2))), INCIDENT))
"""


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=200
    )


@pytest.mark.skipif(sys.platform == "win32", reason="limits are those of POSIX")
def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    done = run(SETUP + FULL, tmp_path)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done
    assert all(line.startswith(f"{tmp_path}: the capture of step 123 cannot be written: ") for line in lines)
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="signals are those of POSIX")
def test_a_killed_writer_leaves_nothing_that_is_taken_for_a_capture(tmp_path: Path) -> None:
    assert run(SETUP + KILLED, tmp_path).returncode == -9
    [left] = os.listdir(tmp_path)
    assert left.startswith(".tmp-step-00000123-rank0")
    assert find_captures(tmp_path) == []
    assert write_capture(tmp_path, snapshot(), INCIDENT, max_count=1).name == "step-00000123-rank0"


def test_nothing_is_written_under_the_final_name(tmp_path: Path) -> None:
    """So that whoever looks at any moment, or after a crash, sees a whole capture or none."""
    done = run(SETUP + WATCHED, tmp_path)
    written = done.stdout.split()
    assert written, done.stderr
    assert all(name.startswith(".tmp-") for name in written)


def test_a_parent_directory_lists_its_captures(tmp_path: Path) -> None:
    paths = [write_capture(tmp_path, snapshot(step=step), INCIDENT) for step in (1, 2)]
    with pytest.raises(CaptureError) as caught:
        nanguard.load_capture(tmp_path)
    assert str(caught.value).splitlines() == [
        f"{tmp_path}: is not a capture but holds captures; name one of them:",
        *(f"  {path}" for path in paths),
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "there is no such directory"),
        ("file", "is a file; expected"),
        ("empty", "has no manifest.json; expected"),
    ],
)
def test_what_is_no_capture(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CaptureError, match=message):
        nanguard.load_capture(tmp_path / name)


@pytest.mark.parametrize("version", [2, 0, "1", None, True, [1]])
def test_other_format_versions_are_refused(tmp_path: Path, version: Any) -> None:
    path = write_capture(tmp_path, snapshot(), INCIDENT)
    edit(path, lambda manifest: manifest.update(format_version=version))
    with pytest.raises(CaptureError) as caught:
        nanguard.load_capture(path)
    assert str(caught.value) == (
        f"{path / 'manifest.json'}: found format_version {version!r}; this nanguard reads version 1. Read the capture with the "
        f"nanguard that wrote it (nanguard {nanguard.__version__}), or write it anew"
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        '{"format_version": 1}',
        "[" * 100_000,
        "\x00\xff",
        '{"format_version": ' + "9" * 5000 + "}",
    ],
)
def test_damaged_manifests(tmp_path: Path, text: str) -> None:
    path = write_capture(tmp_path, snapshot(), INCIDENT)
    (path / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(CaptureError, match=r"manifest\.json"):
        nanguard.load_capture(path)


def everything(path: Path) -> None:
    """Reads all of a capture and replays it."""
    found = nanguard.load_capture(path)
    found.args, found.kwargs, found.rng, found.module_state, found.optimizer_state, found.missing, found.loss
    nanguard.replay(found, Gan())


@pytest.mark.parametrize("name", ["batch", "rng", "module", "optimizer"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "header", "names"])
def test_damaged_tensor_files(tmp_path: Path, name: str, damage: str) -> None:
    model = Gan()
    optimizers = model.configure_optimizers()[0]
    for optimizer in optimizers:
        optimizer.param_groups[0]["params"][0].grad = torch.ones_like(optimizer.param_groups[0]["params"][0])
        optimizer.step()
    path = write_capture(tmp_path, snapshot(module=model, optimizers=optimizers), INCIDENT, optimizer=True)
    everything(path)
    file = path / f"{name}.safetensors"
    data = file.read_bytes()
    changed = {
        "missing": None,
        "truncated": data[:-5],
        "empty": b"",
        "header": struct.pack("<Q", 2**62) + data[8:],
        "names": struct.pack("<Q", 2) + b"{}",
    }[damage]
    file.unlink()
    if changed is not None:
        file.write_bytes(changed)
    with pytest.raises(CaptureError, match=f"{name}.safetensors"):
        everything(path)
    if changed is not None:  # also where somebody has made the manifest fit
        edit(path, lambda manifest: manifest["files"].update({file.name: len(changed)}))
        with pytest.raises(CaptureError, match=f"{name}.safetensors"):
            everything(path)


def nodes(tree: Any) -> list[dict[str, Any]]:
    if isinstance(tree, dict):
        return ([tree] if "kind" in tree else []) + [n for value in tree.values() for n in nodes(value)]
    return [n for value in tree for n in nodes(value)] if isinstance(tree, list) else []


SHIFT = int(os.environ.get("HOSTILE_SHIFT", "0"))  # for hunting: every value for every entry takes minutes
HOSTILE: list[Any] = [
    None,
    True,
    -1,
    2**70,
    "",
    "x",
    [],
    {},
    [[]],
    [None],
    {"kind": "tensor"},
    {"kind": "eval", "value": "1"},
]


def test_every_entry_of_the_manifest_may_be_hostile(tmp_path: Path) -> None:
    """Whatever stands in its place: the capture can be read and replayed all the same, or `CaptureError` says why not."""
    model = Gan()
    batch = {"more": [1.5, (2, b"x"), {3}, slice(1), torch.eye(2).to_sparse(), torch.ones(2, 2).T, 1j]}
    path = write_capture(tmp_path, snapshot(batch, module=model, optimizers=model.configure_optimizers()[0]), INCIDENT)
    text = (path / "manifest.json").read_text()
    count, refused = len(places(json.loads(text))), 0
    for index in range(SHIFT % 3, count, 3):
        manifest = json.loads(text)
        owner, key = places(manifest)[index]
        owner[key] = HOSTILE[(index + SHIFT) % len(HOSTILE)]
        (path / "manifest.json").write_text(json.dumps(manifest))
        try:
            read_all(path)
        except CaptureError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"{key!r} of {str(owner)[:99]}: {error!r}") from error
    assert count > 500
    assert refused > count / 9


def read_all(path: Path) -> None:
    found = nanguard.load_capture(path)
    repr((found.args, found.kwargs, found.rng, found.module_state, found.optimizer_state, found.loss, found.versions))
    summary(found)
    fill = {entry["path"]: 1 for entry in found.missing}
    nanguard.replay(found, Gan(), step=lambda *args, **kwargs: None, fill=fill)


def places(tree: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    entries = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    for key, value in entries:
        if len(found) < 2000:
            found.append((tree, key))
            found += places(value)
    return found


def test_indices_of_sparse_tensors_are_checked(tmp_path: Path) -> None:
    """Out of range they would read foreign memory."""
    path = write_capture(tmp_path, snapshot(torch.eye(3).to_sparse()), INCIDENT)
    edit(path, lambda manifest: manifest["args"]["items"][0].update(shape=[1, 1]))
    with pytest.raises(CaptureError, match=r"batch: this entry is damaged \(RuntimeError: .*index 2"):
        nanguard.load_capture(path).batch


def test_names_in_a_capture_choose_no_files_and_no_code(tmp_path: Path) -> None:
    path = write_capture(tmp_path, snapshot({"x": torch.ones(2)}), INCIDENT)
    [tensor] = [
        node for node in nodes(json.loads((path / "manifest.json").read_text())["args"]) if node["kind"] == "tensor"
    ]
    for node in (
        {**tensor, "name": "../../etc/passwd"},
        {"kind": "dataclass", "class": "subprocess:Popen", "attributes": [["args", "x"]]},
        {"kind": "namedtuple", "class": "os:system", "items": ["touch x"]},
        {"kind": "enum", "class": "builtins:eval", "members": ["1"]},
        {"kind": "mapping", "base": "dict", "class": "nanguard.errors:sys.exit", "items": []},
        {"kind": "userdict", "class": "collections:UserDict.__init__", "attributes": []},
        {"kind": "mapping", "base": "dict", "items": [[{"kind": "list", "items": []}, 1]]},
        {**tensor, "stride": [2**61]},
        {**tensor, "shape": [2**40]},
        {"kind": "same", "as": 99},
        {"kind": "path", "class": "__class__", "value": "x"},
        {"kind": "dtype", "value": "load"},
    ):
        edit(path, lambda manifest, node=node: manifest.update(args={"items": [{"kind": "list", "items": [node]}]}))
        with pytest.raises(CaptureError, match=r"batch.safetensors: batch\[0\]") as caught:
            nanguard.load_capture(path).batch
        assert caught.value.__cause__ is None


def test_a_class_that_is_not_imported_is_named_when_the_batch_is_read(tmp_path: Path) -> None:
    (tmp_path / "their_types.py").write_text(
        "import dataclasses\n@dataclasses.dataclass\nclass Batch:\n    x: object\n"
    )
    done = run(SETUP + THEIRS, tmp_path)
    found = nanguard.load_capture(done.stdout.strip())
    assert found.incident.step == 123
    with pytest.raises(
        CaptureError, match=r"batch: the capture holds a 'their_types:Batch', which is not imported; import module"
    ):
        found.batch
    sys.path.insert(0, str(tmp_path))
    try:
        import their_types  # type: ignore[import-not-found]

        batch = nanguard.load_capture(found.path).batch
        assert type(batch) is their_types.Batch
    finally:
        sys.path.remove(str(tmp_path))
        del sys.modules["their_types"]


def test_commands_are_quoted() -> None:
    assert replay_command("my captures/a", "pkg.mod:f") == "nanguard replay 'my captures/a' --module pkg.mod:f"
    assert replay_command("a", Net()) == "nanguard replay a --module replay_models:Net"


def test_opening_a_capture_imports_no_torch(tmp_path: Path) -> None:
    path = write_capture(tmp_path, snapshot(), INCIDENT)
    code = """
import sys, nanguard
capture = nanguard.load_capture(sys.argv[1])
repr(capture), capture.incident, capture.loss, capture.missing, capture.versions
assert "torch" not in sys.modules
capture.batch
print("torch" in sys.modules)
"""
    done = run(code, path)
    assert done.stdout.strip() == "True", done.stderr
