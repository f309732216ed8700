"""Advice for an origin, from the table."""

from __future__ import annotations

from collections.abc import Mapping

from nanguard.diagnosis.table import ADVICE
from nanguard.incident import Cause, Origin

__all__ = ["advice"]

_LONGEST = 60


def advice(
    cause: Cause, origin: Origin | None, notes: tuple[str, ...] = (), facts: Mapping[str, str] | None = None
) -> str:
    """One or two plain sentences: what to do; and what further runs have shown, a sentence for each.

    Args:
        cause: the kind of failure.
        origin: the operation.
        notes: what further runs have shown.
        facts: what is known of the value to blame, see `nanguard.diagnosis.facts`.
    """
    facts = facts or {}
    op = (origin.op if origin else None) or ""
    phase = origin.phase if origin else None
    text = next(
        (
            entry.text
            for entry in ADVICE
            if entry.cause == cause
            and (not entry.ops or op in entry.ops)
            and entry.phase in (None, phase)
            and (not entry.facts or any(fact in facts for fact in entry.facts))
        ),
        "",
    )
    return " ".join(filter(None, [text.format(**_fields(origin), **facts), *notes]))


def _fields(origin: Origin | None) -> dict[str, str]:
    stats = origin.operands if origin else ()
    counts = "non-finite values"
    if origin and origin.tensor and stats:
        nan, infinite = sum(s.nan for s in stats), sum(s.posinf + s.neginf for s in stats)
        kinds = ((nan, "NaN"), (infinite, "infinite value" if infinite == 1 else "infinite values"))
        counts = " and ".join(f"{number} {kind}" for number, kind in kinds if number) or counts
    code = (origin.code if origin else None) or (origin.op if origin else None) or "the step"
    extremes = [max(abs(s.min), abs(s.max)) for s in stats if s.min is not None and s.max is not None]
    op = ((origin.op if origin else None) or "the operation").removeprefix("aten.").lstrip("_")
    return {
        "tensor": (origin.tensor if origin else None) or "A value",
        "counts": counts,
        "largest": f"{max(extremes, default=float('nan')):.3g}",
        "dtype": stats[0].dtype if stats else "float",
        "op": op,
        "line": code if len(code) <= _LONGEST else f"{code[:_LONGEST]}...",
    }
