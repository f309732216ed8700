"""What each function of torch means for what is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from nanguard.algebra import Spelling
from nanguard.stabilizer.resolve import law_table, misuse_table

__all__ = ["EDIT", "ESCAPE", "MEANINGS", "PASS", "PIN", "Function", "meaning_of"]

Function = Callable[..., Any]

# What a function means for what is known: nothing, an edit of its first argument, memory handed out, derivatives watched.
PASS, EDIT, ESCAPE, PIN = "pass", "edit", "escape", "pin"

_ESCAPES = frozenset(
    {
        "numpy",
        "__array__",
        "__cuda_array_interface__",
        "__dlpack__",
        "_typed_storage",
        "data_ptr",
        "set_",
        "share_memory_",
        "storage",
        "untyped_storage",
    }
)
_PINS = frozenset({"grad_fn", "register_hook", "register_post_accumulate_grad_hook", "retain_grad"})
_EDIT_SLOTS = frozenset({"__delitem__", "__set__", "__setitem__"})

MEANINGS: dict[Function, Any] = {}


def meaning_of(function: Function) -> Any:
    """What a function means, as one of the words above or as the law that knows it."""
    found: Any = law_table().get(function)
    misuse = misuse_table().get(function)
    if found is not None and misuse is not None:
        found = (replace(found[0], advice=misuse[0].advice), found[1])
    found = found or misuse
    if found is None:
        name = getattr(function, "__name__", "").partition(".")[0]
        owner = getattr(getattr(function, "__self__", None), "__name__", "") if name in ("__get__", "__set__") else name
        if name in _ESCAPES or (name == "__get__" and owner in _ESCAPES):
            found = ESCAPE
        elif name in _PINS or (name == "__get__" and owner in _PINS):
            found = PIN
        else:
            written = name in _EDIT_SLOTS and owner != "grad"
            in_place = name.endswith("_") and not name.endswith("__")
            found = EDIT if in_place or written or Spelling(name, ()).in_place else PASS
    # Only what torch itself defines is remembered: functions of users may come and go.
    if type(function).__name__ != "function" or getattr(function, "__module__", "").startswith("torch"):
        MEANINGS[function] = found
    return found
