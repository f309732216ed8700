"""What is taken out of the exponents of numbers that are added: the largest of those that count.

A number is a factor, or `None` for 1, times the exponential of an exponent. Where its factor is 0, an exponent does not count:
to compare others to it would cost them their digits. A derivative at the factor needs it all the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from nanguard.stabilizer import environment

__all__ = ["Number", "hidden_in", "is_differentiated", "kept", "larger", "largest", "may_be_zero", "over", "vanishing"]

# The exponent and the factor.
Number: TypeAlias = "tuple[Tensor, Tensor | None]"


def largest(number: Number, dims: tuple[int, ...], hidden: Tensor | None) -> Tensor:
    """What is taken out of all along `dims`, which stay."""
    most, behind = _visible(number, hidden).amax(dims, keepdim=True), _invisible(number, hidden)
    return most if behind is None else _reaching(most, behind.amax(dims, keepdim=True))


def larger(one: Number, other: Number, hidden: Sequence[Tensor | None]) -> Tensor:
    """What is taken out of both, element by element."""
    pairs = list(zip((one, other), hidden, strict=True))
    most = torch.maximum(*(_visible(*pair) for pair in pairs))
    behind = [log for log in (_invisible(*pair) for pair in pairs) if log is not None]
    return _reaching(most, functools.reduce(torch.maximum, behind)) if behind else most


def over(number: Number, most: Tensor, hidden: Tensor | None) -> Tensor:
    """The number after that was taken out; where its factor is 0, the exponential stays finite."""
    log, factor = number
    shift = most.masked_fill(most.isinf(), 0.0)
    if factor is None:
        return torch.exp(log - shift)
    if hidden is None:
        return torch.exp(log - shift) * factor
    if not is_differentiated(factor):
        return torch.exp(log.masked_fill(hidden, -math.inf) - shift) * factor
    gap = log - shift
    return torch.exp(torch.where(hidden, gap.clamp(max=_reach(gap.dtype)), gap)) * factor


def vanishing(number: Number, most: Tensor, dim: int, hidden: Tensor | None) -> Tensor:
    """Where all up to there along `dim` vanishes after that was taken out, or nearly."""
    return _visible(number, hidden).cummax(dim).values < most - 0.7 * _reach(most.dtype)


def kept(most: Tensor) -> Tensor:
    """What was taken out, as an exponent: that of an empty sum stays -inf, so that nothing is compared to it later."""
    return most.masked_fill(most == math.inf, 0.0)


def is_differentiated(factor: Tensor) -> bool:
    """Whether a derivative may be asked for at a factor: it is there even where the factor is 0."""
    return factor.requires_grad or environment.in_transform()


def hidden_in(number: Number) -> Tensor | None:
    """Where an exponent does not count because the factor is 0; but of what is no number, 0 times is none either."""
    log, factor = number
    if factor is None or not may_be_zero(factor):
        return None
    hidden = factor.detach() == 0
    return hidden & (log.detach() < math.inf) if is_differentiated(factor) else hidden


def may_be_zero(factor: Tensor) -> bool:
    """Whether some of it are 0, where that can be asked."""
    if not environment.may_look(factor.device):
        return True
    return not factor.detach().all().item()


def _visible(number: Number, hidden: Tensor | None) -> Tensor:
    """The exponents that count, and -inf elsewhere."""
    log = number[0].detach()
    return log if hidden is None else log.masked_fill(hidden, -math.inf)


def _invisible(number: Number, hidden: Tensor | None) -> Tensor | None:
    """The exponents that only derivatives at their factors need, and -inf elsewhere; `None` if there are no such factors."""
    log, factor = number
    if factor is None or hidden is None or not is_differentiated(factor):
        return None
    return log.detach().masked_fill(~hidden, -math.inf)


def _reaching(most: Tensor, hidden: Tensor) -> Tensor:
    """The largest exponent that counts, or a larger one, for the sake of derivatives at factors that are 0.

    These may be beyond the range of floats, seen from the largest that counts; but that one must not vanish either. Where
    none counts, the largest that does not is taken out, but no more than leaves the derivatives at the others.
    """
    reach = _reach(most.dtype)
    wanted = torch.minimum(hidden - reach, most + 0.85 * reach)
    return torch.where(most == -math.inf, hidden.clamp(max=reach / 2), torch.maximum(most, wanted))


def _reach(dtype: torch.dtype) -> float:
    """An exponent whose exponential is finite, with something to spare."""
    return math.log(torch.finfo(dtype).max) - 1.0
