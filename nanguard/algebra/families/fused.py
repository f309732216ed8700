"""Sums and products of several tensors in one call."""

# A law is documented by the equation above it.
# ruff: noqa: D103

from __future__ import annotations

import math

from nanguard.algebra import build, sums, totals
from nanguard.algebra.build import positive
from nanguard.algebra.call import Call
from nanguard.algebra.families.contraction import LARGEST_PRODUCT, matrix_product
from nanguard.algebra.registry import law
from nanguard.algebra.term import Shape, Term, Unrecognised

# Of higher powers nothing is learned.
HIGHEST_POWER = 8


# b p + a (Q R)
@law(
    """
    torch.addmm(input, mat1, mat2, *, beta=1, alpha=1)
    torch.baddbmm(input, batch1, batch2, *, beta=1, alpha=1)
    torch.Tensor.addmm(input, mat1, mat2, *, beta=1, alpha=1)
    torch.Tensor.baddbmm(input, batch1, batch2, *, beta=1, alpha=1)
    """
)
def addmm(call: Call) -> Term:
    names = ("mat1", "mat2") if "mat1" in call.arguments else ("batch1", "batch2")
    product = build.shift(matrix_product(call, *names), math.log(call.positive("alpha")))
    beta = call.number("beta")
    if call.is_number("input"):
        return build.expand(sums.plus_constant(product, beta * call.number("input")), call.shape)
    return sums.logaddexp(build.shift(call.log("input"), math.log(call.positive("beta"))), product)


# p + c q r
@law(
    """
    torch.addcmul(input, tensor1, tensor2, *, value=1)
    torch.Tensor.addcmul(input, tensor1, tensor2, *, value=1)
    """
)
def addcmul(call: Call) -> Term:
    one, other = ("tensor1", "tensor2") if call.known("tensor1") else ("tensor2", "tensor1")
    if call.known(other):
        product = build.add(call.log(one), call.log(other))
    else:
        product = totals.weigh(call.log(one), call.weight(other))
    return _added_to_input(call, product)


# p + c q / r
@law(
    """
    torch.addcdiv(input, tensor1, tensor2, *, value=1)
    torch.Tensor.addcdiv(input, tensor1, tensor2, *, value=1)
    """
)
def addcdiv(call: Call) -> Term:
    return _added_to_input(call, build.subtract(call.log("tensor1"), call.log("tensor2")))


def _added_to_input(call: Call, number: Term) -> Term:
    multiple = build.shift(number, math.log(call.positive("value")))
    if call.is_number("input"):
        return build.expand(sums.plus_constant(multiple, call.number("input")), call.shape)
    return sums.logaddexp(call.log("input"), multiple)


# P Q R ...
@law("torch.linalg.multi_dot(tensors)")
def multi_dot(call: Call) -> Term:
    first, *others = map(positive, call.logs("tensors"))
    product = first if len(first.shape) > 1 else build.reshape(first, (1, *first.shape))
    for other in others:
        product = _product(product, other if len(other.shape) > 1 else build.reshape(other, (*other.shape, 1)))
    return build.reshape(product, call.shape)


# P P ... P
@law(
    """
    torch.matrix_power(input, n)
    torch.linalg.matrix_power(input, n)
    torch.Tensor.matrix_power(input, n)
    """
)
def matrix_power(call: Call) -> Term:
    log, power = positive(call.log()), call["n"]
    if type(power) is not int or not 1 <= power <= HIGHEST_POWER:
        raise Unrecognised
    return _power(log, power)


def _power(log: Term, power: int) -> Term:
    if power == 1:
        return log
    half = _power(log, power // 2)
    return _product(_product(half, half), log) if power % 2 else _product(half, half)


def _product(a: Term, b: Term) -> Term:
    left, right = build.reshape(a, (*a.shape, 1)), build.reshape(b, _with_rows(b.shape))
    if math.prod(build.broadcast_shapes(left.shape, right.shape)) > LARGEST_PRODUCT:
        raise Unrecognised
    return totals.logsumexp(build.add(left, right), (len(left.shape) - 2,), False)


def _with_rows(shape: Shape) -> Shape:
    return (*shape[:-2], 1, *shape[-2:])
