"""What hostile users found: custom functions, memory shared with NumPy, saturated and infinite logits, second derivatives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import nanguard

DTYPE = torch.float32


def stabilized(function, *args):
    with nanguard.stabilize() as swaps:
        return function(*args), swaps


class Reversal(torch.autograd.Function):
    """The gradient reversal layer of domain-adversarial training."""

    hand_on = staticmethod(lambda x: x.view_as(x))

    @staticmethod
    def forward(ctx, x):
        return Reversal.hand_on(x)

    @staticmethod
    def backward(ctx, grad):
        return -grad


@pytest.mark.parametrize("hand_on", [lambda x: x, lambda x: x.view_as(x), lambda x: x[:], lambda x: x.clone()])
@pytest.mark.parametrize(
    "loss",
    [
        lambda z: torch.log(Reversal.apply(torch.softmax(z, 1)))[0, 0],
        lambda z: (Reversal.apply(z.exp()) / Reversal.apply(z.exp()).sum(1, keepdim=True))[0, 0],
        lambda z: torch.log(torch.softmax(Reversal.apply(z), 1))[0, 0],
    ],
)
def test_custom_functions_keep_their_derivative(monkeypatch, hand_on, loss):
    monkeypatch.setattr(Reversal, "hand_on", staticmethod(hand_on))
    z = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    (plain,) = torch.autograd.grad(loss(z), z)
    value, _ = stabilized(loss, z)
    (guarded,) = torch.autograd.grad(value, z)
    torch.testing.assert_close(guarded, plain)


@pytest.mark.parametrize(
    "share", [torch.from_numpy, torch.as_tensor, lambda array: torch.frombuffer(array, dtype=torch.float32)]
)
def test_memory_that_numpy_writes_into_between(share):
    array = np.array([1.0, 2.0, 3.0], dtype=np.float32)

    def loss():
        p = torch.softmax(share(array), 0)
        array[:] = 0
        return p.log()

    value, swaps = stabilized(loss)
    torch.testing.assert_close(value, torch.log_softmax(torch.tensor([1.0, 2.0, 3.0]), 0))
    assert len(swaps) == 1


def test_targets_in_memory_of_numpy():
    labels = np.array([2, 0])
    z = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])

    def loss():
        picked = torch.softmax(z, 1)[torch.arange(2), torch.from_numpy(labels)]
        labels[:] = 1
        return picked.log()

    value, _ = stabilized(loss)
    torch.testing.assert_close(value, torch.log_softmax(z, 1)[[0, 1], [2, 0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", [lambda z: 1 / (1 + torch.exp(-z)), lambda z: _ratio(z)])
def test_the_derivative_of_a_saturated_sigmoid_keeps_its_digits(form, dtype):
    z = torch.tensor(
        [-1000.0, -90.0, -20.0, -1.0, 0.0, 1.0, 12.0, 20.0, 30.0, 80.0, 1000.0], dtype=dtype, requires_grad=True
    )
    value, swaps = stabilized(form, z)
    assert [swap.rule for swap in swaps] == ["NG202"]
    (grad,) = torch.autograd.grad(value.sum(), z)
    exact = z.detach().double()
    torch.testing.assert_close(value.double(), torch.sigmoid(exact), rtol=1e-5, atol=1e-44)
    torch.testing.assert_close(grad.double(), torch.sigmoid(exact) * torch.sigmoid(-exact), rtol=1e-5, atol=1e-44)


def _ratio(z):
    e = z.exp()
    return e / (1 + e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("logarithm", [False, True])
def test_an_infinite_logit_brings_no_nan_that_was_not_there(dtype, logarithm):
    z = torch.tensor([[1.0, float("inf"), 2.0], [1.0, 2.0, 3.0]], dtype=dtype)

    def probabilities():
        e = z.exp()
        p = e / e.sum(1, keepdim=True)
        return p.log() if logarithm else p

    plain = probabilities()
    value, _ = stabilized(probabilities)
    assert torch.equal(value.isnan(), plain.isnan())
    assert torch.equal(value[0].nan_to_num(7), plain[0].nan_to_num(7))


@pytest.mark.parametrize(
    "form",
    [
        lambda z: torch.log(torch.softmax(z, 0) + 1e-8),
        lambda z: torch.log(1 + z.exp()),
        lambda z: torch.log(z.exp() + (-z).exp()),
        lambda z: torch.log(0.9 * torch.softmax(z, 0) + 0.1 / 3),
    ],
)
@pytest.mark.parametrize("values", [[1.0, 2.0, -120.0], [-95.0, 0.0, 50.0], [0.0, 0.0, 0.0], [1.0, 2.0, float("-inf")]])
def test_second_derivatives_have_no_new_nan(form, values):
    def penalty(z):
        (grad,) = torch.autograd.grad(form(z)[:2].sum(), z, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), z)[0]

    z = torch.tensor(values, requires_grad=True)
    plain = penalty(z)
    guarded, _ = stabilized(penalty, z)
    assert not (guarded.isnan() & ~plain.isnan()).any()
    assert (plain[:2].isnan() | torch.isclose(guarded[:2], plain[:2], rtol=1e-3, atol=1e-5)).all()


def test_meta_tensors_and_nested_tensors_are_left_alone():
    meta = torch.empty(3, 4, device="meta")
    value, swaps = stabilized(lambda: torch.softmax(meta, 1).log())
    assert value.shape == (3, 4)
    assert swaps == []
    nested = torch.nested.nested_tensor([torch.randn(2), torch.randn(3)], layout=torch.jagged)
    stabilized(lambda: torch.exp(nested) * 2)


def test_names_that_stand_for_something_else_are_not_suggested():
    def loss():
        logits = torch.tensor([[1.0, 2.0, 3.0]])
        return torch.log(torch.softmax(logits / 0.5, 1)), logits

    _, swaps = stabilized(loss)
    assert swaps[0].replacement == "F.log_softmax(scores, dim=1)"

    def sigmoid():
        z = torch.tensor([1.0, 2.0])
        return 1 / (1 + torch.exp(-z))

    _, swaps = stabilized(sigmoid)
    assert swaps[0].replacement == "torch.sigmoid(z)"


def _slope(function, values, dtype=torch.float32):
    point = torch.tensor(values, dtype=dtype, requires_grad=True)
    value = function(point)
    return value.detach().double(), torch.autograd.grad(value.sum(), point)[0].double()


RATIOS = {
    "clipped importance ratio": lambda r: torch.min(r, r.clamp(0.8, 1.2)),
    "bound": lambda r: r.clamp(max=1.0),
    "minimum": lambda r: torch.minimum(r, torch.ones_like(r)),
    "choice": lambda r: torch.where(r < 10, r, 10.0),
    "mask": lambda r: r.masked_fill(torch.tensor([True, False]), 0.0),
    "tanh": torch.tanh,
}


@pytest.mark.parametrize("loss", RATIOS.values(), ids=RATIOS)
@pytest.mark.parametrize(
    "ratio", [lambda a: a.softmax(0) / OLD, lambda a: a.exp() / torch.tensor([-30.0, -10.0]).exp()]
)
def test_a_ratio_that_overflows_brings_no_nan_where_nobody_asks_for_its_derivative(loss, ratio):
    values = [5.0, 0.0] if ratio(torch.zeros(2)).sum() > 1e20 else [80.0, -10.0]
    (_, plain), ((_, guarded), _) = (
        _slope(lambda a: loss(ratio(a)), values),
        stabilized(_slope, lambda a: loss(ratio(a)), values),
    )
    torch.testing.assert_close(guarded, plain)


OLD = torch.tensor([-95.0, 0.0]).softmax(0)

DIFFERENCES = {
    "epsilon": (lambda d: torch.log(1 - torch.exp(-d) + 1e-8), [0.0, 1.0]),
    "larger epsilon": (lambda d: torch.log(1 - torch.exp(-d) + 1e-6), [0.0, 1.0]),
    "small epsilon": (lambda d: torch.log(1 - torch.exp(-d) + 1e-12), [1e-30, 1.0]),
    "epsilon first": (lambda d: torch.log(1 + 1e-8 - torch.exp(-d)), [0.0, 1.0]),
    "odds": (lambda d: torch.log(torch.exp(-d) / (1 - torch.exp(-d) + 1e-8)), [0.0, 1.0]),
    "far below": (lambda z: torch.log(1 - z.exp()), [-8.0, -12.0, -16.0, -20.0, -50.0]),
    "close": (lambda z: torch.log(1 - z.exp()), [-1e-6, -0.1, -0.69, -0.7]),
    "log1p": (lambda z: torch.log1p(-z.exp()), [-8.0, -12.0, -16.0, -20.0]),
    "square": (lambda z: torch.log(1 - torch.exp(z) ** 2), [-5.0, -10.0]),
    "other constant": (lambda z: torch.log(2 - torch.exp(z)), [-5.0, -10.0]),
    "share": (lambda z: torch.log(1 - 0.5 * torch.exp(z)), [-5.0, -10.0]),
    "sinh": (lambda x: torch.log(torch.sinh(x)), [1e-5, 1.0, 200.0]),
}


@pytest.mark.parametrize(("function", "values"), DIFFERENCES.values(), ids=DIFFERENCES)
def test_a_difference_keeps_its_digits_and_its_epsilon(function, values):
    (value, slope), swaps = stabilized(_slope, function, values)
    assert swaps
    # The numbers as they are in float32.
    exact, expected = _slope(function, torch.tensor(values).double().tolist(), torch.float64)
    torch.testing.assert_close(value, exact, rtol=3e-6, atol=1e-9)
    torch.testing.assert_close(slope, expected, rtol=3e-6, atol=1e-12)


def test_an_infinite_derivative_stays():
    (_, slope), _ = stabilized(_slope, lambda d: torch.log(1 - torch.exp(-d)), [0.0])
    assert slope.item() == float("inf")


def test_no_classes_and_no_rows():
    for shape in ((3, 0), (0, 3)):
        value, _ = stabilized(lambda x: torch.log(1 - torch.softmax(x, 1)), torch.randn(shape))
        assert value.shape == shape


def test_a_mask_in_place_stays_in_place():
    x = torch.tensor([0.0, 2.0], requires_grad=True)
    with nanguard.stabilize():
        value = torch.log(x) * 1
        result = value.masked_fill_(x == 0, 0.0)
        assert result is value
        value.mul_(3)
    assert torch.equal(result, torch.log(torch.tensor([1.0, 8.0])))


EDITS = {
    "mul_": lambda q: q.mul_(0.5),
    "assignment": lambda q: q.__setitem__(0, 0.25),
    "clamp_": lambda q: q.clamp_(min=0.3),
    "copy_": lambda q: q.copy_(q.detach().flip(0)),
    "exp_": lambda q: q.exp_(),
}


@pytest.mark.parametrize("name", EDITS)
def test_edits_that_no_derivative_knows_of(name):
    z = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)

    def loss():
        q = torch.softmax(z, 0) * 1.0
        with torch.no_grad():
            EDITS[name](q)
        return q.log()

    guarded, _ = stabilized(loss)
    plain = loss()
    assert torch.equal(guarded, plain)
    assert torch.equal(*(torch.autograd.grad(value.sum(), z)[0] for value in (guarded, plain)))


@pytest.mark.parametrize("asked", [torch.log, torch.log2, torch.log10])
def test_derivative_at_a_subnormal_probability(asked):
    # 1 / p overflows, 1e-6 / p does not.
    z = torch.tensor([0.0, 95.0], requires_grad=True)

    def loss():
        p = torch.softmax(z, 0)
        return p, asked(p)

    (p, value), swaps = stabilized(loss)
    assert swaps
    (slope,) = torch.autograd.grad(value[0] * 1e-6, p)
    p, value = loss()
    assert 0 < p[0] < torch.finfo(p.dtype).tiny
    (expected,) = torch.autograd.grad(value[0] * 1e-6, p)
    torch.testing.assert_close(slope, expected)


def test_second_derivative_at_an_intermediate():
    z = torch.tensor([-200.0, 0.0, 1.0], requires_grad=True)
    with nanguard.stabilize() as swaps:
        p = torch.softmax(z, 0)
        value = torch.xlogy(2.0, p)
    assert swaps
    (slope,) = torch.autograd.grad(value[1], p, create_graph=True)
    (second,) = torch.autograd.grad(slope[1], p)
    torch.testing.assert_close(second[1], -2 / p[1].detach() ** 2)


@pytest.mark.parametrize("weight", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("probability", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2,), ()])
def test_result_has_the_wider_dtype(weight, probability, shape):
    z = torch.tensor([-300.0, 1.0], dtype=probability, requires_grad=True)

    def loss():
        return torch.xlogy(torch.ones(shape).to(weight), torch.softmax(z, 0))

    guarded, swaps = stabilized(loss)
    assert swaps
    assert guarded.dtype == loss().dtype
    (slope,) = torch.autograd.grad(guarded.sum(), z)
    torch.testing.assert_close(slope, torch.tensor([1.0, -1.0], dtype=probability))


def _edited(z, x):
    scaled = z * x
    with torch.no_grad():
        x.add_(1)
    return scaled


def _used_up(z, x):
    scaled = z * 2.0
    scaled.sum().backward()
    return scaled


@pytest.mark.parametrize("scale", [_edited, _used_up])
def test_names_are_not_taken_from_what_torch_does_not_hand_out(scale):
    z = torch.tensor([-300.0, 0.0, 1.0], requires_grad=True)
    with nanguard.stabilize() as swaps:
        held = [scale(z, torch.tensor([1.0, 1.0, 1.0]))]
        value = torch.softmax(held[0], 0).log()
    assert swaps
    torch.testing.assert_close(value, torch.log_softmax(held[0], 0))


def test_weight_of_a_logarithm_that_is_masked():
    z = torch.tensor([-torch.inf, 0.0, 1.0])

    def slope():
        weight = torch.tensor([0.5, 0.0, 2.0], requires_grad=True)
        value = torch.xlogy(weight, torch.softmax(z, 0))
        return torch.autograd.grad(value.masked_fill(z.isinf(), 0.0).sum(), weight)[0]

    guarded, swaps = stabilized(slope)
    assert swaps
    torch.testing.assert_close(guarded, slope())
