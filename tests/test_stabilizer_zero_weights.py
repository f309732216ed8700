"""A weight of exactly 0, as at the beginning and the end of an annealed mixture, does not forget what the rest is."""

import pytest
import torch

import nanguard

X = torch.tensor([[0.0, -150.0, -200.0], [1.0, 2.0, -3.0]])

MIXTURES = {
    "sum": lambda p, weight: (1 - weight) * p[:, 1] + weight * p[:, 2],
    "numbers behind": lambda p, weight: p[:, 1] * (1 - weight) + p[:, 2] * weight,
    "tensors of one number": lambda p, weight: torch.tensor(1 - weight) * p[:, 1] + torch.tensor(weight) * p[:, 2],
    "lerp": lambda p, weight: torch.lerp(p[:, 1], p[:, 2], weight),
    "in place": lambda p, weight: p[:, 1].mul(1 - weight).add_(p[:, 2].mul(weight)),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("name", MIXTURES)
def test_of_two_probabilities_one_is_left(name, weight, compiled):
    def loss(x):
        return -torch.log(MIXTURES[name](torch.softmax(x, 1), weight))

    torch._dynamo.reset()
    x = X.clone().requires_grad_()
    with nanguard.stabilize() as swaps:
        value = (torch.compile(loss, backend="aot_eager") if compiled else loss)(x)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    z = X.double().requires_grad_()
    expected = -z.log_softmax(1)[:, 1 + int(weight)]
    (slope,) = torch.autograd.grad(expected.sum(), z)
    assert [swap.rule for swap in swaps] == ["NG107"]
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-6, atol=1e-6)


def test_forward_variables_in_a_list():
    """A forward algorithm over numbers, of which most are still 0."""
    x = torch.tensor([[-90.0, -1.0], [-80.0, -2.0], [-95.0, -3.0]], requires_grad=True)
    with nanguard.stabilize():
        p = torch.exp(x)
        alphas = [torch.tensor(1.0), torch.tensor(0.0)]
        for row in p:
            alphas = [alphas[0] * row[0], (alphas[0] + alphas[1]) * row[1]]
        value = torch.log(alphas[0] + alphas[1])
    (gradient,) = torch.autograd.grad(value, x)
    z = x.detach().double().requires_grad_()
    stay, move = torch.tensor(0.0, dtype=torch.float64), torch.tensor(-torch.inf, dtype=torch.float64)
    for row in z:
        stay, move = stay + row[0], torch.logaddexp(stay, move) + row[1]
    expected = torch.logaddexp(stay, move)
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(expected, z)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_times_0_is_none(bad):
    x = X.clone()
    x[0, 2] = bad
    with nanguard.stabilize():
        value = torch.log(0.0 * torch.exp(x)[:, 2] + torch.softmax(X, 1)[:, 0])
    assert value.isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    "function",
    [
        lambda p: torch.log(0.0 * p),
        lambda p: torch.log((p * 0).sum(1)),
        lambda p: 1 / (p * 0),
        lambda p: torch.sqrt(p * 0.0),
        lambda p: (p * 0) / (p * 0).sum(1, keepdim=True),
        lambda p: torch.log(torch.prod(p * 0, 1)),
        lambda p: torch.log(p / 0.0),
    ],
)
def test_where_nothing_is_left_all_stays_as_it_is(function):
    def run():
        x = X.clone().requires_grad_()
        value = function(torch.exp(x))
        return value.detach(), torch.autograd.grad(value.sum(), x)[0]

    expected = run()
    with nanguard.stabilize() as swaps:
        found = run()
    assert not swaps
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
