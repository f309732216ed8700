"""Which losses are worth watching."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nanguard
from nanguard.stabilizer import has_unstable_ops

X = torch.randn(4, 4, requires_grad=True)
Y = torch.arange(4)

UNSTABLE = {
    "log of softmax": lambda: torch.softmax(X, 1).log().mean(),
    "log far below": lambda: (nn.Linear(4, 4)(torch.log(X.exp().sum(1))) ** 2).sum(),
    "log2": lambda: torch.log2(torch.softmax(X, 1)).sum(),
    "log1p": lambda: torch.log1p(X.exp()).sum(),
    "in place": lambda: torch.softmax(X, 1).clone().log_().sum(),
    "softmax by hand": lambda: (X.exp() / X.exp().sum(1, keepdim=True)).sum(),
    "sigmoid by hand": lambda: (1 / (1 + (-X).exp())).sum(),
    "a branch": lambda: torch.where(X > 0, X.abs().sqrt(), 0.0).sum(),
    "a norm that is selected": lambda: torch.where(X.detach().sum(1) > 0, X.norm(dim=1), 0.0).sum(),
}
STABLE = {
    "cross entropy": lambda: F.cross_entropy(X, Y),
    "attention": lambda: F.cross_entropy(torch.softmax(X @ X.T, -1) @ X, Y),
    "logsumexp": lambda: torch.logsumexp(X, 1).sum(),
    "logsigmoid": lambda: F.logsigmoid(X).sum(),
    "exponential without division": lambda: X.exp().sum(),
    "root without selection": lambda: X.abs().sqrt().sum(),
    "selection without root": lambda: torch.where(X > 0, X, -X).sum(),
    "division without exponential": lambda: (X / X.abs().sum()).sum(),
    "no graph": lambda: torch.log(X.detach().abs()).sum(),
}


@pytest.mark.parametrize("loss", UNSTABLE.values(), ids=UNSTABLE.keys())
def test_finds_what_a_rule_might_replace(loss):
    assert has_unstable_ops(loss())


@pytest.mark.parametrize("loss", UNSTABLE.values(), ids=UNSTABLE.keys())
def test_still_finds_it_once_it_is_replaced(loss):
    with nanguard.stabilize():
        value = loss()
    assert has_unstable_ops(value)


@pytest.mark.parametrize("loss", STABLE.values(), ids=STABLE.keys())
def test_leaves_stable_losses_alone(loss):
    assert not has_unstable_ops(loss())


def test_visits_no_more_nodes_than_allowed_and_the_nearest_first():
    loss = torch.softmax(X, 1).log()
    for _ in range(10):
        loss = loss + 1
    assert not has_unstable_ops(loss.sum(), limit=5)
    assert has_unstable_ops(loss.sum(), limit=12)


def test_shared_nodes_are_visited_once():
    value = X
    for _ in range(60):
        value = value + value
    assert not has_unstable_ops(value.sum())


def test_what_is_compiled_counts_because_it_cannot_be_seen():
    torch._dynamo.reset()
    x = torch.randn(4, 3, requires_grad=True)
    loss = torch.compile(lambda x: F.cross_entropy(x, torch.arange(4) % 3), backend="aot_eager")(x)
    assert has_unstable_ops(loss)
    assert has_unstable_ops(loss * 2 + x.sum())
