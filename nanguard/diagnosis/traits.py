"""Which functions leave a mark on what is made of them, and how arithmetic carries it on. Data, as far as it goes.

A trait is a name with a text for the advice, mostly empty. ``lost`` tells of a number that the dtype does not hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

__all__ = ["TRAITS", "begins", "carried_on"]

Traits = Mapping[str, str]


def _names(text: str) -> frozenset[str]:
    return frozenset(f"aten.{name}" for name in text.split())


_BEGINNINGS = {
    "exponential": _names("exp exp2"),
    "softmax": _names("_softmax _safe_softmax softmax"),
    "sigmoid": _names("sigmoid"),
    "tanh": _names("tanh"),
}
_BEGINNING = {name: trait for trait, names in _BEGINNINGS.items() for name in names}
TRAITS = frozenset(
    [
        *_BEGINNINGS,
        "exponentials",
        "shifted exponential",
        "squared tanh",
        "one minus squared tanh",
        "lost",
        "masked row",
    ]
)
_TOTALS = _names("sum mean cumsum mm bmm addmm baddbmm")
_CONTRACTIONS = _names("mm bmm addmm baddbmm")
_SHIFTS = _names("add sub rsub")
# What makes of a probability or of a sum of exponentials another one, or at least something that is 0 where it is.
_ARITHMETIC = (
    _TOTALS
    | _names(
        "add sub rsub mul div neg pow sqrt rsqrt reciprocal abs prod cumprod clamp clamp_min clamp_max maximum minimum"
    )
    | _names(
        "amax amin max min where masked_fill index index_select gather take stack cat flip roll repeat expand sort topk"
    )
    | _names("clone _to_copy copy contiguous _unsafe_view _reshape_copy masked_select lerp addcmul")
)
# Where a number is an epsilon, or a bound.
_BOUNDING = _names("add sub rsub mul clamp clamp_min clamp_max")


def carried_on(kernel: str, given: Sequence[Traits | float]) -> Traits:
    """The traits of a result, of those of what the operation was given; numbers stand for themselves."""
    if kernel not in _ARITHMETIC:
        return {}
    parts = [entry for entry in given if not isinstance(entry, float)]
    found = {name: text for part in parts for name, text in part.items()}
    if kernel in _CONTRACTIONS:  # of features and weights no probability is left
        found = {name: text for name, text in found.items() if all(name in part for part in parts)}
    _add_up(kernel, parts, found)
    if "tanh" in found and _squares(kernel, parts, given):
        found["squared tanh"] = found.pop("tanh")
    elif "squared tanh" in found and kernel in _SHIFTS:
        found["one minus squared tanh"] = found.pop("squared tanh")
    return found


def begins(kernel: str, numbers: Sequence[float], tensor: Tensor) -> Traits:
    """The traits that begin at an operation.

    Args:
        kernel: the dispatcher's name.
        numbers: those that it was given.
        tensor: the first tensor that it was given.
    """
    if kernel in _BEGINNING:
        return {_BEGINNING[kernel]: ""}
    if kernel in _BOUNDING and tensor.is_floating_point():
        # A factor of 0 is not without effect.
        bounds = [number for number in numbers if kernel != "aten.mul" or abs(number) > 0.5]
        lost = next(filter(None, (_lost(number, tensor.dtype) for number in bounds)), None)
        if lost is not None:
            return {"lost": lost}
    return {}


def _add_up(kernel: str, parts: list[Traits], found: dict[str, str]) -> None:
    """A sum of exponentials is another matter than one of them, and so is a part of that sum."""
    several = sum("exponential" in part or "exponentials" in part for part in parts) > 1
    if "exponential" not in found:
        return
    if kernel in _TOTALS or (several and kernel in ("aten.add", "aten.sub", "aten.div")):
        del found["exponential"]
        found["exponentials"] = ""
    elif kernel in _SHIFTS:
        del found["exponential"]
        found["shifted exponential"] = ""


def _squares(kernel: str, parts: list[Traits], given: Sequence[Traits | float]) -> bool:
    if kernel == "aten.mul":
        return sum("tanh" in part for part in parts) > 1
    return kernel == "aten.pow" and list(given[1:]) == [2.0]


@cache
def _lost(number: float, dtype: torch.dtype) -> str | None:
    """That a number close to 0 or 1 is 0 or 1 in this dtype, with what the dtype holds instead; `None` where it is not."""
    nearest = torch.tensor(number, dtype=dtype).item() if abs(number) < 2 else number
    if number == nearest or nearest not in (0, 1, -1):
        return None
    name, limits = str(dtype).removeprefix("torch."), torch.finfo(dtype)
    if nearest == 0:
        return f"{number:.10g} rounds to 0 in {name}, where a useful number is at least {limits.smallest_normal:.2g}"
    return f"{number:.10g} rounds to {nearest:g} in {name}, where numbers next to 1 are {limits.eps / 2:.2g} apart"
