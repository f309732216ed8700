"""Incidents and captures for the terminal, with colour where it has any. Free of torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from nanguard.capture.contents import Leaf, leaves

if TYPE_CHECKING:
    from nanguard.capture.load import Capture
    from nanguard.incident import Incident

__all__ = ["render_capture", "render_incident"]

_MOST = 200


def render_incident(incident: Incident) -> Text:
    """`Incident.render`, word for word, with the parts set apart."""
    lines = incident.render().splitlines()
    text = Text(lines[0], style="bold red")
    for line in lines[1:]:
        text.append("\n")
        label, rest = (line[:10], line[10:]) if line.startswith("  ") else ("", line)
        text.append(label, style="dim")
        text.append(rest, style=_STYLES.get(label.strip(), "bold" if not label else "not bold"))
    return text


def render_capture(capture: Capture) -> RenderableType:
    """The incident, what is stored of the step, and how to replay it."""
    step = capture.manifest["step"]
    stabilized = "on" if step["stabilize"].get("enabled") else "off"
    rows = [
        ("capture", str(capture.path)),
        ("step", f"{capture.step}, epoch {capture.epoch}, batch {capture.batch_idx}, rank {capture.rank}"),
        ("module", capture.manifest["module"]["class"]),
        ("loss", "unknown" if capture.loss is None else f"{capture.loss:.9g}"),
        ("autocast", str((step["precision"] or {}).get("autocast_dtype", "off"))),
        ("stabilizer", stabilized),
        ("stored", ", ".join(f"{name} {_size(size)}" for name, size in capture.manifest["files"].items())),
        ("written by", ", ".join(f"{name} {version}" for name, version in capture.versions.items())),
    ]
    parts: list[RenderableType] = [
        render_incident(capture.incident),
        "",
        _pairs(rows),
        "",
        _leaf_table(leaves(capture)),
    ]
    if capture.missing:
        parts += ["", Text("not stored", style="bold yellow"), _missing(capture.missing)]
    return Group(*parts)


def _pairs(rows: Iterable[tuple[str, str]]) -> Text:
    text = Text()
    for name, value in rows:
        text.append(f"{name:<11}", style="dim").append(f"{value}\n")
    text.rstrip()
    return text


def _leaf_table(found: list[Leaf]) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("leaf", "type", "shape", "NaN", "inf", "value"):
        table.add_column(name, overflow="fold")
    for leaf in found[:_MOST]:
        shape = "" if leaf.shape is None else "x".join(map(str, leaf.shape)) or "scalar"
        counts = [Text(str(count) if count else "", style="bold red") for count in (leaf.nan, leaf.inf)]
        table.add_row(Text(leaf.path), Text(str(leaf.dtype or leaf.type)), shape, *counts, Text(leaf.value or ""))
    if len(found) > _MOST:
        return Group(table, Text(f"... and {len(found) - _MOST} more", style="dim"))
    return table


def _missing(entries: Iterable[dict[str, Any]]) -> Text:
    return Text("\n").join(Text(f"{entry['path']} ({entry.get('type')}): {entry.get('reason')}") for entry in entries)


def _size(size: int) -> str:
    number = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            break
        number /= 1024
    return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"


_STYLES = {"origin": "bold", "code": "cyan", "cause": "yellow", "advice": "green"}
