"""Probabilities that are stacked in depth, or added in one call."""

import pytest
import torch
import torch.nn.functional as F

import nanguard

FORMS = {
    "dstack": (
        lambda x: torch.dstack([x.sigmoid(), 1 - x.sigmoid()]).log(),
        lambda x: torch.stack([F.logsigmoid(x), F.logsigmoid(-x)], 2),
    ),
    "dstack_of_rows": (
        lambda x: torch.dstack([x.softmax(1)[0], x.sigmoid()[1]]).log(),
        lambda x: torch.stack([x.log_softmax(1)[0], F.logsigmoid(x)[1]], 1)[None],
    ),
    "addcmul_to_zeros": (
        lambda x: torch.addcmul(torch.zeros_like(x), x.softmax(1), x.sigmoid()).log(),
        lambda x: x.log_softmax(1) + F.logsigmoid(x),
    ),
    "addcdiv_to_ones": (
        lambda x: torch.addcdiv(torch.ones_like(x), x.softmax(1), torch.exp(x), value=0.5).log(),
        lambda x: torch.logaddexp(torch.zeros_like(x), x.log_softmax(1) - x + torch.tensor(0.5).log()),
    ),
}


def value_and_gradient(function, x):
    x = x.clone().requires_grad_()
    value = function(x)
    (value * torch.arange(1.0, value.numel() + 1).reshape(value.shape).to(value)).sum().backward()
    return value.detach().double(), x.grad.double()


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("width", [1.0, 150.0])
@pytest.mark.parametrize("name", FORMS)
def test_are_those_of_exact_arithmetic(name, width, backend):
    torch._dynamo.reset()
    form, exact = FORMS[name]
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)) * width
    with nanguard.stabilize() as swaps:
        found = value_and_gradient(form if backend is None else torch.compile(form, backend=backend), x)
    assert swaps
    for one, other in zip(found, value_and_gradient(exact, x.double()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
