"""The steps before a failure: the record, and the rule that tells a spike from a bolt out of the blue. Free of torch.

The rule, for the loss and the gradient norm alike:

1. The values before the failing step are looked at; steps that were left out, and non-finite values, do not count.
2. The *climb* is the longest run of strictly increasing values that ends with the last of them. What came before the climb (at
most 100 values) is the *usual*: its median, and its spread, which is 1.4826 times the median absolute deviation but at least
a tenth of the median. Where nothing came before the climb, its first value is the usual.
3. A value more than five spreads above the median is *unusual*. A climb of two or more increases to an unusual value is
`growth`; without one, a last value that is unusual against all before it is a `jump`; otherwise the column was `usual`.
4. The step is told by the worse column: growth, then a jump; where both were usual it was a bolt out of the blue. 5. Nothing is
told of a column of which fewer than five earlier values are known, nor of one that is back to the usual in the failing step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from statistics import median
from typing import Any, Literal, final

__all__ = ["LeadUp", "Trend", "trend_of"]

_MOST = 100  # values that make up the usual
_SHOWN = 4  # values of a column in the summary
_FEW = 5  # earlier values without which nothing can be said of growth or a jump


@final
@dataclass(frozen=True)
class Trend:
    """How a column came to its last value before the failing step.

    Attributes:
        kind: ``growth``, ``jump``, ``usual``, or ``unknown`` where there is no value to judge by.
        steps: increases in a row up to the last value; 0 unless it is growth.
        median: of the usual values; NaN where it is unknown.
        last: the last value before the failing step; NaN where it is unknown.
    """

    kind: Literal["growth", "jump", "usual", "unknown"]
    steps: int = 0
    median: float = math.nan
    last: float = math.nan


def trend_of(values: Sequence[float]) -> Trend:
    """Judges finite values in the order of their steps, the last one being that of the step before the failure."""
    if not values:
        return Trend("unknown")
    last, climb = values[-1], _climb(values)
    usual = _before(values, climb)
    if climb >= 2 and _unusual(last, usual):
        return Trend("growth", climb, _center(usual), last)
    usual = _before(values, 0)
    return Trend("jump" if _unusual(last, usual) else "usual", 0, _center(usual), last)


def _climb(values: Sequence[float]) -> int:
    """How many increases in a row end with the last value."""
    start = len(values) - 1
    while start and values[start - 1] < values[start]:
        start -= 1
    return len(values) - 1 - start


def _before(values: Sequence[float], climb: int) -> Sequence[float]:
    """The values before a climb of so many increases, or before the last value where that was none."""
    return values[: -1 - climb] or values[:1]


def _center(usual: Sequence[float]) -> float:
    return median(usual[-_MOST:])


def _unusual(value: float, usual: Sequence[float]) -> bool:
    center = _center(usual)
    deviation = median(abs(entry - center) for entry in usual[-_MOST:])
    return value > center + 5 * max(1.4826 * deviation, 0.1 * abs(center))


@final
@dataclass(frozen=True, eq=False)
class LeadUp:
    """The last steps (at most 500) up to the failing one, which is the last: a tuple per column, an entry per optimizer step.

    Two of them are equal if all numbers are, and here NaN equals NaN.

    Attributes:
        steps: optimizer steps that had been taken when the step began.
        loss: of the whole window, without the loss scale; `None` where no loss was seen.
        gradient_norm: L2 norm of the gradients, before clipping and without the loss scale; `None` where there were none.
        parameter_norm: L2 norm of the parameters before the step, taken in every 50th step and in the failing one; `None` in
            between.
        learning_rates: the distinct learning rates of the optimizers' groups, in order.
        loss_scale: of the GradScaler; `None` without one.
        skipped: whether the step was left out, by the policy or by the GradScaler.
    """

    steps: tuple[int, ...] = ()
    loss: tuple[float | None, ...] = ()
    gradient_norm: tuple[float | None, ...] = ()
    parameter_norm: tuple[float | None, ...] = ()
    learning_rates: tuple[tuple[float, ...], ...] = ()
    loss_scale: tuple[float | None, ...] = ()
    skipped: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        lengths = {entry.name: len(getattr(self, entry.name)) for entry in fields(self)}
        if len(set(lengths.values())) > 1:
            shown = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise ValueError(f"LeadUp: found columns of unequal lengths ({shown}); expected one entry per step in each")

    def __len__(self) -> int:
        return len(self.steps)

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LeadUp) and self._text() == other._text()

    def __hash__(self) -> int:
        return hash(self._text())

    def _text(self) -> str:
        return repr([getattr(self, entry.name) for entry in fields(self)])

    def trend(self, column: Literal["loss", "gradient_norm"]) -> Trend:
        """How the column came to its last value before the failing step, by the rule above."""
        return trend_of(self._earlier(column))

    def summary(self) -> str:
        """The lead-up in a line, such as ``loss 2.31 -> nan, gradient norm 1.1 -> 48 -> 9.7e+12: it grew for 2 steps``."""
        if len(self) < 2:
            return "none: it was the first step that was seen"
        if self._was_failing():
            return "the step before was non-finite already, and was not left out"
        trends = {"loss": self.trend("loss"), "gradient norm": self.trend("gradient_norm")}
        unusual = [name for name, trend in trends.items() if trend.kind in ("growth", "jump")]
        longer = [name for name in unusual if len(self._earlier(_COLUMNS[name])) >= _FEW]
        for kind in ("growth", "jump"):
            told = [name for name in longer if trends[name].kind == kind and not self._is_back(_COLUMNS[name])]
            if told:
                return f"{self._shown()}: {_told(told, trends)}"
        if unusual:
            back = ", ".join(f"the {name} is back to the usual ({trends[name].median:.3g})" for name in longer)
            return f"{self._shown()}: {back or 'too few steps to judge by'}"
        known = {name: trend for name, trend in trends.items() if trend.kind == "usual"}
        if not known:
            return "unknown: no step before it had a finite loss or gradient norm"
        medians = ", ".join(f"{trend.median:.3g}" for trend in known.values())
        verb = "were" if len(known) > 1 else "was"
        return f"a bolt out of the blue: {' and '.join(known)} {verb} as usual (median {medians}) up to the step before"

    def _earlier(self, column: str) -> list[float]:
        """The values before the failing step that count."""
        pairs = zip(self._column(column)[:-1], self.skipped[:-1], strict=True)
        return [value for value, skipped in pairs if value is not None and _counts(value, skipped)]

    def _is_back(self, column: str) -> bool:
        """Whether the failing step itself has a value as usual."""
        present, values = self._column(column)[-1], self._earlier(column)
        if present is None or not math.isfinite(present):
            return False
        growth = trend_of(values).kind == "growth"
        return not _unusual(present, _before(values, _climb(values) if growth else 0))

    def _column(self, name: str) -> tuple[float | None, ...]:
        found: tuple[float | None, ...] = getattr(self, name)
        return found

    def _was_failing(self) -> bool:
        values = (self.loss[-2], self.gradient_norm[-2])
        return not self.skipped[-2] and any(value is not None and not math.isfinite(value) for value in values)

    def _shown(self) -> str:
        parts = []
        for name, column in (("loss", self.loss), ("gradient norm", self.gradient_norm)):
            values = [f"{value:.3g}" for value in column[-_SHOWN:] if value is not None]
            if values:
                parts.append(f"{name} {' -> '.join(values)}")
        return f"{'; '.join(parts)} over {min(_SHOWN, len(self))} steps"

    @classmethod
    def from_dict(cls, data: Any) -> LeadUp:
        """The inverse of `dataclasses.asdict` after JSON. Raises `ValueError` where a column is missing, unknown or damaged."""
        names = [entry.name for entry in fields(cls)]
        if not isinstance(data, dict) or set(data) != set(names):
            raise ValueError(f"LeadUp: found {_keys(data)}; expected the columns {', '.join(names)}")
        try:
            return cls(
                steps=tuple(int(value) for value in data["steps"]),
                learning_rates=tuple(tuple(float(rate) for rate in rates) for rates in data["learning_rates"]),
                skipped=tuple(bool(value) for value in data["skipped"]),
                **{
                    name: tuple(None if value is None else float(value) for value in data[name])
                    for name in ("loss", "gradient_norm", "parameter_norm", "loss_scale")
                },
            )
        except TypeError as error:
            raise ValueError(f"LeadUp: {error}; expected a list of numbers in each column") from None


_COLUMNS = {"loss": "loss", "gradient norm": "gradient_norm"}


def _counts(value: float, skipped: bool) -> bool:
    return not skipped and math.isfinite(value)


def _told(names: list[str], trends: dict[str, Trend]) -> str:
    parts = []
    for name in names:
        trend = trends[name]
        if trend.kind == "growth":
            parts.append(f"the {name} grew for {trend.steps} steps (usual {trend.median:.3g})")
        else:
            parts.append(f"the {name} jumped to {trend.last:.3g} in the step before (usual {trend.median:.3g})")
    return ", ".join(parts)


def _keys(data: Any) -> str:
    return ", ".join(map(str, data)) if isinstance(data, dict) else type(data).__name__
