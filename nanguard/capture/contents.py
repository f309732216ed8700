"""What lies in a capture, from its manifest alone: names, shapes and dtypes. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, final

from nanguard.capture.manifest import MANIFEST
from nanguard.errors import CaptureError

if TYPE_CHECKING:
    from nanguard.capture.load import Capture

__all__ = ["Leaf", "leaves", "summary"]


@final
@dataclass(frozen=True)
class Leaf:
    """A stored value.

    Attributes:
        path: its name, such as ``batch["image"]``.
        type: ``tensor``, ``ndarray``, or the name of a Python type.
        shape, dtype, device: of a tensor or an array.
        nan, inf: how many elements are NaN or infinite.
        value: what a plain value is, shortened.
    """

    path: str
    type: str
    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    device: str | None = None
    nan: int = 0
    inf: int = 0
    value: str | None = None


def leaves(capture: Capture) -> list[Leaf]:
    """The values that the step was called with.

    Raises:
        CaptureError: where the manifest is damaged.
    """
    try:
        return list(_arguments(capture))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise CaptureError(
            f"{capture.path / MANIFEST}: entry 'args' is damaged ({type(error).__name__}: {error})"
        ) from None


def summary(capture: Capture) -> dict[str, Any]:
    """All of it as JSON values: path, incident, step, leaves, missing, weights, versions, replay."""
    weights = capture.manifest["module"]["state"]
    return {
        "path": str(capture.path),
        "incident": capture.incident.to_dict(),
        "step": dict(capture.manifest["step"]),
        "module": capture.manifest["module"]["class"],
        "leaves": [asdict(leaf) for leaf in leaves(capture)],
        "missing": list(capture.missing),
        "weights": None if weights is None else len(weights),
        "optimizer": bool((capture.manifest.get("optimizers") or {}).get("whole")),
        "versions": capture.versions,
        "machine": capture.manifest["machine"],
        "files": capture.manifest["files"],
        "replay": capture.incident.replay,
    }


def _arguments(capture: Capture) -> Iterator[Leaf]:
    for index, node in enumerate(capture.manifest["args"]["items"]):
        yield from _walk(node, "batch" if index == 0 else f"args[{index}]", 0)
    for name, node in capture.manifest["kwargs"]["items"]:
        yield from _walk(node, name, 0)


def _walk(node: Any, path: str, depth: int) -> Iterator[Leaf]:
    if depth > 200:
        raise ValueError("nested too deeply")
    if not isinstance(node, dict):
        yield Leaf(path, type(node).__name__, value=_short(repr(node)))
        return
    kind = node["kind"]
    if kind in ("tensor", "ndarray"):
        yield Leaf(
            path, kind, tuple(node["shape"]), node["dtype"], node.get("device"), node.get("nan", 0), node.get("inf", 0)
        )
    elif kind in ("list", "tuple", "namedtuple", "objects"):
        for index, entry in enumerate(node["items"]):
            yield from _walk(entry, f"{path}[{index}]", depth + 1)
    elif kind in ("mapping", "userdict", "dataclass"):
        for key, entry in node.get("items", ()):
            yield from _walk(entry, f'{path}["{key}"]' if isinstance(key, str) else f"{path}[{_key(key)}]", depth + 1)
        for name, entry in node.get("attributes", ()):
            yield from _walk(entry, path if (kind, name) == ("userdict", "data") else f"{path}.{name}", depth + 1)
    elif kind != "missing":
        yield Leaf(path, kind, value=_short(str(_plain(node))))


def _key(node: Any) -> str:
    return repr(node) if not isinstance(node, dict) else str(_plain(node))


def _plain(node: dict[str, Any]) -> Any:
    value = node.get("value", node.get("members", node.get("as", "...")))
    if node["kind"] == "float" and isinstance(value, str) and ("x" in value or "inf" in value):
        return float.fromhex(value)
    return "nan" if node["kind"] == "float" else value


def _short(text: str, longest: int = 60) -> str:
    return text if len(text) <= longest else text[: longest - 3] + "..."
