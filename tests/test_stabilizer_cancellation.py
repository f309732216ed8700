"""Where digits cancel: small numbers beside 1, epsilons beside smaller ones, what two close numbers share, and logarithms."""

import functools
import math
import weakref

import mpmath
import pytest
import torch
from derivatives import outcome
from torch.nn import functional as F

import nanguard

POINTS = (-100.0, -20, -10, -3, 0, 2, 10, 16, 30, 50, 80)
EXPM1 = (-110.0, -60, -20, -17, -10, -3, 1, 4)
SMALL = (-20.0, -1, -1e-2, -1e-4, -1e-6, 1e-6, 1e-4, 1e-2, 1, 20)
WEIGHT = torch.tensor([3.0])
MEANS = torch.tensor([1.0, 3.0])
SHARES = torch.tensor([0.25, 0.75])


def log(x):
    return mpmath.log(x)


def exp(x):
    return mpmath.exp(x)


def s(x):
    return 1 / (1 + mpmath.exp(-x))


def with_two(x):
    return torch.stack([x, x * 0 - 60, x * 0 - 150], 1)


def share_of_two(x):
    rest = exp(-60) + exp(-150)
    return rest / (exp(x) + rest)


def upper(x):
    return torch.sigmoid(x[:, None] - MEANS.to(x) + 0.5)


def lower(x):
    return torch.sigmoid(x[:, None] - MEANS.to(x) - 0.5)


def between(x):
    return s(x + 0.5) - s(x - 0.5)


def mixed(x, shares=(0.25, 0.75)):
    return sum(share * between(x - mean) for share, mean in zip(shares, (1, 3), strict=True))


def of(function, number):
    """A program that needs one number twice."""
    return lambda x: function(x, number(x))


