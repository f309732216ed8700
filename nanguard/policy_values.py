"""Values of a policy whose types are stricter than pydantic's: a truth value is no number, and an empty text no folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, StrictInt

__all__ = ["Amount", "Count", "Folder", "Step", "Version"]


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(
            f"found {value!r}; expected a number (YAML reads the bare words on, off, yes and no as truth values)"
        )
    return value


def _no_empty_text(value: Any) -> Any:
    if value == "":
        raise ValueError(
            "found ''; expected the path of a folder, such as nanguard_captures, or . for the working directory"
        )
    return value


def _no_null(path: Path) -> Path:
    if "\0" in str(path):
        raise ValueError(f"found {str(path)!r}; expected the path of a folder, which holds no null character")
    return path


Count = Annotated[StrictInt, Field(ge=0)]
Step = Annotated[int, BeforeValidator(_no_truth_value)]
Amount = Annotated[float, BeforeValidator(_no_truth_value), Field(ge=0)]
Version = Annotated[Literal[1], BeforeValidator(_no_truth_value)]
Folder = Annotated[Path, BeforeValidator(_no_empty_text), AfterValidator(_no_null)]
