"""Totals of products, such as matrix products, without laying out the products.

With the largest factors taken out, sum_k p_k q_k = max p max q sum_k (p_k / max p) (q_k / max q). What loses digits there by
underflow is below 2^-126. So where the sum on the right is at least 2^-40, it has all its digits, and is an ordinary
contraction: in time, in memory and in its derivative. Factors of either sign may make more of it, and are taken into account.
Elsewhere `None` is the answer, and products are laid out.
"""

from __future__ import annotations

import math
from string import ascii_letters

import torch
from torch import Tensor

from nanguard.algebra import Apply, Term
from nanguard.algebra import operators as ops
from nanguard.stabilizer import environment
from nanguard.stabilizer.scaled import Scaled

__all__ = ["contraction", "is_contraction", "may_contract"]

# Fewer products are laid out in no time.
_MANY = 1 << 12
_LEAST = 2.0**-40
_DTYPES = (torch.float32, torch.float64)


def is_contraction(term: Term) -> bool:
    """Whether a term is the total of many products, of factors of which one at least is repeated."""
    if not isinstance(term, Apply) or term.operator is not ops.LOGSUMEXP or not isinstance(term.args[0], Apply):
        return False
    products = term.args[0]
    if products.operator not in (ops.ADD, ops.WEIGH) or math.prod(products.shape) < _MANY:
        return False
    return any(math.prod(factor.shape) < math.prod(products.shape) for factor in products.args)


def may_contract(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether matrix products keep all digits, and it can be seen whether these are enough."""
    return dtype in _DTYPES and torch.get_float32_matmul_precision() == "highest" and environment.may_look(device)


def contraction(a: Scaled, b: Scaled, shape: tuple[int, ...], dims: tuple[int, ...], keepdim: bool) -> Scaled | None:
    """The total over `dims` of the products of two numbers that broadcast to `shape`; `None` where digits would be lost."""
    if len(shape) > len(ascii_letters):
        return None
    (one, high), (other, higher) = _without_largest(a, shape, dims), _without_largest(b, shape, dims)
    kept = [dim for dim in range(len(shape)) if dim not in dims]
    words = [_word(part.shape, shape) for part in (one, other)]
    output = "".join(ascii_letters[dim] for dim in kept if shape[dim] != 1)
    single = [part.reshape([size for size in part.shape if size != 1]) for part in (one, other)]
    factor = torch.einsum(f"{words[0]},{words[1]}->{output}", *single)
    if not factor.numel():
        return None
    least, most = (end.item() for end in factor.detach().abs().aminmax())
    weight = _largest_factor(a) * _largest_factor(b)
    if not (least >= _LEAST * weight and most < math.inf):
        return None
    whole = tuple(1 if dim in dims else size for dim, size in enumerate(shape))
    result = whole if keepdim else tuple(shape[dim] for dim in kept)
    return Scaled((high + higher).expand(whole).reshape(result), factor.reshape(result))


def _without_largest(number: Scaled, shape: tuple[int, ...], dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A number by the largest exponential along `dims`, and the logarithm of that."""
    log, factor = (None if part is None else _padded(part, len(shape)) for part in number)
    assert log is not None
    largest = log.detach().amax(dims, keepdim=True)
    largest = largest.masked_fill_(largest.isinf(), 0.0)
    value = torch.sub(log, largest).exp_()
    return value if factor is None else value * factor, largest


def _largest_factor(number: Scaled) -> float:
    """How much a factor makes of what has underflowed."""
    return 1.0 if number.factor is None else max(1.0, number.factor.detach().abs().max().item())


def _padded(part: Tensor, rank: int) -> Tensor:
    return part.reshape((1,) * (rank - part.ndim) + tuple(part.shape))


def _word(sizes: torch.Size, shape: tuple[int, ...]) -> str:
    return "".join(ascii_letters[dim] for dim in range(len(shape)) if sizes[dim] != 1)
