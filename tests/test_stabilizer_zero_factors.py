"""Weights and factors of exactly 0 that are learnt: they count for nothing, and have a derivative all the same."""

import pytest
import torch
from test_stabilizer_operands import run

import nanguard


def double(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def total(z, w):
    return torch.log((z.exp() * w).sum())


def shares(z, w):
    e = z.exp() * w
    return e / e.sum()


SUMS = {
    "one": (total, [60.0, -40.0], [0.0, 1.0]),
    "rectified": (lambda z, w: total(z, w.relu()), [60.0, -40.0], [-1.0, 1.0]),
    "matmul": (lambda z, w: torch.log(z.exp() @ w), [60.0, -40.0], [0.0, 1.0]),
    "einsum": (lambda z, w: torch.log(torch.einsum("i,i->", z.exp(), w)), [60.0, -40.0], [0.0, 1.0]),
    "wide": (total, [88.0, -14.0], [0.0, 1.0]),
    "overflow": (total, [110.0, 0.0], [0.0, 1.0]),
    "three": (total, [80.0, -20.0, 0.0], [0.0, 2.0, 1.0]),
    "wider than floats": (total, [100.0, -200.0, 0.0], [0.0, 2.0, 1.0]),
    "far below": (total, [-800.0, -1000.0, -1003.0], [0.0, 2.0, 1.0]),
    "two tensors": (lambda z, w: torch.log(z[0].exp() * w[0] + z[1].exp() * w[1]), [60.0, -40.0], [0.0, 1.0]),
    "one of two": (lambda z, w: torch.log(z[0].exp() * w[0] + z[1].exp()), [60.0, -40.0], [0.0, 1.0]),
    "running": (lambda z, w: torch.log((z.exp() * w).cumsum(0)[1:]), [60.0, -40.0, 1.0], [0.0, 1.0, 1.0]),
    "running, from far below": (
        lambda z, w: torch.log1p((z.exp() * w).cumsum(0)),
        [-44.0, 1.0, 4.0, 115.0, 117.0],
        [0.1, 0.5, 0.8, 0.2, 0.0],
    ),
    "shares, and an epsilon": (
        lambda z, w: torch.log(shares(z, w)[1:] + 0.5),
        [58.0, -45.0, -44.5],
        [0.0, 0.4, 0.7],
    ),
    "signs": (total, [60.0, -40.0, -40.5], [0.0, 1.0, -1.0]),
    "shares": (lambda z, w: shares(z, w) * torch.tensor([1.0, 2.0, 3.0]), [8.0, -4.0, 2.0], [0.0, 1.0, 0.5]),
    "wide shares": (shares, [88.0, -14.0], [0.0, 1.0]),
    "mean": (lambda z, w: torch.log((z.exp() * w).mean() + 1), [70.0, 1.0], [0.0, 1.0]),
    "none": (lambda z, w: torch.log(1 + (z.exp() * w).sum()), [3.0, -2.0, 0.0], [0.0, 0.0, 0.0]),
    "none, by log1p": (lambda z, w: torch.log1p((z.exp() * w).sum()), [60.0, -2.0, 0.0], [0.0, 0.0, 0.0]),
    "none, overflowing": (lambda z, w: torch.log1p((z.exp() * w).sum()), [110.0, -2.0, 0.0], [0.0, 0.0, 0.0]),
    "ratio": (lambda z, w: (w * z.exp()).sum() / (1 + (z / 60).exp()).sum(), [60.0, -60.0], [0.0, 1.0]),
    "difference": (lambda z, w: torch.log(1 - (z.sigmoid() * w).sum()), [60.0, -40.0], [0.0, 1.0]),
}


def as_floats(tensors):
    """What is beyond the range of float32 is infinite there."""
    return [tensor.float().double() for tensor in tensors]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", SUMS)
def test_what_weighs_nothing_is_not_compared_to(name, compiled):
    function, z, w = SUMS[name]
    tensors = torch.tensor(z, requires_grad=True), torch.tensor(w, requires_grad=True)
    value, gradients = run(function, *tensors, compiled=compiled)
    expected, slopes = run(function, double(*z).requires_grad_(), double(*w).requires_grad_(), guarded=False)
    if name == "far below":  # float64 vanishes, too
        expected = torch.log((torch.exp(double(*z) + 1000) * double(*w)).sum()) - 1000
        share = torch.exp(double(*z) - expected)
        slopes = (share * double(*w), share)
    if name == "wide shares":
        slopes = (torch.zeros(2).double(), torch.zeros(2).double())
    torch.testing.assert_close(value.double(), expected.double(), rtol=2e-5, atol=1e-8)
    torch.testing.assert_close(as_floats(gradients), as_floats(slopes), rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize("name", ["one", "three", "none", "signs"])
def test_transforms_differentiate_at_weights_of_0(name):
    function, z, w = SUMS[name]

    def slopes(dtype):
        return torch.func.grad(function, argnums=(0, 1))(torch.tensor(z, dtype=dtype), torch.tensor(w, dtype=dtype))

    with nanguard.stabilize():
        found = slopes(torch.float32)
        _, tangent = torch.func.jvp(
            function, (torch.tensor(z), torch.tensor(w)), (torch.zeros(len(z)), torch.ones(len(z)))
        )
    expected = slopes(torch.float64)
    torch.testing.assert_close(as_floats(found), as_floats(expected), rtol=1e-4, atol=1e-30)
    torch.testing.assert_close(tangent.double(), expected[1].sum().float().double(), rtol=1e-4, atol=0)


def test_a_large_product_of_matrices():
    """One that is not laid out: sums of which the largest parts weigh nothing."""
    generator = torch.Generator().manual_seed(0)
    z, w = torch.randn(40, 30, generator=generator), torch.rand(30, 20, generator=generator)
    z[:, 3] += 70.0
    z[5] -= 40.0
    w[3], w[:, 7] = 0.0, 0.0

    def function(z, w):
        return torch.log(1e-3 + z.exp() @ w)

    value, gradients = run(function, z.requires_grad_(), w.requires_grad_())
    expected, slopes = run(
        function, z.double().detach().requires_grad_(), w.double().detach().requires_grad_(), guarded=False
    )
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(as_floats(gradients), as_floats(slopes), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_an_infinite_exponential_times_0_is_no_number(weight):
    z, w = torch.tensor([torch.inf, 0.0]), torch.tensor([weight, 1.0], requires_grad=True)
    value, _ = run(total, z.requires_grad_(), w)
    assert value.isnan() if weight == 0 else value == torch.inf


ROWS = [[0.5, 0.0, 0.8], [0.5, 0.25, -0.8], [0.5, 0.0, 0.0], [1.0, 0.5, 0.0]]

PRODUCTS = {
    "log1p": lambda q: torch.log1p(q.prod(-1)),
    "rest": lambda q: torch.log(1 - q.prod(-1)),
    "plus one": lambda q: torch.log(q.prod(-1) + 1),
    "epsilon": lambda q: torch.log(q[::2].prod(-1) + 1e-8),
    "mixture": lambda q: torch.log(0.5 * q[::2].prod(-1) + 0.5 * (1 - q[::2]).prod(-1)),
    "noisy or": lambda q: torch.log(1 - (1 - q).prod(-1)),
    "of all": lambda q: torch.log1p(q.prod()),
    "other dim": lambda q: torch.log1p(q.prod(0, keepdim=True)),
    "weighed": lambda q: torch.log1p((q.detach().exp() * q).prod(-1)),
    "running": lambda q: torch.log1p(0.1 * (q.detach().sigmoid() * q).cumprod(-1)),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_the_only_factor_of_0_has_a_derivative(name, compiled):
    q = torch.tensor(ROWS, requires_grad=True)
    value, gradients = run(PRODUCTS[name], q, compiled=compiled)
    expected, slopes = run(PRODUCTS[name], q.double().detach().requires_grad_(), guarded=False)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(as_floats(gradients), as_floats(slopes), rtol=1e-5, atol=1e-6)
