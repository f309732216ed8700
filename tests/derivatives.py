"""Losses with their derivatives, for tests of the stabiliser."""

import torch

import nanguard


def value_and_gradient(loss, x):
    """The loss, and the derivative of its elements, each with a weight of its own."""
    x = x.clone().requires_grad_()
    value = loss(x)
    weight = torch.linspace(0.5, 1.5, value.numel()).reshape(value.shape).to(value.dtype)
    return value.detach(), torch.autograd.grad((value * weight).sum(), x)[0]


def outcome(function, x, guard=True, compiled=False):
    """The value, and the derivative of its sum, of what is replaced if it is guarded."""
    x = x.clone().requires_grad_()
    if compiled:
        torch._dynamo.reset()
    if guard:
        with nanguard.stabilize() as swaps:
            value = (torch.compile(function, backend="aot_eager") if compiled else function)(x)
        assert swaps
    else:
        value = function(x)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]
