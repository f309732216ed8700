"""What one call computes of several tensors: where it stays as it is, and what it does at 0, at ties and where numbers miss."""

import math

import pytest
import torch
import torch.nn.functional as F

import nanguard

X = torch.tensor([[1.0, 2, 0.5], [0, -1, 0.25], [0.3, 0.1, 0.2]])
Y = torch.tensor([0, 2])


def value_and_gradient(loss, x):
    x = x.clone().requires_grad_()
    value = loss(x)
    weight = torch.linspace(0.5, 1.5, value.numel()).reshape(value.shape).to(value.dtype)
    return value.detach(), torch.autograd.grad((value * weight).sum(), x)[0]


def p(x):
    return torch.softmax(x, 1)


# Arguments for which nothing is known, or that change what a call means.
LEFT_ALONE = {
    "a padding row": lambda x: F.embedding(Y, p(x), padding_idx=2).log(),
    "a layer": lambda x: torch.addmm(x, p(x), x).abs().log(),
    "subtracted": lambda x: torch.addmm(p(x) * 2, p(x), p(x), alpha=-1).log(),
    "subtracted products": lambda x: torch.addcmul(p(x) * 2, p(x), p(x), value=-0.1).log(),
    "a mean": lambda x: p(x).scatter_reduce(1, Y.expand(3, 2), p(x)[:, :2], "mean").log(),
    "without what was there": lambda x: (
        p(x).scatter_reduce(1, Y.expand(3, 2), p(x)[:, :2], "amax", include_self=False).log()
    ),
    "uneven steps": lambda x: torch.trapezoid(p(x), torch.tensor([0.0, 1, 3]), dim=1).log(),
    "a high power": lambda x: torch.linalg.matrix_power(p(x), 9).log(),
    "an inverse": lambda x: torch.linalg.matrix_power(p(x), -1).abs().log(),
    "no power": lambda x: (torch.linalg.matrix_power(p(x), 0) + x).exp().sum() - x.log(),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_is_not_known_keeps_every_bit(name):
    plain = value_and_gradient(LEFT_ALONE[name], X)
    with nanguard.stabilize() as swaps:
        found = value_and_gradient(LEFT_ALONE[name], X)
    assert swaps == []
    for one, other in zip(plain, found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


AGREEING = {
    "missing numbers": lambda x: torch.nansum(p(torch.cat([x, torch.full((1, 3), math.nan).to(x)])), 0).log(),
    "ties": lambda x: p(x).scatter_reduce(1, torch.zeros(3, 3, dtype=torch.long), p(x), "amax").log(),
    "the smallest": lambda x: p(x).scatter_reduce(1, torch.zeros(3, 3, dtype=torch.long), p(x).flip(1), "amin").log(),
    "a base of no weight": lambda x: torch.addmm(torch.zeros(3, 3).to(x), p(x), p(x), beta=0.5).log(),
    "a constant base": lambda x: torch.ones(3, 3).to(x).addmm(p(x), p(x), beta=2).log(),
    "vectors at both ends": lambda x: torch.linalg.multi_dot([p(x)[0], p(x), p(x)[:, 1]]).log(),
    "a batch of powers": lambda x: torch.matrix_power(torch.stack([p(x), p(-x)]), 5).log(),
    "long strides": lambda x: p(x).unfold(1, 1, 2).log(),
}


@pytest.mark.parametrize("name", AGREEING)
def test_where_torch_is_accurate_nothing_changes(name):
    expected = value_and_gradient(AGREEING[name], X.double())
    with nanguard.stabilize() as swaps:
        found = value_and_gradient(AGREEING[name], X)
    assert swaps
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-5, atol=2e-6)


def test_nothing_but_missing_numbers_is_nothing():
    x = torch.full((2, 3), math.nan, requires_grad=True)
    with nanguard.stabilize() as swaps:
        value = torch.log(torch.nansum(torch.softmax(x, 1), 1) + 1e-6)
    assert swaps
    torch.testing.assert_close(value, torch.full((2,), math.log(1e-6)))
