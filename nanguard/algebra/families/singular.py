"""Functions of which only the derivative fails: at the ends of their domain it is infinite."""

# A law is documented by the equation above it.
# ruff: noqa: D103

from __future__ import annotations

from nanguard.algebra.call import Call
from nanguard.algebra.registry import law
from nanguard.algebra.term import Term, Unrecognised


# 1 / sqrt(1 - x^2) is infinite at -1 and 1
@law(
    """
    torch.acos(input)
    torch.arccos(input)
    torch.asin(input)
    torch.arcsin(input)
    torch.Tensor.acos(input)
    torch.Tensor.arccos(input)
    torch.Tensor.asin(input)
    torch.Tensor.arcsin(input)
    """,
    branch="singular",
)
def arcsine(call: Call) -> Term:
    raise Unrecognised