EPSILONS = {
    "of a softplus": (lambda x: (F.softplus(x).expm1() + 1e-8).log(), lambda x: log(exp(x) + 1e-8)),
    "of an exponential": (lambda x: (x.exp().expm1() + 1e-8).log(), lambda x: log(exp(exp(x)) - 1 + 1e-8)),
    "of a sigmoid": (lambda x: (x.sigmoid().expm1() + 1e-6).log(), lambda x: log(exp(s(x)) - 1 + 1e-6)),
    "of a softmax": (
        lambda x: (torch.stack([x, x * 0], 1).softmax(1)[:, 0].expm1() + 1e-8).log(),
        lambda x: log(exp(s(x)) - 1 + 1e-8),
    ),
    "large": (lambda x: (F.softplus(x).expm1() + 0.75).log(), lambda x: log(exp(x) + 0.75)),
    "one": (lambda x: (x.expm1() + 1).log(), lambda x: x),
    "two": (lambda x: (F.softplus(x).expm1() + 2).log(), lambda x: log(exp(x) + 2)),
    "negative": (lambda x: ((F.softplus(x) + 1).expm1() - 1e-2).log(), lambda x: log(exp(1) * (1 + exp(x)) - 1.01)),
}
BESIDE_ONE = {
    "weighed": (lambda x: torch.log1p(x.exp() * WEIGHT.to(x)), lambda x: log(1 + 3 * exp(x))),
    "weighed, added": (lambda x: (1 + x.exp() * WEIGHT.to(x)).log(), lambda x: log(1 + 3 * exp(x))),
    "weighed, ones": (lambda x: (torch.ones_like(x) + x.exp() * WEIGHT.to(x)).log(), lambda x: log(1 + 3 * exp(x))),
    "by a square": (lambda x: torch.log1p(x.exp() * (x / 8).square()), lambda x: log(1 + exp(x) * x**2 / 64)),
    "by a softplus": (lambda x: torch.log1p(x.exp() * F.softplus(x)), lambda x: log(1 + exp(x) * log(1 + exp(x)))),
    "divided": (lambda x: torch.log1p(x.exp() / WEIGHT.to(x).abs()), lambda x: log(1 + exp(x) / 3)),
    "summed": (lambda x: torch.log1p((x.exp()[:, None] * MEANS.to(x)).sum(1)), lambda x: log(1 + 4 * exp(x))),
    "taken again": (lambda x: torch.log1p((x / 2).exp() * WEIGHT.to(x)).log(), lambda x: log(log(1 + 3 * exp(x / 2)))),
    "subtracted": (lambda x: torch.log1p(-x.sigmoid() * WEIGHT.to(x) / 4), lambda x: log(1 - 3 * s(x) / 4)),
    "subtracted, shared": (lambda x: torch.log1p(-x.sigmoid() * SHARES.to(x)[:1]), lambda x: log(1 - s(x) / 4)),
    "squared": (lambda x: torch.log1p(-(x.sigmoid() ** 2)), lambda x: log(1 - s(x) ** 2)),
    "product": (lambda x: torch.log1p(-x.sigmoid() * (2 * x).sigmoid()), lambda x: log(1 - s(x) * s(2 * x))),
    "mean": (lambda x: torch.log1p(-torch.stack([x, 2 * x]).sigmoid().mean(0)), lambda x: log((s(-x) + s(-2 * x)) / 2)),
    "most": (lambda x: torch.log1p(-0.75 * x.sigmoid()), lambda x: log(1 - 0.75 * s(x))),
    "part of a softmax": (
        lambda x: torch.log1p(-with_two(x - 60).softmax(1)[:, :1].sum(1)),
        lambda x: log(share_of_two(x - 60)),
    ),
    "running total": (
        lambda x: torch.log1p(-with_two(x - 60).softmax(1).cumsum(1)[:, 0]),
        lambda x: log(share_of_two(x - 60)),
    ),
}
TANH = {
    "plus": (lambda x: torch.log1p(x.tanh()), lambda x: log(2 * s(2 * x))),
    "minus": (lambda x: torch.log1p(-x.tanh()), lambda x: log(2 * s(-2 * x))),
    "squared": (lambda x: torch.log1p(-(x.tanh() ** 2)), lambda x: log(4 * s(2 * x) * s(-2 * x))),
    "inverse": (lambda x: torch.atanh(x.tanh()), lambda x: x),
}
COMMON = {
    "half": (of(lambda x, p: (0.5 * p - 0.5 * p**2).log(), torch.sigmoid), lambda x: log(s(x) * s(-x) / 2)),
    "variance": (of(lambda x, p: (p - p * p).log(), torch.sigmoid), lambda x: log(s(x) * s(-x))),
    "variance, of a softmax": (
        of(lambda x, p: (p - p**2).log()[:, 0], lambda x: with_two(x).softmax(1)),
        lambda x: log(share_of_two(x) * (1 - share_of_two(x))),
    ),
    "constant": (lambda x: (0.75 - 0.75 * x.sigmoid()).log(), lambda x: log(0.75 * s(-x))),
    "decimal": (lambda x: (0.8 - 0.8 * x.sigmoid()).log(), lambda x: log(s(-x)) + log(0.8)),
    "two": (lambda x: (2 - 2 * x.sigmoid()).log(), lambda x: log(2 * s(-x))),
    "three": (lambda x: (3 - 3 * with_two(x).softmax(1)).log()[:, 0], lambda x: log(3 * share_of_two(x))),
    "two sigmoids": (
        lambda x: (0.3 * (x + 0.5).sigmoid() - 0.3 * (x - 0.5).sigmoid()).log(),
        lambda x: log(0.3 * between(x)),
    ),
    "divisor": (lambda x: ((x + 0.5).sigmoid() / 3 - (x - 0.5).sigmoid() / 3).log(), lambda x: log(between(x) / 3)),
    "number": (
        of(lambda x, w: (w * (x + 0.5).sigmoid() - w * (x - 0.5).sigmoid()).log(), lambda x: WEIGHT[0].to(x)),
        lambda x: log(3 * between(x)),
    ),
    "probability": (
        of(lambda x, p: (p * (x + 0.5).sigmoid() - p * (x - 0.5).sigmoid()).log(), lambda x: (x - 3).sigmoid()),
        lambda x: log(s(x - 3) * between(x)),
    ),
    "mixture": (
        of(lambda x, w: ((w * upper(x)).sum(1) - (w * lower(x)).sum(1)).log(), SHARES.to),
        lambda x: log(mixed(x)),
    ),
    "mixture, of a softmax": (
        of(lambda x, w: ((w * upper(x)).sum(1) - (w * lower(x)).sum(1)).log(), lambda x: SHARES.to(x).log().softmax(0)),
        lambda x: log(mixed(x)),
    ),
    "mixture, with an epsilon": (
        of(lambda x, w: ((w * upper(x)).sum(1) - (w * lower(x)).sum(1) + 1e-6).log(), SHARES.to),
        lambda x: log(mixed(x) + 1e-6),
    ),
    "mixture, by a product": (of(lambda x, w: (upper(x) @ w - lower(x) @ w).log(), SHARES.to), lambda x: log(mixed(x))),
    "mean of two": (lambda x: (upper(x).mean(1) - lower(x).mean(1)).log(), lambda x: log(mixed(x, (0.5, 0.5)))),
    "smoothed": (lambda x: (1 - (0.25 + 0.75 * x.sigmoid())).log(), lambda x: log(0.75 * s(-x))),
    "smoothed, decimal": (lambda x: (1 - (0.7 + 0.3 * x.sigmoid())).log(), lambda x: log(s(-x)) + log(0.3)),
    "smoothed, less": (lambda x: (1 - (0.125 + 0.75 * x.sigmoid())).log(), lambda x: log(0.125 + 0.75 * s(-x))),
    "of two": (
        lambda x: (1 - (0.25 * x.sigmoid() + 0.75 * (x + 1).sigmoid())).log(),
        lambda x: log(0.25 * s(-x) + 0.75 * s(-x - 1)),
    ),
    "both": (lambda x: (1 - (4 * x).sigmoid() * (1 - (-4 * x).sigmoid())).log(), lambda x: log(1 - s(4 * x) ** 2)),
    "less than one": (lambda x: (-(x.sigmoid() - 1)).log(), lambda x: log(s(-x))),
    "taken away again": (lambda x: (0.75 - (0.75 - 0.75 * x.sigmoid())).log(), lambda x: log(0.75 * s(x))),
}
INVERSE = {
    "softmax": (lambda x: (1 - F.log_softmax(with_two(x), 1).exp()).log()[:, 0], lambda x: log(share_of_two(x))),
    "softmax, logit": (
        lambda x: torch.logit(F.log_softmax(with_two(x), 1).exp())[:, 0],
        lambda x: log((1 - share_of_two(x)) / share_of_two(x)),
    ),
    "softmax, expm1": (lambda x: (-with_two(x).log_softmax(1).expm1()).log()[:, 0], lambda x: log(share_of_two(x))),
    "sigmoid": (lambda x: (1 - F.logsigmoid(4 * x).exp()).log(), lambda x: log(s(-4 * x))),
    "sigmoid, log1p": (lambda x: torch.log1p(-torch.exp(F.logsigmoid(4 * x))), lambda x: log(s(-4 * x))),
    "softplus": (lambda x: (F.softplus(4 * x).exp() - 1).log(), lambda x: 4 * x),
    "softplus, negative": (lambda x: (1 - torch.exp(-F.softplus(4 * x))).log(), lambda x: log(s(4 * x))),
    "softplus, expm1": (lambda x: (F.softplus(4 * x).expm1() + 1e-30).log(), lambda x: log(exp(4 * x) + 1e-30)),
}
CASES = [
    pytest.param(loss, exact, points, id=f"{group}, {name}")
    for group, cases, points in (
        ("expm1", EPSILONS, EXPM1),
        ("beside one", BESIDE_ONE, POINTS),
        ("tanh", TANH, SMALL),
        ("common", COMMON, POINTS),
        ("inverse", INVERSE, POINTS),
    )
    for name, (loss, exact) in cases.items()
]
DTYPES = {torch.float32: 2e-5, torch.float64: 1e-9}


