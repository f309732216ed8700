"""Distances of probabilities to labels, distribution functions far out, and what a relu leaves as it is."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal
from torch.special import log_ndtr

import nanguard

X = torch.tensor([0.0, 1, -3, 40, -200, 200, 17, -17])
LABELS = torch.tensor([1.0, 0, 1, 0, 1, 0, 1, 0])
SOFT = torch.tensor([0.9, 0.1, 0.95, 0.05, 0.5, 1e-5, 0.25, 1.0])
ODD = torch.tensor([1.5, -0.25, 0.9, -0.1, 1.2, 2.0, 0.5, -3.0])


def value_and_gradient(loss, x):
    x = x.clone().requires_grad_()
    value = loss(x)
    weight = torch.linspace(0.5, 1.5, value.numel()).reshape(value.shape).to(value.dtype)
    return value.detach(), torch.autograd.grad((value * weight).sum(), x)[0]


def likelihood(x):
    return torch.where(LABELS == 1, F.logsigmoid(x), F.logsigmoid(-x))


LIKELIHOODS = {
    "label minus p": lambda x: torch.log(1 - (LABELS - x.sigmoid()).abs()),
    "p minus label": lambda x: torch.log(1 - torch.abs(x.sigmoid() - LABELS)),
    "p minus the other": lambda x: torch.log((x.sigmoid() - (1 - LABELS)).abs()),
    "integers": lambda x: torch.log1p(-abs(LABELS.long() - x.sigmoid())),
    "booleans": lambda x: torch.log1p(-torch.absolute(x.sigmoid() - LABELS.bool().to(x.dtype))),
    "in another shape": lambda x: torch.log(1 - (LABELS[None] - x.sigmoid()[None]).abs()).squeeze(0),
    "by hand": lambda x: torch.log(1 - (LABELS - 1 / (1 + torch.exp(-x))).abs()),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_likelihoods_of_labels(name, compiled):
    loss = LIKELIHOODS[name]
    torch._dynamo.reset()
    with nanguard.stabilize() as swaps:
        found = value_and_gradient(torch.compile(loss, backend="aot_eager") if compiled else loss, X)
    assert swaps
    for one, other in zip(found, value_and_gradient(likelihood, X.double()), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=0)


@pytest.mark.parametrize("target", [SOFT, ODD, LABELS], ids=["soft", "beyond", "labels"])
@pytest.mark.parametrize(
    "loss",
    [
        lambda x, t: torch.log(1 - (t - x.sigmoid()).abs()),
        lambda x, t: torch.log((x.sigmoid() - t).abs()),
        lambda x, t: torch.log((t - x.sigmoid()).abs() + 1e-3),
        lambda x, t: torch.log(4 - 0.5 * (t - x.sigmoid()).abs()),
    ],
)
def test_where_torch_is_accurate_nothing_changes(loss, target):
    x = torch.tensor([0.5, 1, -3, 4, -2, 2.5, 1.75, -1.5])
    expected = value_and_gradient(lambda x: loss(x, target.to(x.dtype)), x.double())
    with nanguard.stabilize():
        found = value_and_gradient(lambda x: loss(x, target.to(x.dtype)), x)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("shift", [0.0, 1e-3])
def test_a_tie_has_no_derivative(shift):
    x = torch.tensor([0.3, -1.2, 3.0])
    target = torch.sigmoid(x)
    for loss in (lambda p: 1 - (target - p).abs(), lambda p: shift + (p - target).abs()):
        plain = value_and_gradient(lambda x, loss=loss: torch.log(loss(x.sigmoid())), x)
        with nanguard.stabilize() as swaps:
            found = value_and_gradient(lambda x, loss=loss: torch.log(loss(x.sigmoid())), x)
        assert swaps
        torch.testing.assert_close(found[0], plain[0], rtol=1e-6, atol=0)
        assert found[1].tolist() == [0, 0, 0]


def edited_label(x, t):
    difference = t - x.sigmoid()
    t.mul_(0.5)
    return torch.log(1 - difference.abs())


def label_edited_later(x, t):
    distance = (t - x.sigmoid()).abs()
    t.mul_(0.5)
    return torch.log(1 - distance)


def edited_difference(x, t):
    difference = t - x.sigmoid()
    difference *= 0.5
    return torch.log(1 - difference.abs())


def subtracted_in_place(x, t):
    return torch.log(1 - t.sub_(x.sigmoid()).abs())


def learnt_label(x, t):
    return torch.log(1 - (t.requires_grad_() - x.sigmoid()).abs())


def no_probability(x, t):
    return torch.log(1 - (t - x.exp() / 100).abs())


def rectified_difference(x, t):
    return torch.log(F.relu(x.sigmoid() - 0.2) + F.relu(t - x.sigmoid()) + 0.5)


def of_one_sign(x, t):
    return torch.log(2 + (t - x.sigmoid()))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    "loss",
    [
        *(edited_label, label_edited_later, edited_difference, subtracted_in_place, learnt_label),
        *(no_probability, rectified_difference, of_one_sign),
    ],
    ids=lambda loss: loss.__name__,
)
def test_what_is_not_known_keeps_every_bit(loss, compiled):
    def run():
        torch._dynamo.reset()
        found = torch.compile(loss, backend="aot_eager") if compiled else loss
        return value_and_gradient(lambda x: found(x, SOFT.clone() * 1), X / 10)

    plain = run()
    with nanguard.stabilize() as swaps:
        guarded = run()
    assert swaps == []
    for one, other in zip(plain, guarded, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


class TestNormal:
    far = torch.tensor([0.0, 1, -3, -9, -40, -1e4, 12, 1e4])

    @pytest.mark.parametrize(
        "way",
        [
            lambda x: torch.log(Normal(0.0, 1.0).cdf(x)),
            lambda x: torch.special.ndtr(x).log(),
            lambda x: torch.log(0.5 * (1 + torch.erf(x / 2**0.5))),
            lambda x: torch.log(torch.erfc(-x / 2**0.5) / 2),
        ],
    )
    def test_far_out(self, way):
        with nanguard.stabilize() as swaps:
            found = value_and_gradient(way, self.far)
        assert [swap.rule for swap in swaps] == ["NG113"]
        for one, other in zip(found, value_and_gradient(log_ndtr, self.far.double()), strict=True):
            # What is squared after it was rounded differs by as much, relative to itself.
            torch.testing.assert_close(one.double(), other, rtol=4e-5, atol=1e-30)

    def test_second_derivatives(self):
        def curvature(function, x):
            x = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
            return torch.autograd.grad(slope.sum(), x)[0]

        x = torch.linspace(-50, 6, 57)
        with nanguard.stabilize():
            found = curvature(lambda x: torch.log(torch.special.ndtr(x)), x)
        torch.testing.assert_close(found.double(), curvature(log_ndtr, x.double()), rtol=1e-5, atol=1e-9)

    @pytest.mark.parametrize("epsilon", ["keep", "drop"])
    def test_minus_infinity_brings_no_nan(self, epsilon):
        x = torch.tensor([-math.inf, 0.0, math.inf], requires_grad=True)
        with nanguard.stabilize(epsilon):
            value = torch.log(torch.special.ndtr(x) + 1e-6)
        assert value.isfinite().all()
        assert torch.autograd.grad(value.sum(), x)[0].isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_precisions(self, dtype):
        x = torch.tensor([-30.0, -5, 0, 3], dtype=dtype)
        with nanguard.stabilize() as swaps:
            value, gradient = value_and_gradient(lambda x: torch.log(torch.special.ndtr(x)), x)
        assert swaps
        assert value.dtype == gradient.dtype == dtype
        torch.testing.assert_close(value.double(), log_ndtr(x.double()), rtol=2 * torch.finfo(dtype).eps, atol=1e-9)

    def test_a_large_floor_stays_as_it_is(self):
        def loss(x):
            return torch.log(0.5 * (1 + torch.erf(x / 2)) + 1e-3)

        plain = value_and_gradient(loss, self.far)
        with nanguard.stabilize() as swaps:
            found = value_and_gradient(loss, self.far)
        assert swaps == []
        assert all(torch.equal(one, other) for one, other in zip(plain, found, strict=True))


@pytest.mark.parametrize("relu", [F.relu, torch.relu, torch.Tensor.relu, torch.Tensor.relu_, torch.nn.ReLU()])
def test_relu_of_what_is_positive(relu):
    def loss(x):
        return torch.log(relu(1 - torch.tanh(x) ** 2) + 1e-6)

    x = torch.tensor([0.0, 3, 8, 9, 10, -12])
    with nanguard.stabilize() as swaps:
        found = value_and_gradient(loss, x)
    assert swaps
    for one, other in zip(found, value_and_gradient(loss, x.double()), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-9)


def test_relu_in_place_of_an_argument_stays():
    x = X.clone().requires_grad_()
    with nanguard.stabilize():
        p = x.sigmoid() * 1.0
        assert F.relu(p, inplace=True) is p
        value = torch.log(p + 1.0)
    torch.testing.assert_close(value, torch.log(x.sigmoid() + 1.0))
