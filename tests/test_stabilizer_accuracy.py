"""Where the numbers of the user's code have all their digits, they are kept; where they have not, they are replaced."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import nanguard
from nanguard.stabilizer.accuracy import keeps_digits

ROWS = torch.arange(6)
TARGET = torch.tensor([0, 3, 1, 2, 2, 0])

FORMS = {
    "softmax": lambda x: torch.softmax(x, 1)[ROWS, TARGET].log(),
    "softmax, all": lambda x: torch.softmax(x, 1).log().gather(1, TARGET[:, None]).squeeze(1),
    "quotient": lambda x: torch.log((x.exp() / x.exp().sum(1, keepdim=True))[ROWS, TARGET]),
    "one exponential": lambda x: (lambda e: torch.log((e / e.sum(1)[:, None])[ROWS, TARGET]))(torch.exp(x)),
    # A part of an exponential is always replaced: elsewhere it may be inf.
    "by rows": lambda x: torch.stack([torch.log((e / e.sum())[y]) for e, y in zip(x.exp(), TARGET, strict=True)]),
}


def exact(x):
    """Value and gradient in float64."""
    x = x.detach().double().requires_grad_()
    value = x.log_softmax(1)[ROWS, TARGET]
    (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), gradient


def run(function, x, guard=True):
    x = x.clone().requires_grad_()
    if guard:
        with nanguard.stabilize() as swaps:
            value = function(x)
    else:
        swaps, value = [], function(x)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), gradient, swaps


class TestModerateNumbers:
    @pytest.mark.parametrize("name", sorted(set(FORMS) - {"by rows"}))
    def test_are_kept_to_the_last_bit_and_told(self, name):
        x = torch.randn(6, 4)
        value, gradient, swaps = run(FORMS[name], x)
        plain, slope, _ = run(FORMS[name], x, guard=False)
        assert torch.equal(value, plain)
        assert torch.equal(gradient, slope)
        assert swaps

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_are_replaced_where_the_dtype_has_few_digits(self, dtype):
        x = torch.randn(6, 4).to(dtype)
        value, _, _ = run(FORMS["quotient"], x)
        torch.testing.assert_close(value, exact(x)[0].to(dtype))
        assert not keeps_digits(torch.ones(2, dtype=dtype))

    def test_a_derivative_of_a_probability_is_that_of_the_plain_logarithm(self):
        x = torch.randn(6, 4, requires_grad=True)
        with nanguard.stabilize():
            p = torch.softmax(x, 1)
            loss = p.log().sum()
        (gradient,) = torch.autograd.grad(loss, p)
        assert torch.equal(gradient, 1 / p)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_are_replaced_in_regions_as_what_is_recomputed_may_differ(self, reentrant):
        """Dropout without the random numbers of the first run: the second one needs as many saved tensors all the same."""

        def region(x):
            return FORMS["softmax"](torch.nn.functional.dropout(x, 0.5) * 40)

        for _ in range(10):
            x = torch.randn(6, 4, requires_grad=True)
            with nanguard.stabilize():
                value = checkpoint(region, x, use_reentrant=reentrant, preserve_rng_state=False)
            value.sum().backward()
            assert x.grad.isfinite().all()


class TestBounds:
    @pytest.mark.parametrize("exponent", [-25, -24, -23, 23, 24, 25])
    def test_are_powers_of_two(self, exponent):
        assert keeps_digits(torch.tensor([1.0, 2.0**exponent])) is (abs(exponent) <= 24)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0, -1.0])
    def test_nothing_else_is_kept(self, bad):
        assert not keeps_digits(torch.tensor([1.0, bad]))
        assert not keeps_digits(torch.tensor([bad]))

    def test_an_empty_tensor_is_not_kept(self):
        assert not keeps_digits(torch.empty(0))


class TestOneBadRow:
    """Some rows are moderate, and others are not: neither may spoil the other."""

    BAD = (
        [1000.0, 1.0, -1000.0, 0.0],
        [-1000.0, -1000.0, -1000.0, -1001.0],
        [90.0, 89.0, -90.0, 0.0],
        [60.0, -60.0, 0.0, 1.0],
        [0.0, -103.0, -88.0, -95.0],
    )

    @pytest.mark.parametrize("bad", BAD, ids=str)
    @pytest.mark.parametrize("name", FORMS)
    def test_value_and_gradient(self, name, bad):
        x = torch.randn(6, 4)
        x[2] = torch.tensor(bad)
        value, gradient, _ = run(FORMS[name], x)
        expected, slope = exact(x)
        torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(gradient.double(), slope, rtol=2e-6, atol=2e-6)


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(sorted(FORMS)),
    scale=st.floats(-2, 3).map(lambda power: 10.0**power),
    shift=st.floats(-200, 200),
    seed=st.integers(0, 2**16),
    weight=st.sampled_from([1.0, 65536.0, 1e-8]),
)
def test_law_value_and_gradient_are_those_of_exact_arithmetic(name, scale, shift, seed, weight):
    """Whatever side of the bounds the numbers are on."""
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)) * scale + shift
    value, gradient, swaps = run(lambda x: FORMS[name](x) * weight, x)
    expected, slope = exact(x)
    size = x.abs().max().item()
    torch.testing.assert_close(value.double(), expected * weight, rtol=4e-6, atol=weight * 1e-6 * max(1.0, size))
    torch.testing.assert_close(gradient.double(), slope * weight, rtol=1e-4, atol=weight * 1e-6 * max(1.0, size))
    assert swaps


def test_second_derivatives():
    x = torch.randn(6, 4).double().requires_grad_()
    y = (torch.randn(6, 4) * 300).double().requires_grad_()
    for point in (x, y):
        with nanguard.stabilize():
            value = FORMS["quotient"](point).sum()
        (gradient,) = torch.autograd.grad(value, point, create_graph=True)
        (second,) = torch.autograd.grad((gradient**2).sum(), point)
        (slope,) = torch.autograd.grad(point.log_softmax(1)[ROWS, TARGET].sum(), point, create_graph=True)
        (expected,) = torch.autograd.grad((slope**2).sum(), point)
        torch.testing.assert_close(second, expected)


class TestNearOne:
    """The logarithm of what is close to 1 loses its digits, and what is computed from it fails."""

    @pytest.mark.parametrize("point", [-16.0, -20.0, -60.0])
    def test_poisson_with_a_softplus_link(self, point):
        x = torch.tensor([point], requires_grad=True)
        with nanguard.stabilize():
            rate = (1 + x.exp()).log()
            loss = (rate - 3 * rate.log()).sum()
        (gradient,) = torch.autograd.grad(loss, x)
        torch.testing.assert_close(loss.item(), -3 * point, rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient.item(), -3.0, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("others", [[], [-1.0], [-200.0], [200.0]])
    def test_a_sigmoid_does_not_depend_on_its_neighbours(self, others):
        x = torch.tensor([20.0, *others], requires_grad=True)
        with nanguard.stabilize():
            value = torch.sigmoid(x).log()
        (gradient,) = torch.autograd.grad(value.sum(), x)
        assert value[0].item() == pytest.approx(-2.0611537e-09, rel=1e-6)
        assert gradient[0].item() == pytest.approx(2.0611537e-09, rel=1e-6)

    def test_of_a_total(self):
        x = torch.tensor([[-40.0, -41.0], [-0.5, -1.0]])
        with nanguard.stabilize():
            value = torch.log1p(x.exp().sum(1))
        torch.testing.assert_close(value.double(), torch.log1p(x.double().exp().sum(1)), rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", sorted(set(FORMS) - {"by rows"}))
def test_huge_upstream_gradients(name):
    x = torch.randn(6, 4)
    x[1] = torch.tensor([0.0, 20.0, 1.0, -3.0])
    _, gradient, _ = run(lambda x: FORMS[name](x) * 1e30, x)
    torch.testing.assert_close(gradient.double(), exact(x)[1] * 1e30, rtol=1e-5, atol=1e24)
