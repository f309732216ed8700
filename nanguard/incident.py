"""The records that everyone exchanges. Plain, frozen, JSON-serialisable, free of torch.

A swap is a computation that was replaced before it could fail, advice one that should be. An incident is a step that failed all
the same.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from nanguard.lead_up import LeadUp

__all__ = ["Action", "Advice", "Cause", "Incident", "Origin", "Phase", "Swap", "TensorStats", "Trigger", "Verdict"]

Trigger = Literal["loss", "gradients", "parameters", "inputs", "activations", "scaler"]
Phase = Literal["forward", "backward", "optimizer"]
Verdict = Literal["reproduced", "transient", "not_replayed"]
Action = Literal["raised", "skipped", "rolled_back", "stopped", "stabilized", "recorded"]
Cause = Literal[
    "bad_input",
    "log_of_zero",
    "division_by_zero",
    "overflow",
    "invalid_domain",
    "singular_gradient",
    "masked_branch",
    "fully_masked",
    "empty_reduction",
    "parameters",
    "transient",
    "unknown",
]


@dataclass
class Swap:
    """One place in the user's code where an unstable computation was replaced.

    On a CPU, numbers that have all their digits as they are written are kept; the place is listed all the same, because other
    numbers will not have them.

    Attributes:
        rule: code of the rule, such as ``NG101``; ``nanguard rule NG101`` explains it.
        file: the user's source file (never torch's or nanguard's own).
        line: 1-based line in `file`.
        original: the source of that line, or of the expression in it.
        replacement: the stable line to write instead.
        count: how often the place was met.
    """

    rule: str
    file: str
    line: int
    original: str
    replacement: str
    count: int = field(default=1, compare=False)

    def __str__(self) -> str:
        times = "" if self.count == 1 else f" ({self.count} times)"
        return f"{self.file}:{self.line}: {self.rule} {self.original} -> {self.replacement}{times}"


@dataclass
class Advice:
    """One place in the user's code that was left as it is, but should be written otherwise.

    Attributes:
        rule, file, line, original: as those of a `Swap`.
        advice: what to write instead and why, in a sentence or two.
        count: how often the place was met.
    """

    rule: str
    file: str
    line: int
    original: str
    advice: str
    count: int = field(default=1, compare=False)

    def __str__(self) -> str:
        times = "" if self.count == 1 else f" ({self.count} times)"
        return f"{self.file}:{self.line}: {self.rule} {self.original}: {self.advice}{times}"


@dataclass(frozen=True)
class TensorStats:
    """What a tensor looked like: the shape, the dtype, the range of its finite elements and counts of the others."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    min: float | None = None
    max: float | None = None
    nan: int = 0
    posinf: int = 0
    neginf: int = 0
    zeros: int = 0

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape)) or "scalar"
        text = f"{self.name}: {self.dtype} {shape}"
        if self.min is not None and self.max is not None:
            text += f" in [{self.min:.4g}, {self.max:.4g}]"
        counts = (("NaN", self.nan), ("+inf", self.posinf), ("-inf", self.neginf), ("zero", self.zeros))
        return ", ".join([text, *(f"{count} {label}" for label, count in counts if count)])


@dataclass(frozen=True)
class Origin:
    """The operation that turned finite inputs into the non-finite value that did the damage.

    Attributes:
        op: the dispatcher's name without overload (``aten.log``), or the class name of a custom `autograd.Function`.
        phase: where it failed; for ``backward`` the other fields are those of the forward operation.
        module: qualified name of the module, ``""`` for the root.
        file, line, code: deepest frame of the user's code.
        operands: statistics of its inputs.
        tensor: for bad inputs and parameters the name of the bad value, such as ``batch["image"]`` or
            ``encoder.weight``.
    """

    op: str | None = None
    phase: Phase | None = None
    module: str | None = None
    file: str | None = None
    line: int | None = None
    code: str | None = None
    operands: tuple[TensorStats, ...] = ()
    tensor: str | None = None


