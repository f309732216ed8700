"""Losses by hand for tests of checkpointed regions, and what exact arithmetic makes of them."""

import threading

import pytest
import torch
import torch.nn.functional as F

EXTREME = [[1000.0, 1.0, -1000.0], [-1000.0, 1000.0, 1.0]]
BOTH = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])


def extreme():
    return torch.tensor(EXTREME, requires_grad=True)


def mild(*shape):
    return torch.randn(*(shape or (4, 5)), generator=torch.Generator().manual_seed(0), requires_grad=True)


def by_hand(x):
    """The cross-entropy of the second class: infinite as written."""
    return -torch.log(torch.softmax(x, 1)[:, 1]).sum()


def quotient(x):
    return -(x.exp() / x.exp().sum(1, keepdim=True))[:, 1].log().sum()


def exact(x):
    return F.cross_entropy(x, torch.ones(len(x), dtype=torch.long), reduction="sum")


def assert_exact(loss, x, factor=1.0):
    """The value of `by_hand`, and the gradients at the leaf, as exact arithmetic has them."""
    other = x.detach().clone().requires_grad_()
    expected = exact(other) * factor
    expected.backward()
    torch.testing.assert_close(loss.detach(), expected.detach())
    torch.testing.assert_close(x.grad, other.grad)


def in_thread(function):
    errors = []

    def run():
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
