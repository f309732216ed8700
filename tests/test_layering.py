"""Imports point down the list of rooms, only one module imports lightning, and the light rooms start without torch."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import nanguard

PACKAGE = Path(nanguard.__file__).parent

# From the ground up; a room may import the rooms before it.
ROOMS = [
    *(
        "errors",
        "lead_up",
        "incident",
        "telling",
        "policy_errors",
        "policy_values",
        "policy",
        "source",
        "patches",
        "rng",
        "values",
        "surroundings",
        "iterators",
        "trees",
        "sentinel",
        "reading",
        "history",
        "moving",
    ),
    *(
        "algebra",
        "stabilizer",
        "transaction",
        "inputs",
        "diagnosis",
        "provenance",
        "sampling",
        "stabilizing",
        "watching",
        "observer",
        "capture",
        "archive",
        "peers",
        "budget",
        "window",
        "examination",
        "validation",
    ),
    *(
        "guard",
        "report",
        "through_trainer",
        "strays",
        "trainer_state",
        "validating",
        "session",
        "lightning",
        "environment",
        "pytest_plugin",
        "cli",
        "__main__",
    ),
]
LIGHT = [
    "errors",
    "lead_up",
    "incident",
    "telling",
    "policy",
    "policy_errors",
    "policy_values",
    "algebra",
    "cli",
    "pytest_plugin",
    "environment",
]


def imports(path: Path) -> set[str]:
    """All modules that a file imports, wherever in it the import stands, except for type checking."""
    found = set()
    for node in _runtime_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module}
            if node.module == "nanguard":
                found |= {f"nanguard.{alias.name}" for alias in node.names}
    return found


def _runtime_nodes(tree):
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        yield child
        yield from _runtime_nodes(child)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_down(path):
    own = ROOMS.index(room_of(path))
    rooms = {name.split(".")[1] for name in imports(path) if name.startswith("nanguard.")}
    assert not {room for room in rooms if ROOMS.index(room) > own}


def test_every_room_is_on_the_list():
    assert {room_of(path) for path in modules()} <= set(ROOMS)


def names_of(path: Path) -> set[str]:
    """The modules that a file names anywhere, also those that it imports late or for type checking."""
    known = {module_of(file) for file in modules()}
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            entries = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= entries & known or {node.module}
    return found & known - {module_of(path)}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def test_no_files_go_round_in_a_circle():
    graph = {module_of(path): names_of(path) for path in modules()}
    assert sum(map(len, graph.values())) > len(graph)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, with the circle


def lightning_importers(paths) -> set[str]:
    names = ("lightning", "pytorch_lightning", "lightning_fabric")
    return {path.name for path in paths if any(name.split(".")[0] in names for name in imports(path))}


def test_only_one_module_imports_lightning():
    assert lightning_importers(modules()) == {"lightning.py"}


def test_that_test_can_fail(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from lightning.pytorch import Trainer\n")
    assert lightning_importers([bad]) == {"bad.py"}


def loaded_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("name", ["nanguard", *(f"nanguard.{room}" for room in LIGHT)])
def test_light_rooms_start_without_torch(name):
    assert not {"torch", "lightning", "numpy"} & loaded_after(f"import {name}")


def test_the_guard_starts_without_lightning():
    loaded = loaded_after("import nanguard.session, nanguard.capture.replaying, nanguard.stabilizer")
    assert "torch" in loaded
    assert "lightning" not in loaded


def test_the_subprocess_test_can_fail():
    assert "lightning" in loaded_after("from nanguard import NanGuard")


def test_public_names_all_load_and_are_sorted():
    assert list(nanguard.__all__) == sorted(nanguard.__all__)
    for name in nanguard.__all__:
        assert getattr(nanguard, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = nanguard.nonsense
