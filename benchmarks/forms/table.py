"""Judges the zoo and writes a table, or only what fails."""

from __future__ import annotations

import argparse
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch

from forms import FORMS, INNOCENTS, TWINS, Form, Innocent
from forms.defects import defects, fails
from forms.judge import MODES, Verdict, differs, judge, prepared, run, way

Row = dict[str, Verdict]


def judged(name: str, modes: tuple[str, ...], backend: str) -> tuple[str, Row]:
    """One form's verdict in each mode: right means right on inputs of every kind."""
    torch.set_num_threads(1)
    form = {**FORMS, **TWINS}[name]
    row = {}
    for mode in modes:
        compiled = "compile" in mode
        if compiled and not form.compilable:
            continue
        if compiled:
            torch._dynamo.reset()
        ready = way(mode, form, backend)
        verdicts = {kind: judge(form, mode, kind, backend, ready) for kind in form.inputs}
        wrong = [kind for kind, verdict in verdicts.items() if not verdict]
        notes = f"{', '.join(wrong)}: {verdicts[wrong[0]].note}" if wrong else ""
        row[mode] = Verdict(all(v.value for v in verdicts.values()), all(v.gradient for v in verdicts.values()), notes)
    return name, row


def untouched(name: str, modes: tuple[str, ...], backend: str) -> tuple[str, Row]:
    """Whether an innocent stays bit-identical in each mode that has a guard, with no swap where it is to be quiet."""
    torch.set_num_threads(1)
    entry = INNOCENTS[name]
    row = {}
    for mode in modes:
        compiled = "compile" in mode
        if not mode.startswith("nanguard") or (compiled and not entry.compilable):
            continue
        notes = [note for kind in entry.inputs if (note := changed(entry, kind, mode, backend))]
        row[mode] = Verdict(not notes, not notes, "; ".join(notes))
    return name, row


def changed(entry: Innocent, kind: str, mode: str = "nanguard eager", backend: str = "aot_eager") -> str:
    """What the guard changes about an innocent; empty where nothing."""
    compiled = "compile" in mode
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if compiled:
            torch._dynamo.reset()
        plain, _ = way("torch.compile" if compiled else "torch eager", entry, backend)
        before = run(plain, *prepared(entry, kind))
        guarded, context = way(mode, entry, backend)
        guard = context()
        try:
            with guard as swaps:
                inputs, leaves = prepared(entry, kind)
                after = run(guarded, inputs, leaves)
        except Exception as error:
            return f"{kind}: {type(error).__name__}: {error}"
    note = differs(before, after)
    if swaps and entry.quiet:
        note = "; ".join(filter(None, (note, f"swapped by {sorted({swap.rule for swap in swaps})}")))
    return f"{kind}: {note}" if note else ""


def main() -> int:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(prog="python benchmarks/forms", description=__doc__)
    parser.add_argument("--failures", action="store_true", help="print only what `nanguard eager` gets wrong")
    parser.add_argument("--compiled", action="store_true", help="with --failures: of `nanguard compiled` instead")
    parser.add_argument("--defects", action="store_true", help="print what is wrong with the zoo itself")
    parser.add_argument("--backend", default="aot_eager", help="of torch.compile: inductor, aot_eager or eager")
    parser.add_argument("--family", default="", help="only families whose title holds this")
    parser.add_argument("--only", default="", help="only names that hold this")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--output", type=Path, help="a markdown file; else it is printed")
    asked = parser.parse_args()
    torch.set_num_threads(1)

    def chosen(table: Iterable[Form | Innocent]) -> list[str]:
        return [e.name for e in table if asked.family.lower() in e.family.lower() and asked.only in e.name]

    if asked.defects:
        entries = [form for table in (FORMS, TWINS) for form in table.values() if form.name in chosen(table.values())]
        lines = [f"{form.name}: {note}" for form in entries for note in defects(form)]
        lines += [f"{name}: {note}" for name in chosen(INNOCENTS.values()) for note in fails(INNOCENTS[name])]
        print("\n".join([*lines, f"{len(FORMS)} forms, {len(TWINS)} twins, {len(INNOCENTS)} innocents"]))
        return int(bool(lines))
    modes = ("nanguard compiled" if asked.compiled else "nanguard eager",) if asked.failures else MODES
    started = time.monotonic()
    of_forms = partial(judged, modes=modes, backend=asked.backend)
    of_innocents = partial(untouched, modes=modes, backend=asked.backend)
    names = [chosen(table.values()) for table in (FORMS, TWINS, INNOCENTS)]
    works = list(zip((of_forms, of_forms, of_innocents), names, strict=True))
    if asked.jobs > 1:
        with ProcessPoolExecutor(asked.jobs) as pool:
            results = [dict(pool.map(work, listed, chunksize=4)) for work, listed in works]
    else:
        results = [dict(map(work, listed)) for work, listed in works]
    if asked.failures:
        print("\n".join(failures(*results)))
        print(f"{time.monotonic() - started:.0f} s")
        return int(any(not verdict for rows in results for row in rows.values() for verdict in row.values()))
    text = markdown(*results, backend=asked.backend)
    if asked.output:
        asked.output.write_text(text, encoding="utf-8")
    else:
        print(text)
    return 0


