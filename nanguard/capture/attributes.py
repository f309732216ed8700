"""Plain attributes of modules, such as counters and temperatures: a step reads them, and weights do not hold them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["SCALARS", "scalar_attributes"]

SCALARS = (int, float, bool, str, type(None))


def scalar_attributes(module: nn.Module) -> dict[str, dict[str, Any]]:
    """The public attributes of every submodule that are an int, float, bool, str or None.

    Returns:
        Qualified name of the submodule -> name of the attribute -> value; submodules without any are left out.
    """
    found = {name: only_scalars(part.__dict__) for name, part in module.named_modules()}
    return {name: values for name, values in found.items() if values}


def only_scalars(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `values` that a capture keeps as attributes."""
    return {
        name: value
        for name, value in values.items()
        if type(value) in SCALARS and not name.startswith("_") and name != "training"
    }
