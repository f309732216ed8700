"""What the manifest of a capture must look like, so that its readers need not doubt it. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanguard.errors import CaptureError
from nanguard.incident import Incident

__all__ = ["check_manifest"]

Check = Callable[[Any], bool]


def check_manifest(file: Path, manifest: dict[str, Any]) -> None:
    """Raises `CaptureError`, which names the file, the entry and what is expected, where an entry is missing or wrong."""
    for prefix, expected in _SECTIONS.items():
        section = manifest if not prefix else manifest.get(prefix)
        if section is None and prefix == "optimizers":
            continue
        for key, (what, check) in expected.items():
            _check_entry(file, f"{prefix}.{key}" if prefix else key, section, key, what, check)
    for key, (what, check) in _LATER.items():
        if key in manifest["step"]:
            _check_entry(file, f"step.{key}", manifest["step"], key, what, check)
    try:
        Incident.from_dict(manifest["incident"]).render()
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
        raise CaptureError(f"{file}: entry 'incident' is damaged: {error}; copy the capture again") from None


def _check_entry(file: Path, name: str, section: Any, key: str, what: str, check: Check) -> None:
    if not isinstance(section, dict) or key not in section:
        raise CaptureError(f"{file}: entry {name!r} is missing; the file is damaged, copy the capture again")
    if not check(section[key]):
        shown = repr(section[key])
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise CaptureError(
            f"{file}: entry {name!r}: found {shown}; expected {what}; the file is damaged, copy the capture again"
        )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(entry, str) for entry in value.values())


def _is_named(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) for entry in value
    )


def _is_named_twice(value: Any) -> bool:
    return _is_named(value) and all(_is_named(entry) for _, entry in value)


def _is_number_text(value: Any) -> bool:
    try:
        return isinstance(value, str) and float(value) is not None
    except ValueError:
        return False


def _is_scale(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and 0 < value < 2**63


def _is_stabilize(value: Any) -> bool:
    choices = {"epsilon": ("keep", "drop"), "saturated": ("report", "repair")}
    return (
        isinstance(value, dict)
        and isinstance(value.get("enabled"), bool)
        and all(value.get(name, allowed[0]) in allowed for name, allowed in choices.items())
    )


def _is_watch(value: Any) -> bool:
    if not isinstance(value, dict) or value.get("infinities") not in ("none", "positive", "all"):
        return False
    modules = value.get("modules")
    return isinstance(modules, list) and all(isinstance(pattern, str) for pattern in modules)


def _is_missing(value: Any) -> bool:
    keys = ("path", "type", "reason")
    return isinstance(value, list) and all(
        isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in keys) for entry in value
    )


def _or_null(check: Check) -> Check:
    return lambda value: value is None or check(value)


_COUNT = ("a number that is not negative", _is_count)
_OBJECT = ("an object", _is_object)
_NAMED = ("a list of names and values", _is_named)

# Entries of the section "step" that only some captures have.
_LATER: dict[str, tuple[str, Check]] = {
    "function": ("'training_step' or 'validation_step'", lambda value: value in ("training_step", "validation_step")),
    "watch": ("an object with modules and infinities", _is_watch),
}
_SECTIONS: dict[str, dict[str, tuple[str, Check]]] = {
    "": {
        "incident": _OBJECT,
        "step": _OBJECT,
        "versions": ("an object of texts", _is_texts),
        "machine": ("an object of texts", _is_texts),
        "settings": _OBJECT,
        "args": _OBJECT,
        "kwargs": _OBJECT,
        "rng": _OBJECT,
        "module": _OBJECT,
        "missing": ("a list of paths, types and reasons", _is_missing),
        "files": (
            "names and sizes of files",
            lambda value: isinstance(value, dict) and all(_is_count(size) for size in value.values()),
        ),
    },
    "step": {
        **dict.fromkeys(("step", "epoch", "batch_idx", "dataloader_idx", "rank"), _COUNT),
        "accumulate": ("a number above 0", lambda value: _is_count(value) and value > 0),
        "scale": ("a finite number above 0", _is_scale),
        "loss": ("a number in quotes, or null", _or_null(_is_number_text)),
        "precision": ("an object of texts, or null", _or_null(_is_texts)),
        "stabilize": ("an object with enabled, epsilon and saturated", _is_stabilize),
        "trainer": _NAMED,
    },
    "args": {"items": ("a list", _is_list)},
    "kwargs": {"items": _NAMED},
    "module": {
        "class": ("a text", _is_text),
        "device": ("a text", _is_text),
        "training": (
            "an object of true and false",
            lambda value: isinstance(value, dict) and all(isinstance(flag, bool) for flag in value.values()),
        ),
        "attributes": ("a list of submodules and attributes", _is_named_twice),
        "initial": ("a list of submodules and attributes, or null", _or_null(_is_named_twice)),
        "hparams": ("a list of names and values, or null", _or_null(_is_named)),
        "state": ("a list of names and values, or null", _or_null(_is_named)),
        "transient": (
            "a list of texts",
            lambda value: isinstance(value, list) and all(isinstance(e, str) for e in value),
        ),
        "extra": _NAMED,
    },
    "optimizers": {"whole": ("true or false", lambda value: isinstance(value, bool)), "states": _OBJECT},
}