@functools.cache
def exactly(exact, points):
    """Values and derivatives, with more digits than any float has."""
    with mpmath.workdps(500):
        step = mpmath.mpf(10) ** -120
        values = [float(exact(mpmath.mpf(x))) for x in points]
        slopes = [float((exact(x + step) - exact(x - step)) / (2 * step)) for x in map(mpmath.mpf, points)]
    return torch.tensor(values, dtype=torch.float64), torch.tensor(slopes, dtype=torch.float64)


@pytest.mark.parametrize(
    ("dtype", "compiled"),
    [(torch.float32, False), (torch.float64, False), (torch.float32, True)],
    ids=["float32", "float64", "compiled"],
)
@pytest.mark.parametrize(("loss", "exact", "points"), CASES)
def test_value_and_gradient_are_those_of_exact_arithmetic(loss, exact, points, dtype, compiled):
    x = torch.tensor(points, dtype=dtype)
    found = outcome(loss, x, compiled=compiled)
    for one, other in zip(found, exactly(exact, tuple(x.tolist())), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=DTYPES[dtype], atol=1e-37)


@pytest.mark.parametrize(("loss", "exact", "points"), CASES)
def test_few_digits_are_no_worse_than_unguarded(loss, exact, points):
    """In bfloat16 what lies between is rounded, so that exact arithmetic has another result: it is a matter of how far away."""
    x = torch.tensor(points, dtype=torch.bfloat16)
    plain = outcome(loss, x, guard=False)
    for one, other, wanted in zip(outcome(loss, x), plain, exactly(exact, tuple(x.tolist())), strict=True):
        size = wanted.abs() + 1e-2
        lost = ((one.double() - wanted).abs() / size).nan_to_num(math.inf)
        assert (lost <= ((other.double() - wanted).abs() / size).nan_to_num(math.inf).clamp(min=2e-2)).all()


