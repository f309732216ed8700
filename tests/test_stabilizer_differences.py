"""Differences of sums, running totals and probabilities: nothing cancels, and nothing new is NaN or infinite."""

import math

import pytest
import torch
from derivatives import outcome
from torch.nn import functional as F

import nanguard
from nanguard.stabilizer.graft import graft


def lse(x, *places, keep=False):
    return torch.logsumexp(x[:, list(places)], 1, keepdim=keep)


def share(x, *places):
    return lse(x, *places) - torch.logsumexp(x, 1)


def running(x, places):
    return torch.stack([lse(x, *some) for some in places], 1)


def with_exp(function):
    return lambda x: function(x.exp()).log()


def with_softmax(function):
    return lambda x: function(x.softmax(1)).log()


def survival(function):
    return lambda x: function((1 - x.sigmoid()).cumprod(1)).log()


def shifted(s):
    return torch.cat([torch.ones_like(s[:, :1]), s[:, :-1]], 1) - s


def padded(s):
    return F.pad(s[:, :-1], (1, 0), value=1.0) - s


def surviving(x):
    return F.logsigmoid(-x).cumsum(1)


# The first two of five logits are the largest, so that all digits cancel where these are subtracted.
SUMS = {
    "slice": (lambda e: e.sum(1) - e[:, :2].sum(1), lambda x: lse(x, 2, 3, 4)),
    "slice at the end": (lambda e: e.sum(1) - e[..., -3:].sum(-1), lambda x: lse(x, 0, 1)),
    "steps": (lambda e: e.sum(1) - e[:, ::2].sum(1), lambda x: lse(x, 1, 3)),
    "list": (lambda e: e.sum(1) - e[:, [1, 0]].sum(1), lambda x: lse(x, 2, 3, 4)),
    "parts of a list": (lambda e: e.sum(1) - e[:, [0, 3]].sum(1), lambda x: lse(x, 1, 2, 4)),
    "of a part": (lambda e: e[:, :4].sum(1) - e[:, :2].sum(1), lambda x: lse(x, 2, 3)),
    "kept": (lambda e: e.sum(1, keepdim=True) - e[:, :1], lambda x: lse(x, 1, 2, 3, 4, keep=True)),
    "kept, summed": (
        lambda e: e.sum(1, keepdim=True) - e[:, :2].sum(1, keepdim=True),
        lambda x: lse(x, 2, 3, 4, keep=True),
    ),
    "narrow": (lambda e: e.sum(1) - e.narrow(1, 0, 2).sum(1), lambda x: lse(x, 2, 3, 4)),
    "one by one": (lambda e: e.sum(1) - e[:, 0] - e[:, 1], lambda x: lse(x, 2, 3, 4)),
    "together": (lambda e: e.sum(1) - (e[:, 0] + e[:, 1]), lambda x: lse(x, 2, 3, 4)),
    "mean": (lambda e: e.mean(1) * 5 - e[:, 0], lambda x: lse(x, 1, 2, 3, 4)),
    "share of a mean": (lambda e: e.mean(1) - e[:, 0] / 5, lambda x: lse(x, 1, 2, 3, 4) - math.log(5)),
    "largest": (lambda e: e.sum(1) - e.max(1).values, lambda x: lse(x, 1, 2, 3, 4)),
    "largest, kept": (lambda e: e.sum(1, keepdim=True) - e.amax(1, True), lambda x: lse(x, 1, 2, 3, 4, keep=True)),
    "two largest": (lambda e: e.sum(1) - e.topk(2, 1)[0].sum(1), lambda x: lse(x, 2, 3, 4)),
    "sorted": (lambda e: e.sum(1) - e.sort(1, descending=True)[0][:, :2].sum(1), lambda x: lse(x, 2, 3, 4)),
    "running": (lambda e: (lambda c: c[:, 1:] - c[:, :-1])(e.cumsum(1)), lambda x: x[:, 1:]),
    "running, diff": (lambda e: e.cumsum(1).diff(dim=1), lambda x: x[:, 1:]),
    "running, two": (
        lambda e: (lambda c: c[:, 2:] - c[:, :-2])(e.cumsum(1)),
        lambda x: running(x, [(1, 2), (2, 3), (3, 4)]),
    ),
    "running, without": (
        lambda e: (e.cumsum(1) - e)[:, 1:],
        lambda x: running(x, [range(k) for k in range(1, 5)]),
    ),
    "running, behind": (
        lambda e: (e.sum(1, keepdim=True) - e.cumsum(1))[:, :-1],
        lambda x: running(x, [range(k, 5) for k in range(1, 5)]),
    ),
    "running backwards, those behind": (
        lambda e: (e.flip(1).cumsum(1).flip(1) - e)[:, :-1],
        lambda x: running(x, [(1, 2, 3, 4), (2, 3, 4), (3, 4), (4,)]),
    ),
    "running, from there": (lambda e: (lambda c: c[:, -1] - c[:, 1])(e.cumsum(1)), lambda x: lse(x, 2, 3, 4)),
}
PROBABILITIES = {
    "slice": (lambda p: 1 - p[:, :2].sum(1), lambda x: share(x, 2, 3, 4)),
    "list": (lambda p: 1 - p[:, [0, 1]].sum(1), lambda x: share(x, 2, 3, 4)),
    "parts of a list": (lambda p: 1 - p[:, [0, 2]].sum(1), lambda x: share(x, 1, 3, 4)),
    "one by one": (lambda p: 1 - p[:, 0] - p[:, 1], lambda x: share(x, 2, 3, 4)),
    "together": (lambda p: 1 - (p[:, 0] + p[:, 1]), lambda x: share(x, 2, 3, 4)),
    "two largest": (lambda p: 1 - p.topk(2, 1)[0].sum(1), lambda x: share(x, 2, 3, 4)),
    "sorted": (lambda p: 1 - p.sort(1, descending=True)[0][:, :2].sum(1), lambda x: share(x, 2, 3, 4)),
    "running": (lambda p: (lambda c: c[:, 1:] - c[:, :-1])(p.cumsum(1)), lambda x: F.log_softmax(x, 1)[:, 1:]),
}
SURVIVAL = {
    "next": (lambda s: s[:, :-1] - s[:, 1:], lambda x: surviving(x)[:, :-1] + F.logsigmoid(x[:, 1:])),
    "diff": (lambda s: -s.diff(dim=1), lambda x: surviving(x)[:, :-1] + F.logsigmoid(x[:, 1:])),
    "from 1": (shifted, lambda x: F.pad(surviving(x)[:, :-1], (1, 0)) + F.logsigmoid(x)),
    "padded": (padded, lambda x: F.pad(surviving(x)[:, :-1], (1, 0)) + F.logsigmoid(x)),
}
# The logits are no part of what is known, so that nobody can tell which summands these are.
VIEWS = {
    "one": (
        lambda x: (x[:5].exp().sum(1) - x[:5, 0].exp()).log(),
        lambda x: lse(x[:5], 1, 2, 3, 4),
    ),
    "margin": (
        with_softmax(lambda p: p[:, 0] - p[:, 1]),
        lambda x: F.log_softmax(x, 1)[:, 0] + torch.log(-torch.expm1(x[:, 1] - x[:, 0])),
    ),
    "weighed": (
        with_exp(lambda e: e.sum(1) - 0.75 * e[:, 0]),
        lambda x: torch.logsumexp(x - torch.tensor([math.log(4), 0, 0, 0, 0], dtype=x.dtype), 1),
    ),
    "positive pair": (
        with_exp(lambda e: e[:, :1] / (e.sum(1, keepdim=True) - e[:, :1])),
        lambda x: x[:, :1] - lse(x, 1, 2, 3, 4, keep=True),
    ),
}
POINTS = torch.tensor(
    [
        [1.0, 0.5, -0.5, 0.25, 0.0],
        [16.0, 9.0, 1.0, 0.5, -2.0],
        [62.0, 57.0, 52.0, 50.0, 49.0],
        [30.0, 15.0, -30.0, -31.0, -60.0],
        [-0.125, -30.0, -60.0, -61.0, -90.0],
        [300.0, 200.0, 120.0, 125.0, -300.0],
    ]
)
CASES = [
    pytest.param(wrap(function), exact, id=f"{group}, {name}")
    for group, cases, wrap in (
        ("sum", SUMS, with_exp),
        ("probability", PROBABILITIES, with_softmax),
        ("survival", SURVIVAL, survival),
        ("opaque", VIEWS, lambda function: function),
    )
    for name, (function, exact) in cases.items()
]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("function", "exact"), CASES)
def test_value_and_gradient_are_those_of_exact_arithmetic(function, exact, compiled):
    found = outcome(function, POINTS, compiled=compiled)
    for one, other in zip(found, outcome(exact, POINTS.double(), guard=False), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(("function", "exact"), CASES)
def test_second_derivatives_are_those_of_exact_arithmetic(function, exact):
    def second(function, x):
        x = x.clone().requires_grad_()
        (first,) = torch.autograd.grad((function(x) + 9).square().sum(), x, create_graph=True)
        return torch.autograd.grad((first * torch.arange(1.0, 6.0, dtype=x.dtype)).sum(), x)[0]

    points = POINTS[:2].double()
    with nanguard.stabilize() as swaps:
        found = second(function, points)
    assert swaps
    torch.testing.assert_close(found, second(exact, points), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("function", "exact"), CASES)
def test_it_is_the_same_row_by_row(function, exact):
    with nanguard.stabilize():
        found = torch.func.vmap(lambda row: function(row[None])[0])(POINTS[:5])
        slopes = torch.func.vmap(torch.func.grad(lambda row: function(row[None]).sum()))(POINTS[:5])
    for one, other in zip((found, slopes), outcome(exact, POINTS[:5].double(), guard=False), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-5, atol=1e-6)


NOT_KNOWN = {
    "other weights": with_exp(lambda e: e.sum(1) - 1.25 * e[:, 0]),
    "twice the same": with_exp(lambda e: e.sum(1) - e[:, [4, 4]].sum(1)),
    "other rows": with_exp(lambda e: e.sum(1) - e.flip(0)[:, :2].sum(1)),
    "the other dim": with_exp(lambda e: 9 * e[:5].sum(1) - e[:5].sum(0)),
    "too much": with_exp(lambda e: e[:, 2:].sum(1) - e[:, :3].sum(1)),
    "an index": with_softmax(lambda p: 1 - p.gather(1, torch.tensor([[3, 3]]).expand(len(p), 2)).sum(1)),
    "views": lambda x: (x.exp().sum(1) - x[:, :2].exp().sum(1)).log(),
    "running": with_softmax(lambda p: p.cumsum(1)[:, 2:] - 1.5 * p.cumsum(1)[:, :-2]),
    "survival": survival(lambda s: s[:, :-2] - s[:, 2:]),
    "squares": with_softmax(lambda p: 1 - (p * p).sum(1)),
    "two totals": lambda x: (x.exp().sum(1) - (x - 0.125).exp().sum(1)).log(),
}


@pytest.mark.parametrize("function", NOT_KNOWN.values(), ids=NOT_KNOWN)
def test_what_is_no_part_is_left_a_difference(function):
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for one, other in zip(outcome(function, x), outcome(function, x, guard=False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, equal_nan=True)


EVERYTHING = [*CASES, *(pytest.param(function, None, id=name) for name, function in NOT_KNOWN.items())]


@pytest.mark.parametrize("scale", [0.5, 6.0, 20.0, 90.0])
@pytest.mark.parametrize(("function", "exact"), EVERYTHING)
def test_what_was_finite_stays_finite(function, exact, scale):
    x = torch.randn(40, 1, 5, generator=torch.Generator().manual_seed(3)) * scale
    for row in x:
        plain, found = outcome(function, row, guard=False), outcome(function, row)
        for one, other in zip(plain, found, strict=True):
            assert other[one.isfinite()].isfinite().all()
            assert not other[~one.isnan()].isnan().any()


def test_in_place_too():
    x = torch.tensor([[16.0, 1.0, 0.5]], requires_grad=True)
    with nanguard.stabilize() as swaps:
        e = x.exp()
        value = (e.sum(1) - e[:, :1].sum(1)).log_()
    assert swaps
    torch.testing.assert_close(value, lse(x, 1, 2))
    torch.testing.assert_close(torch.autograd.grad(value.sum(), x)[0], torch.tensor([[0.0, 0.62245935, 0.37754067]]))


@pytest.mark.parametrize(("first", "wanted"), [(1.0, [5.0, 0.25]), (math.inf, [5.0, 0.0])], ids=["finite", "overflown"])
def test_where_the_plain_value_is_put_in_so_is_its_derivative(first, wanted):
    """Unless something else has overflown on the plain way, where a derivative of 0 would become NaN."""
    x = torch.tensor([1.0, 4.0], requires_grad=True)
    naive = x * torch.tensor([first, 2.0])
    lost = torch.tensor([False, True])
    result = graft(naive, (5 * x).masked_fill(lost, math.nan), torch.float32, False, torch.div, torch.log)
    torch.testing.assert_close(result.detach(), torch.tensor([5.0, math.log(8)]))
    torch.testing.assert_close(torch.autograd.grad(result.sum(), x)[0], torch.tensor(wanted))


@pytest.mark.parametrize("of", [torch.exp, torch.sigmoid, lambda x: torch.softmax(x, 1)])
def test_of_what_is_behind_the_last_nothing_is_left(of):
    def run(x):
        p = of(x)
        return torch.log(p.flip(1).cumsum(1).flip(1) - p + 1e-10)

    torch.manual_seed(0)
    for width in range(3, 18):
        x = torch.randn(20, width)
        with nanguard.stabilize():
            value = run(x)
        torch.testing.assert_close(value.double(), run(x.double()), rtol=1e-4, atol=1e-4)
