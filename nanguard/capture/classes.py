"""Classes by name. A capture names classes; only those that the program has imported itself are ever looked at."""

from __future__ import annotations

import dataclasses
import enum
import os
import sys
from collections import OrderedDict, UserDict, defaultdict
from typing import Any

from nanguard.errors import CaptureError

__all__ = ["base_of", "kind_of", "reference", "resolve"]


def kind_of(cls: type) -> str | None:
    """What is needed to rebuild an instance without calling anything of its class, or `None` where that is impossible.

    ``namedtuple``, ``mapping`` (a dictionary), ``userdict``, ``dataclass`` or ``enum``.
    """
    if issubclass(cls, enum.Enum):
        return "enum"
    if hasattr(cls, "__del__"):  # it would run on values that the class never checked
        return None
    if issubclass(cls, tuple):
        fields = getattr(cls, "_fields", None)
        return "namedtuple" if isinstance(fields, tuple) and all(isinstance(field, str) for field in fields) else None
    if issubclass(cls, dict):
        return "mapping"
    if issubclass(cls, UserDict):
        return "userdict"
    if dataclasses.is_dataclass(cls) and cls.__new__ is object.__new__:
        return "dataclass"
    return None


def base_of(cls: type) -> Any:
    """The built-in dictionary that a dictionary class derives from: its methods are the ones that are safe to call."""
    return next(base for base in (OrderedDict, defaultdict, dict) if issubclass(cls, base))


def reference(cls: type) -> dict[str, Any] | None:
    """The JSON name of a class, or `None` where it cannot be found by name (a class inside a function)."""
    name = f"{cls.__module__}:{cls.__qualname__}"
    if _find(sys.modules.get(cls.__module__), cls.__qualname__) is not cls:
        return None
    found: dict[str, Any] = {"class": name}
    if cls.__module__ == "__main__":
        script = getattr(sys.modules["__main__"], "__file__", None)
        found["script"] = os.path.realpath(script) if script else None
    return found


def resolve(node: dict[str, Any], kind: str) -> Any:
    """The class that `reference` named.

    Raises:
        CaptureError: where its module is not imported, or where it is not a class of that kind.
    """
    name = str(node["class"])
    module, _, qualname = name.partition(":")
    candidates = [sys.modules.get(module)]
    if module == "__main__" and isinstance(node.get("script"), str):
        # What was the script then may be an imported module now.
        candidates += [entry for entry in list(sys.modules.values()) if _file(entry) == node["script"]]
    cls = next((found for entry in candidates if isinstance(found := _find(entry, qualname), type)), None)
    if cls is None:
        where = node.get("script") if module == "__main__" and node.get("script") else f"module {module!r}"
        raise CaptureError(
            f"the capture holds a {name!r}, which is not imported; import {where} before reading the batch"
        )
    if kind_of(cls) != kind:
        raise CaptureError(
            f"the capture says that {name!r} is a {kind}, and here it is not; import the code that wrote it"
        )
    return cls


def _find(module: Any, qualname: str) -> Any:
    found = module
    for part in qualname.split("."):
        # Looking into __dict__ runs no module's __getattr__ and no descriptor.
        found = getattr(found, "__dict__", {}).get(part)
    return found


def _file(module: Any) -> str | None:
    file = getattr(module, "__dict__", {}).get("__file__")
    return os.path.realpath(file) if isinstance(file, str) else None
