"""Matrix products and einsum: sums of products, so logsumexp of sums; the other factor may be a tensor of either sign."""

# A law is documented by the equation above it.
# ruff: noqa: D103

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from string import ascii_letters

from nanguard.algebra import build, totals
from nanguard.algebra import operators as ops
from nanguard.algebra.call import Call, Operand, normal_dim
from nanguard.algebra.pattern import is_over_probabilities
from nanguard.algebra.registry import law
from nanguard.algebra.term import Leaf, Term, Unrecognised

# All products are laid out before they are summed: of more elements than this nothing is learned.
LARGEST_PRODUCT = 1 << 22
# With a factor of more dims it is attention, or a layer, whose result nobody takes the logarithm of.
LARGEST_RANK = 2
_SECOND = ("other", "mat2", "vec", "tensor")


class _Factor:
    """One factor: a known number, or a tensor of either sign."""

    def __init__(self, call: Call, operand: object) -> None:
        if not isinstance(operand, Operand) or not operand.trusted:
            raise Unrecognised
        self.known = operand.log is not None
        self.term: Term = operand.log if operand.log is not None else operand.leaf
        self.layer = not self.known and operand.leaf.tracked and len(operand.leaf.shape) > LARGEST_RANK
        weights = _weights(self.term) if self.known else iter((operand.leaf,))
        self.deep = len(self.term.shape) > LARGEST_RANK or any(leaf.tracked for leaf in weights)

    def laid_out(self, order: Sequence[int], shape: tuple[int, ...]) -> Term:
        """Dims in another order, and new ones of size 1."""
        term = self.term
        if tuple(order) != tuple(range(len(order))):
            term = build.rearrange(ops.PERMUTE, (term,), tuple(term.shape[dim] for dim in order), dims=tuple(order))
        return build.reshape(term, shape)


def _weights(term: Term) -> Iterator[Leaf]:
    """The tensors of either sign that went into a number."""
    if isinstance(term, Leaf):
        return
    if term.operator in (ops.WEIGH, ops.WEIGH_REST):
        yield from term.args[1].leaves
    for arg in term.args:
        yield from _weights(arg)


def _product(first: _Factor, second: _Factor, one: Term, other: Term, dims: tuple[int, ...]) -> Term:
    if (first.term.signed or second.term.signed) and (first.deep or second.deep):
        raise Unrecognised  # weighed before, as by transition probabilities, but here it is another layer of a network
    if not (first.known or second.known) or (first.layer and is_over_probabilities(second.term)):
        raise Unrecognised
    if second.layer and is_over_probabilities(first.term):
        raise Unrecognised
    if math.prod(build.broadcast_shapes(one.shape, other.shape)) > LARGEST_PRODUCT:
        raise Unrecognised
    if first.known and second.known:
        product = build.add(one, other)
    else:
        product = totals.weigh(one, other) if first.known else totals.weigh(other, one)
    return totals.logsumexp(product, dims, False)


# log (P Q)_ij = logsumexp over k of log P_ik + log Q_kj
@law(
    """
    torch.matmul(input, other)
    torch.mm(input, mat2)
    torch.bmm(input, mat2)
    torch.mv(input, vec)
    torch.dot(input, tensor)
    torch.Tensor.matmul(input, other)
    torch.Tensor.__matmul__(input, other)
    torch.Tensor.__rmatmul__(other, input)
    torch.Tensor.mm(input, mat2)
    torch.Tensor.bmm(input, mat2)
    torch.Tensor.mv(input, vec)
    torch.Tensor.dot(input, tensor)
    """
)
def matmul(call: Call) -> Term:
    return matrix_product(call, "input", next(name for name in _SECOND if name in call.arguments))


def matrix_product(call: Call, one: str, other: str) -> Term:
    """The logarithm of the matrix product of two operands."""
    first, second = _Factor(call, call[one]), _Factor(call, call[other])
    a, b = first.term.shape, second.term.shape
    if not a or not b:
        raise Unrecognised
    left = first.laid_out(range(len(a)), (*a, 1) if len(b) > 1 else a)
    right = second.laid_out(range(len(b)), (*b[:-2], *((1, *b[-2:]) if len(b) > 1 and len(a) > 1 else b[-2:])))
    rank = len(build.broadcast_shapes(left.shape, right.shape))
    return _product(first, second, left, right, (rank - 2 if len(b) > 1 else rank - 1,))


# p_i q_j
@law(
    """
    torch.outer(input, vec2)
    torch.ger(input, vec2)
    torch.Tensor.outer(input, vec2)
    torch.Tensor.ger(input, vec2)
    """
)
def outer(call: Call) -> Term:
    first, second = _Factor(call, call["input"]), _Factor(call, call["vec2"])
    return _product(first, second, build.reshape(first.term, (*first.term.shape, 1)), second.term, ())


# the same with the second factor transposed
@law("torch.nn.functional.linear(input, weight, bias=None)")
def linear(call: Call) -> Term:
    call.absent("bias")
    first, second = _Factor(call, call["input"]), _Factor(call, call["weight"])
    a, b = first.term.shape, second.term.shape
    if len(b) != 2 or not a:
        raise Unrecognised
    return _product(first, second, first.laid_out(range(len(a)), (*a[:-1], 1, a[-1])), second.term, (len(a),))


