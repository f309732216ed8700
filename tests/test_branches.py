"""Branches of `torch.where` that are not taken, eager and compiled: value and gradient are those of what is taken."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import nanguard

X = torch.tensor([[0.0, 2, -3], [1, 0.5, -1], [-0.0, 300, 1e-4]])


def logarithm(x, y):
    return torch.where(x > 0, torch.log(y), torch.zeros_like(x))


def times_itself(x, y):
    return torch.where(x > 0, x * torch.log(y), torch.zeros(()))


def root(x, y):
    return torch.where(x > 0, torch.sqrt(y), 0.0)


def power(x, y):
    return torch.where(x <= 0, torch.zeros_like(x), y**0.5)


def quotient(x, y):
    return torch.where(x == 0, torch.ones_like(x), torch.sin(x) / y)


def exponential(x, y):
    return torch.where(x > 2, x, torch.exp(y) - 1)


def filled(x, y):
    return torch.log(y).masked_fill(x <= 0, 2.0)


def inverse_sine(x, y):
    return torch.where(x.abs() < 1, torch.asin(y) * 2, x)


def inverse_cosine(x, y):
    return x.where(x.abs() >= 1, y.acos())


def norm(x, y):
    squares, taken = (y * y).sum(1), (x > 0).any(1)
    return torch.where(taken, torch.sqrt(squares), squares)


def larger(x, y):
    return torch.maximum(-torch.exp(y) * 0.5, x - 8.0)


def smaller(x, y):
    return torch.min(torch.exp(y), 2.0 + 0.0 * x)


def made_finite(x, y):
    return torch.nan_to_num(x * torch.log(y), nan=0.0)


# Where the branch is taken, and what harmless numbers stand elsewhere.
CASES = {
    logarithm: lambda x: x > 0,
    times_itself: lambda x: x > 0,
    root: lambda x: x > 0,
    power: lambda x: x > 0,
    quotient: lambda x: x != 0,
    exponential: lambda x: x <= 2,
    filled: lambda x: x > 0,
    inverse_sine: lambda x: x.abs() < 1,
    inverse_cosine: lambda x: x.abs() < 1,
    made_finite: lambda x: x > 0,
    larger: lambda x: x <= 2,
    smaller: lambda x: x <= 0.5,
}


def value_and_gradient(loss, x, *more):
    x = x.clone().requires_grad_()
    value = loss(x, *more)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


def as_written(loss):
    return lambda x: loss(x, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("mode", ["eager", "compiled", "dynamic"])
@pytest.mark.parametrize("loss", CASES, ids=lambda loss: loss.__name__)
def test_the_gradient_is_that_of_what_is_taken(loss, mode, dtype):
    taken, x = CASES[loss], X.to(dtype)
    function = as_written(loss)
    torch._dynamo.reset()
    if mode != "eager":
        function = torch.compile(function, backend="aot_eager", dynamic=mode == "dynamic")
    with nanguard.stabilize() as swaps:
        found = value_and_gradient(function, x)
    assert [swap.rule for swap in swaps] == ["NG401"]
    selected = times_itself if loss is made_finite else loss
    expected = value_and_gradient(lambda x: selected(x, torch.where(taken(x), x, 0.5)), x)
    plain, _ = value_and_gradient(as_written(loss), x)
    assert torch.equal(found[0], plain)
    assert torch.equal(found[1], expected[1].nan_to_num())


@pytest.mark.parametrize("loss", CASES, ids=lambda loss: loss.__name__)
def test_compiled_branches_that_are_harmless_keep_their_bits(loss):
    x = torch.rand(4, 3) * 0.9 + 0.05
    plain = value_and_gradient(as_written(loss), x)
    torch._dynamo.reset()
    with nanguard.stabilize():
        found = value_and_gradient(torch.compile(as_written(loss), backend="aot_eager"), x)
    assert all(torch.equal(one, other) for one, other in zip(plain, found, strict=True))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_branch_that_somebody_watches_stays_as_it_is(compiled):
    def watched(x):
        branch = torch.log(x)
        branch.register_hook(lambda grad: grad * 2)
        return torch.where(x > 0, branch, torch.zeros_like(x))

    torch._dynamo.reset()
    plain = value_and_gradient(watched, X)
    with nanguard.stabilize() as swaps:
        found = value_and_gradient(torch.compile(watched, backend="aot_eager") if compiled else watched, X)
    assert swaps == []
    torch.testing.assert_close(found, plain, rtol=0, atol=0, equal_nan=True)


def test_a_branch_that_somebody_watches_after_a_checkpoint_stays_as_it_is():
    def watched(x):
        branch = torch.log(x)
        other = checkpoint(lambda x: torch.log(x.abs() + 1), x, use_reentrant=False)
        branch.register_hook(lambda grad: grad * 2)
        return torch.where(x > 0, branch, other)

    plain = value_and_gradient(watched, X)
    with nanguard.stabilize() as swaps:
        found = value_and_gradient(watched, X)
    assert swaps == []
    torch.testing.assert_close(found, plain, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_branch_with_a_region_of_its_own_shape(compiled):
    """One row is one element of the mask: what is not taken of it is not computed anew element by element."""
    torch._dynamo.reset()
    x = torch.tensor([[3.0, 4], [0, 0], [0, 1]])
    function = as_written(norm)
    with nanguard.stabilize():
        value, gradient = value_and_gradient(torch.compile(function, backend="aot_eager") if compiled else function, x)
    assert torch.equal(value, torch.tensor([5.0, 0, 1]))
    assert torch.equal(gradient, torch.tensor([[0.6, 0.8], [0, 0], [0, 1]]))


BOUNDED = {
    "exponential": (torch.exp, lambda p: p.clamp(max=20.0)),
    "ratio": (lambda x: torch.exp(2 * x), lambda p: torch.clamp(p, 0.8, 3) * 2),
    "logarithm": (lambda x: torch.log(x.abs()), lambda p: torch.clamp_min(p, -10)),
    "quotient": (lambda x: 1 / x, lambda p: torch.clamp_max(p, 4)),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", BOUNDED)
def test_beyond_bounds_the_derivative_is_zero(name, compiled):
    function, bound = BOUNDED[name]

    def loss(x):
        return bound(function(x))

    x = X.clone().requires_grad_()
    plain = loss(x)
    p = function(x).detach().requires_grad_()
    slope = torch.autograd.grad(bound(p).sum(), p)[0]
    harmless = torch.where(slope != 0, x, 0.5)
    expected = torch.autograd.grad((function(harmless) * slope).sum(), x)[0]
    torch._dynamo.reset()
    with nanguard.stabilize() as swaps:
        value, gradient = value_and_gradient(torch.compile(loss, backend="aot_eager") if compiled else loss, X)
    assert [swap.rule for swap in swaps] == ["NG401"]
    assert torch.equal(value, plain)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0)


CLIPPED = {
    "min": lambda r, a: -torch.min(r * a, torch.clamp(r, 0.8, 1.2) * a),
    "max": lambda r, a: torch.max(-a * r, -a * torch.clamp(r, 0.8, 1.2)),
    "method": lambda r, a: -(r * a).minimum(r.clamp(0.8, 1.2) * a),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", CLIPPED)
def test_a_clipped_surrogate(name, compiled):
    """PPO, where the new policy is far more likely than the old one to act as it did: the bounded term is taken."""
    advantages = torch.tensor([1.0, 1.0, -2.0, 1.5, 2.0])

    def loss(x):
        return CLIPPED[name](torch.exp(x), advantages)

    x = torch.tensor([200.0, 0.1, -5.0, 0.0, 0.5])
    plain, slope = value_and_gradient(loss, x)
    assert slope.isnan().tolist() == [True, False, False, False, False]
    torch._dynamo.reset()
    with nanguard.stabilize() as swaps:
        value, gradient = value_and_gradient(torch.compile(loss, backend="aot_eager") if compiled else loss, x)
    assert {swap.rule for swap in swaps} == {"NG401"}
    assert torch.equal(value, plain)
    assert torch.equal(gradient, slope.nan_to_num(0.0))


@pytest.mark.parametrize("larger", [True, False])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_of_equals_both_are_taken_and_of_a_nan_all(larger, compiled):
    select = torch.maximum if larger else torch.minimum
    sign = -1.0 if larger else 1.0

    def loss(x, y):
        return select(sign * torch.exp(x), sign * torch.exp(y) * 1.0)

    x = torch.tensor([200.0, 1.0, 1.0, 2.0, torch.nan, 0.0])
    other = torch.tensor([1.0, 200.0, 1.0, 3.0, 1.0, torch.nan])
    expected = value_and_gradient(loss, x, other)
    torch._dynamo.reset()
    with nanguard.stabilize():
        found = value_and_gradient(torch.compile(loss, backend="aot_eager") if compiled else loss, x, other)
    assert torch.equal(found[0].nan_to_num(7.0), expected[0].nan_to_num(7.0))
    torch.testing.assert_close(found[1][1:], expected[1][1:], rtol=0, atol=0, equal_nan=True)
    assert found[1][0] == 0
    assert expected[1][0].isnan()


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return -grad


def _without_derivative(tensor):
    with torch.no_grad():
        tensor.mul_(0.5)


EDITS = {
    "in place": lambda tensor: tensor.neg_(),
    "assignment": lambda tensor: tensor.__setitem__((slice(None), 1), 5.0),
    "through a view": lambda tensor: tensor[1].mul_(2),
    "under no_grad": _without_derivative,
    "through .data": lambda tensor: tensor.data.mul_(0.5),
    "by NumPy": lambda tensor: tensor.detach().numpy().__imul__(0.5),
    "detached": lambda tensor: tensor.detach_(),
    "by a function of its own": Reversed.apply,
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize(
    "selected", [lambda x, y: torch.where(x > 0, y, 0.0), lambda x, y: y.nan_to_num(0.0, 0.0, 0.0)]
)
def test_edited_branches_stay_as_they_are(edit, selected):
    def loss(x):
        y = torch.log(x)
        EDITS[edit](y)
        return selected(x, y) + 0 * x

    x = X.clone().requires_grad_()
    plain = loss(x)
    (slope,) = torch.autograd.grad(plain.sum(), x)
    with nanguard.stabilize() as swaps:
        value, gradient = value_and_gradient(loss, X)
    assert not swaps
    assert torch.equal(value, plain)
    torch.testing.assert_close(gradient, slope, rtol=0, atol=0, equal_nan=True)