@dataclass(frozen=True)
class Incident:
    """One training step that became non-finite: when, where, why, which samples, and what was done about it.

    Attributes:
        step: optimizer steps that had been taken when the batch began (Lightning's ``global_step``).
        epoch, batch_idx, rank: when and where it began, not where it was noticed.
        trigger: what noticed it.
        origin: the operation at fault, as far as it is known.
        cause: the kind of failure.
        samples: positions in the batch of the samples at fault, or `None` where any batch would have failed.
        dataset_indices: the same samples as indices into the dataset, or `None` where there are none.
        verdict: whether a second run of the step failed too.
        advice: what to do, in a sentence or two.
        action: what the policy did.
        capture: path of the captured batch, or `None`.
        replay: the exact command that replays the capture, or `None`.
        detail: figures worth reading, such as ``loss=nan``.
        lead_up: the steps before it, or `None` where they were not followed.
        activations: what the outputs of the watched modules looked like in that step, in forward order.
    """

    step: int
    epoch: int
    batch_idx: int
    rank: int = 0
    trigger: Trigger = "gradients"
    origin: Origin | None = None
    cause: Cause = "unknown"
    samples: tuple[int, ...] | None = None
    dataset_indices: tuple[int, ...] | None = None
    verdict: Verdict = "not_replayed"
    advice: str = ""
    action: Action = "recorded"
    capture: str | None = None
    replay: str | None = None
    detail: str = ""
    lead_up: LeadUp | None = field(default=None, repr=False)
    activations: tuple[TensorStats, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        return self.render()

    def render(self) -> str:
        """The incident in a few plain lines; the last one is the replay command where there is a capture."""
        return "\n".join(_lines(self))

    def to_dict(self) -> dict[str, Any]:
        """Only JSON types: tuples become lists, non-finite floats the strings ``"nan"``, ``"inf"`` and ``"-inf"``."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain

    def to_json(self, **options: Any) -> str:
        """`to_dict` as strict JSON; `options` are those of `json.dumps`."""
        return json.dumps(self.to_dict(), allow_nan=False, **options)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Incident:
        """The inverse of `to_dict`. Raises `ValueError` where a field is missing, unknown or of another type."""
        origin = data.get("origin")
        values = {**data, "samples": _integers(data, "samples"), "dataset_indices": _integers(data, "dataset_indices")}
        if origin is not None:
            stats = tuple(_build(TensorStats, _numbers(entry)) for entry in origin.get("operands", ()))
            values["origin"] = _build(Origin, {**origin, "operands": stats})
        if data.get("lead_up") is not None:
            values["lead_up"] = LeadUp.from_dict(data["lead_up"])
        values["activations"] = tuple(_build(TensorStats, _numbers(entry)) for entry in data.get("activations", ()))
        incident: Incident = _build(cls, values)
        return incident

    @classmethod
    def from_json(cls, text: str) -> Incident:
        """The inverse of `to_json`."""
        return cls.from_dict(json.loads(text))


_NOTICED = {
    "loss": "the loss",
    "gradients": "a gradient",
    "parameters": "parameters or running statistics",
    "activations": "an activation of a watched module",
    "scaler": "scaled gradients, again and again,",
}


def _lines(incident: Incident) -> list[str]:
    where = f"step {incident.step}, epoch {incident.epoch}, batch {incident.batch_idx}"
    if incident.rank:
        where += f", rank {incident.rank}"
    lines = [f"non-finite values in {_NOTICED.get(incident.trigger, incident.trigger)} at {where} ({incident.action})"]
    rows = [
        ("found", incident.detail),
        ("lead-up", incident.lead_up.summary() if incident.lead_up is not None else None),
        ("origin", _origin_line(incident.origin)),
        ("code", incident.origin.code if incident.origin else None),
        *(("operand", str(stats)) for stats in (incident.origin.operands if incident.origin else ())),
        ("cause", None if incident.cause == "unknown" else incident.cause.replace("_", " ")),
        ("samples", _samples_line(incident)),
        ("verdict", None if incident.verdict == "not_replayed" else incident.verdict),
        ("advice", incident.advice),
        ("capture", incident.capture),
        ("replay", "with the command on the next line" if incident.replay else None),
    ]
    lines += [f"  {name:<8} {_printable(str(value))}" for name, value in rows if value]
    # Alone on its line, so that it can be copied, and found by a program.
    return [*lines, _printable(incident.replay)] if incident.replay else lines


def _printable(text: str) -> str:
    """Without control characters: a capture from elsewhere must not steer the terminal."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def _origin_line(origin: Origin | None) -> str | None:
    if origin is None:
        return None
    parts = [origin.op or origin.tensor or "unknown operation"]
    if origin.op and origin.tensor:
        parts.append(f"used {origin.tensor}")
    if origin.phase:
        parts.append(f"in the {origin.phase}" if origin.phase != "optimizer" else "in the optimizer")
    if origin.module is not None:
        parts.append(f"of `{origin.module}`" if origin.module else "of the root module")
    if origin.file:
        parts.append(f"({origin.file}:{origin.line})")
    return " ".join(parts)


def _samples_line(incident: Incident) -> str | None:
    if incident.samples is None:
        return None
    text = f"{_listed(incident.samples)} of the batch"
    if incident.dataset_indices is not None:
        text += f" = {_listed(incident.dataset_indices)} of the dataset"
    return text


def _listed(numbers: tuple[int, ...], most: int = 12) -> str:
    shown = ", ".join(map(str, numbers[:most]))
    return shown if len(numbers) <= most else f"{shown}, ... ({len(numbers)} in all)"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _numbers(stats: dict[str, Any]) -> dict[str, Any]:
    found = {key: float(stats[key]) for key in ("min", "max") if stats.get(key) is not None}
    return {**stats, **found, "shape": tuple(stats.get("shape", ()))}


def _integers(data: dict[str, Any], key: str) -> tuple[int, ...] | None:
    value = data.get(key)
    return None if value is None else tuple(int(entry) for entry in value)


def _build(cls: type, values: dict[str, Any]) -> Any:
    known = {entry.name for entry in fields(cls)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{cls.__name__}: unknown field {unknown[0]!r}; expected some of {', '.join(sorted(known))}")
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{cls.__name__}: {error}") from None
