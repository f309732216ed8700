"""Queries of several operands, and operands that they do not expect: what is differentiated at, bounds, small dtypes."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

import nanguard

LOGITS = torch.tensor([[1.0, -80.0, 3.0], [0.5, 200.0, -1.0]])
TARGETS = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.0, 0.4]])

# Of a tensor that is differentiated at, and of logits that are not; with the same, stably.
OF_TARGETS = {
    "xlogy": (lambda t, z: torch.xlogy(t, z.softmax(1)), lambda t, z: t * z.log_softmax(1)),
    "special": (lambda t, z: torch.special.xlogy(t, z.softmax(1)), lambda t, z: t * z.log_softmax(1)),
    "method": (lambda t, z: t.xlogy(z.sigmoid()), lambda t, z: t * F.logsigmoid(z)),
    "xlog1py": (lambda t, z: torch.special.xlog1py(t, -z.sigmoid()), lambda t, z: t * F.logsigmoid(-z)),
    "detached": (lambda t, z: torch.xlogy(t, (z * t.detach().sum()).sigmoid().detach()), None),
    "power": (lambda t, z: torch.log(z.softmax(1) ** t), lambda t, z: t * z.log_softmax(1)),
    "lerp": (lambda t, z: torch.log(torch.lerp(z.sigmoid(), z.softmax(1), t)), None),
    "weight": (lambda t, z: torch.log((z.softmax(1) * (t + 1)).sum(1)), None),
    "above": (lambda t, z: t / (1 + z.exp()), lambda t, z: t * torch.sigmoid(-z)),
    "choice": (lambda t, z: torch.log(torch.where(z > 0, t.exp(), z.exp())), lambda t, z: torch.where(z > 0, t, z)),
    "divergence": (
        lambda t, z: F.kl_div(torch.log(z.softmax(1)), t.softmax(1), reduction="none"),
        lambda t, z: t.softmax(1) * (t.log_softmax(1) - z.log_softmax(1)),
    ),
}


def run(function, *tensors, guarded=True, compiled=False):
    """The value, and the gradients at all that may have one."""
    tensors = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in tensors]
    torch._dynamo.reset()
    with nanguard.stabilize() if guarded else contextlib.nullcontext():
        value = (torch.compile(function, backend="aot_eager") if compiled else function)(*tensors)
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    gradients = torch.autograd.grad(value.sum(), wanted, allow_unused=True) if value.requires_grad else ()
    return value.detach(), gradients


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", OF_TARGETS)
def test_a_target_is_differentiated_at_where_the_teacher_is_not(name, compiled):
    written, stable = OF_TARGETS[name]
    targets = TARGETS.clone().requires_grad_()
    value, gradients = run(written, targets, LOGITS, compiled=compiled)
    wide = TARGETS.double().requires_grad_()
    expected, slopes = run(stable or written, wide, LOGITS.double(), guarded=False)
    assert len(gradients) == 1
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients[0].double(), slopes[0], rtol=1e-5, atol=1e-6)


def test_the_same_query_with_and_without_a_derivative():
    """Calls are answered as those that look the same were; those that differ in what is differentiated at do not."""
    for tracked in (True, False, True, False):
        targets = TARGETS.clone().requires_grad_(tracked)
        with nanguard.stabilize():
            value = torch.xlogy(targets, LOGITS.softmax(1))
            with torch.no_grad():
                silent = torch.xlogy(targets, LOGITS.softmax(1))
        assert value.requires_grad is tracked
        assert not silent.requires_grad


def test_labels_of_a_repaired_loss_are_differentiated_at():
    targets = TARGETS.clone().requires_grad_()
    with nanguard.stabilize(saturated="repair"):
        value = F.binary_cross_entropy(LOGITS.sigmoid(), targets, reduction="sum")
    (gradient,) = torch.autograd.grad(value, targets)
    torch.testing.assert_close(gradient, -LOGITS, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("eps", [1e-6, 0.3, 0.5, 0.7, 1.0, 2.0])
def test_bounds_of_a_logit(eps, compiled):
    x = torch.tensor([-3.0, 0.2, 0.8, 3.0], requires_grad=True)
    expected = run(lambda x: torch.logit(x.sigmoid(), eps=eps), x, guarded=False)
    found = run(lambda x: torch.logit(x.sigmoid(), eps=eps), x, compiled=compiled)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_dtype_of_a_few_bits_rounds(dtype, compiled):
    def function(x):
        return x.softmax(1).to(dtype).float().log()

    x = torch.tensor([[0.3, 1.0, -9.0]])
    expected, _ = run(function, x, guarded=False)
    found, _ = run(function, x, compiled=compiled)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_an_index_under_functionalisation():
    index, x = torch.tensor([0, 2]), torch.tensor([[0.3, 1.0, -120.0], [1.0, -99.0, 0.0]])

    def function(x):
        return -torch.log(x.softmax(1)[torch.arange(2), index])

    with nanguard.stabilize():
        value = torch.func.functionalize(function)(x)
    torch.testing.assert_close(value, F.cross_entropy(x, index, reduction="none"))


DOUBLE = {
    "softplus": lambda x: torch.log(1 + x.exp()),
    "log1p": lambda x: torch.log1p(x.exp()),
    "share": lambda x: 1 / (1 + x.exp()) ** 3,
    "half": lambda x: (0.5 * x).exp() / (1 + x.exp()),
    "two": lambda x: torch.log(2 * x.exp() + 0.5),
}


# Compiled code has no second derivatives.
@pytest.mark.parametrize("name", DOUBLE)
def test_second_derivatives_keep_their_digits(name):
    def curvature(x, guarded):
        with nanguard.stabilize() if guarded else contextlib.nullcontext():
            value = DOUBLE[name](x)
        (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        return torch.autograd.grad(slope.sum(), x)[0]

    x = torch.tensor([-40.0, -25.0, -17.0, -12.0, -5.0, 0.0, 4.0, 9.0])
    found = curvature(x.clone().requires_grad_(), guarded=True)
    expected = curvature(x.double().requires_grad_(), guarded=False)
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=0)


def test_sums_of_nothing_have_no_second_derivative():
    x = torch.tensor([-torch.inf, -torch.inf, 0.0, 200.0], requires_grad=True)
    with nanguard.stabilize():
        value = torch.log(1 + x.exp())
    (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    torch.testing.assert_close(slope.detach(), torch.tensor([0.0, 0.0, 0.5, 1.0]))
    torch.testing.assert_close(curvature, torch.tensor([0.0, 0.0, 0.25, 0.0]))