def failures(forms: dict[str, Row], twins: dict[str, Row], innocents: dict[str, Row]) -> list[str]:
    """One line for each failure, and the totals."""
    lines = []
    for title, table, rows in (("form", FORMS, forms), ("twin", TWINS, twins), ("innocent", INNOCENTS, innocents)):
        wrong = {name: verdict for name, row in rows.items() for verdict in row.values() if not verdict}
        family = ""
        for name, verdict in wrong.items():
            if table[name].family != family:  # type: ignore[attr-defined]
                family = table[name].family  # type: ignore[attr-defined]
                lines.append(f"{title}s, {family}")
            lines.append(f"    {name}: {verdict.note}")
        judged_rows = sum(map(bool, rows.values()))
        lines.append(f"{title}s: {judged_rows - len(wrong)} of {judged_rows} right")
    return lines


def markdown(forms: dict[str, Row], twins: dict[str, Row], innocents: dict[str, Row], backend: str) -> str:
    """The whole table."""
    lines = [
        "# Forms",
        "",
        f"Made by `python benchmarks/forms` with torch {torch.__version__.partition('+')[0]}, backend `{backend}`. A form is",
        "right where it is right on every kind of input: mild, extreme, masked, saturated, half precision.",
        "First value, then gradient; empty where `torch.compile` itself cannot do it.",
        "",
        f"| of {len(forms)} unstable forms | value right | gradient right |",
        "| --- | --- | --- |",
    ]
    for mode in MODES:
        rows = [row[mode] for row in forms.values() if mode in row]
        counts = [sum(v.value for v in rows), sum(v.gradient for v in rows)]
        lines.append(f"| {mode} | {' | '.join(f'{count} of {len(rows)}' for count in counts)} |")
    lines += ["", "| | nanguard eager | nanguard compiled |", "| --- | --- | --- |"]
    for title, rows in (("twins that keep their meaning", twins), ("innocents that keep every bit", innocents)):
        counts = []
        for mode in MODES[2:]:
            found = [row[mode] for row in rows.values() if mode in row]
            counts.append(f"{sum(map(bool, found))} of {len(found)}")
        lines.append(f"| {title} | {' | '.join(counts)} |")
    grouped: dict[str, list[str]] = defaultdict(list)
    for name in forms:
        grouped[FORMS[name].family].append(name)
    for family, names in grouped.items():
        lines += ["", f"## {family}", "", f"| form | {' | '.join(MODES)} |", f"| --- {'| --- ' * len(MODES)}|"]
        for name in names:
            cells = [_cell(forms[name].get(mode)) for mode in MODES]
            shown = f"`{name.removesuffix('__drop')}`{', epsilon dropped' * name.endswith('__drop')}"
            lines.append(f"| {shown} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(verdict: Verdict | None) -> str:
    return "" if verdict is None else f"{'✓' if verdict.value else '✗'} {'✓' if verdict.gradient else '✗'}"


__all__ = ["changed", "judged", "main", "untouched"]