TARGET = torch.tensor([[0], [2], [1]])
PLAIN = {
    "cross-entropy": lambda x: -F.log_softmax(x, 1).gather(1, TARGET).mean(),
    "entropy": lambda x: -(F.log_softmax(x, 1).exp() * F.log_softmax(x, 1)).sum(1),
    "smoothing": lambda x: -0.9 * F.log_softmax(x, 1)[:, 0] - 0.1 * F.log_softmax(x, 1).mean(1),
    "focal": lambda x: (lambda y: -((1 - y.exp()) ** 2 * y).sum())(F.log_softmax(x, 1)),
    "ratio": lambda x: (F.log_softmax(x, 1) - F.log_softmax(-x, 1)).exp() * 2,
    "divided": lambda x: F.log_softmax(x, 1) / F.log_softmax(x, 1).sum(1, keepdim=True),
    "softplus": lambda x: F.softplus(x) / (F.softplus(x).sum(1, keepdim=True) + 1e-6),
    "logarithm of a softplus": lambda x: F.softplus(x).log() + (F.softplus(x) + 1).log() + F.softplus(x, beta=2).exp(),
    "one number": lambda x: x * F.softplus(torch.tensor(0.5)) + F.logsigmoid(x[0, 0]),
    "sigmoid": lambda x: -(F.logsigmoid(x) + F.logsigmoid(-x)).mean(),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("loss", PLAIN.values(), ids=PLAIN)
def test_what_is_made_of_logarithms_stays_as_it_is(loss, compiled):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)) * 20

    def outcome(function):
        point = x.clone().requires_grad_()
        value = function(point)
        return value.detach(), torch.autograd.grad(value.sum(), point)[0]

    torch._dynamo.reset()
    plain = outcome(torch.compile(loss, backend="aot_eager") if compiled else loss)
    torch._dynamo.reset()
    with nanguard.stabilize() as swaps:
        found = outcome(torch.compile(loss, backend="aot_eager") if compiled else loss)
    assert not swaps
    assert all(torch.equal(one, other) for one, other in zip(plain, found, strict=True))


def test_logits_are_not_kept_for_their_log_softmax():
    with nanguard.stabilize():
        logits = torch.randn(4, 5)
        gone = weakref.ref(logits)
        log_p = F.log_softmax(logits, 1)
        del logits
        assert gone() is None
        rest = (1 - log_p.exp()).log()
    torch.testing.assert_close(rest, torch.log1p(-log_p.exp()), rtol=1e-5, atol=1e-6)


def test_a_logarithm_that_was_edited_is_none_any_more():
    x = torch.tensor([1.0, 2.0])
    with nanguard.stabilize() as swaps:
        y = F.logsigmoid(x)
        y -= 1
        value = (1 - y.exp()).log()
        z = F.softplus(x)
        z.exp_()
        torch.testing.assert_close(z.log(), F.softplus(x))
    torch.testing.assert_close(value, torch.log1p(-y.exp()))
    assert swaps
