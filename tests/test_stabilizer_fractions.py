"""Numbers divided by exponentials: as written while the divisor is moderate, and stable elsewhere."""

import math

import pytest
import torch
from test_stabilizer_operands import run
from torch.distributions import Normal

FRACTIONS = {
    "variational": lambda s, m: 0.5 * (s + (m - 1) ** 2 / s.exp()),
    "clamped": lambda s, m: 0.5 * (s.clamp(-8, 8) + (m - 1) ** 2 / s.clamp(-8, 8).exp()),
    "halved": lambda s, m: -((m - 1) ** 2) / (2 * s.exp()) - s,
    "squared": lambda s, m: m / (2 * s.exp() ** 2),
    "deviations": lambda s, m: ((m - 1) / (0.5 * s).exp()) ** 2,
    "reciprocal": lambda s, m: m * s.exp().reciprocal(),
    "of one": lambda s, m: m * (1 / s.exp()),
    "of less than nothing": lambda s, m: m * (-2.5 / s.exp()),
    "total": lambda s, m: m / s.exp().sum(1, keepdim=True),
    "shifted": lambda s, m: m / (3 + s.exp()),
    "view": lambda s, m: m / s.exp().expand(8, 6).view(8, 6) + m / s.exp(),
    "method": lambda s, m: (m - 1).square().div(s.exp()).sum(1) + s.sum(1),
}


def tensors(scale):
    generator = torch.Generator().manual_seed(0)
    s, m = (torch.randn(8, 6, generator=generator) for _ in range(2))
    return (s * scale).requires_grad_(), m.requires_grad_()


@pytest.mark.parametrize("name", FRACTIONS)
def test_moderate_divisors_leave_all_bits_as_they_are(name):
    for _ in range(2):  # at first sight, and as one that was seen before
        expected, found = (run(FRACTIONS[name], *tensors(1.0), guarded=guarded) for guarded in (False, True))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("scale", [1.0, 12.0])
@pytest.mark.parametrize("name", FRACTIONS)
def test_others_are_those_of_exact_arithmetic(name, scale, compiled):
    value, gradients = run(FRACTIONS[name], *tensors(scale), compiled=compiled)
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors(scale)]
    expected, slopes = run(FRACTIONS[name], *wide, guarded=False)
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-6)
    for gradient, slope in zip(gradients, slopes, strict=True):
        torch.testing.assert_close(gradient.double(), slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("spread", [-20.0, -44.0, -45.0, -50.0, -60.0, -80.0])
def test_a_component_of_no_width_has_no_gradient(spread, compiled):
    """In a mixture, of a density that vanishes at the data: 0 times an infinite derivative."""
    x = torch.tensor(1.0)

    def function(pi, mu, s):
        p = Normal(mu, s.exp(), validate_args=False).log_prob(x.to(mu.dtype)).exp()
        return torch.log((pi.softmax(0) * p).sum())

    pi, mu, s = torch.zeros(2), torch.tensor([1.0, -20.0]), torch.tensor([0.0, spread])
    value, gradients = run(function, *(t.requires_grad_() for t in (pi, mu, s)), compiled=compiled)
    torch.testing.assert_close(value.item(), math.log(0.5) - 0.5 * math.log(2 * math.pi), rtol=1e-5, atol=1e-6)
    for gradient, expected in zip(gradients, ([0.5, -0.5], [0.0, 0.0], [-1.0, 0.0]), strict=True):
        torch.testing.assert_close(gradient, torch.tensor(expected))