# sum over the last dim of both
@law("torch.inner(input, other)\n torch.Tensor.inner(input, other)")
def inner(call: Call) -> Term:
    first, second = _Factor(call, call["input"]), _Factor(call, call["other"])
    a, b = first.term.shape, second.term.shape
    if not a or not b:
        raise Unrecognised
    rank = len(a) + len(b) - 2
    left = first.laid_out(range(len(a)), (*a[:-1], *(1,) * (len(b) - 1), a[-1]))
    return _product(first, second, left, second.term, (rank,))


# sum over one dim of both
@law("torch.linalg.vecdot(input, other, *, dim=-1)")
def vecdot(call: Call) -> Term:
    first, second = _Factor(call, call["input"]), _Factor(call, call["other"])
    dim = call.dim(build.broadcast_shapes(first.term.shape, second.term.shape))
    return _product(first, second, first.term, second.term, (dim,))


# sum over the letters that are missing on the right
@law("torch.einsum(equation, *operands)", quotient=True)
def einsum(call: Call) -> Term:
    equation, operands = call["equation"], call["operands"]
    if not isinstance(equation, str):
        raise Unrecognised
    if len(operands) == 1 and isinstance(operands[0], tuple):
        operands = operands[0]
    inputs, _, output = equation.replace(" ", "").partition("->")
    letters = inputs.split(",")
    if "->" not in equation or "." in equation or len(letters) != len(operands) or not 1 <= len(letters) <= 2:
        raise Unrecognised
    if any(len(set(word)) != len(word) for word in (*letters, output)):
        raise Unrecognised
    every = output + "".join(sorted(set("".join(letters)) - set(output)))
    factors = [_Factor(call, operand) for operand in operands]
    parts = [_spread(factor, word, every) for factor, word in zip(factors, letters, strict=True)]
    dims = tuple(range(len(output), len(every)))
    if len(factors) == 2:
        return _product(factors[0], factors[1], parts[0], parts[1], dims)
    return totals.logsumexp(parts[0], dims, False)


# the same with the letters given by their places
@law("torch.tensordot(input, other, dims=2, out=None)")
def tensordot(call: Call) -> Term:
    call.absent("out")
    first, second = _Factor(call, call["input"]), _Factor(call, call["other"])
    a, b = len(first.term.shape), len(second.term.shape)
    dims = call["dims"]
    if type(dims) is int:
        dims = (range(a - dims, a), range(dims))
    if not isinstance(dims, (tuple, list)) or len(dims) != 2:
        raise Unrecognised
    left, right = (
        [normal_dim(dim, rank) for dim in (entry if isinstance(entry, (tuple, list, range)) else (entry,))]
        for entry, rank in zip(dims, (a, b), strict=True)
    )
    if a + b > len(ascii_letters) or len(left) != len(right):
        raise Unrecognised
    one, other = list(ascii_letters[:a]), list(ascii_letters[a : a + b])
    for dim, match in zip(left, right, strict=True):
        other[match] = one[dim]
    summed = "".join(one[dim] for dim in left)
    output = "".join(letter for letter in one + other if letter not in summed)
    parts = [_spread(first, "".join(one), output + summed), _spread(second, "".join(other), output + summed)]
    return _product(first, second, parts[0], parts[1], tuple(range(len(output), len(output) + len(summed))))


def _spread(factor: _Factor, word: str, every: str) -> Term:
    if len(word) != len(factor.term.shape):
        raise Unrecognised
    sizes = dict(zip(word, factor.term.shape, strict=True))
    order = [word.index(letter) for letter in every if letter in word]
    return factor.laid_out(order, tuple(sizes.get(letter, 1) for letter in every))


# p normalised to a sum of 1, with a floor for the sum
@law("torch.nn.functional.normalize(input, p=2.0, dim=1, eps=1e-12, out=None)", quotient=True)
def normalize(call: Call) -> Term:
    call.absent("out")
    log = build.positive(call.log())
    if call.number("p") != 1:
        raise Unrecognised
    total = totals.logsumexp(log, (call.dim(log.shape),), True)
    return build.subtract(log, totals.clamp(total, call.positive("eps"), None))


# the sum of the magnitudes, or the root of the sum of the squares
@law(
    """
    torch.norm(input, p="fro", dim=None, keepdim=False, out=None, dtype=None)
    torch.Tensor.norm(input, p="fro", dim=None, keepdim=False, dtype=None)
    torch.linalg.vector_norm(input, p=2, dim=None, keepdim=False, *, dtype=None, out=None)
    """
)
def norm(call: Call) -> Term:
    log = build.positive(call.log())
    dims, keepdim = call.dims(log.shape), bool(call["keepdim"])
    order = 2.0 if call["p"] == "fro" else call.positive("p")
    return build.scale(totals.logsumexp(build.scale(log, order), dims, keepdim), 1 / order)
