"""What is known about the results of compiled code, in the eager code that follows."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import nanguard

TARGET = torch.tensor([0, 2, 1])


def logits():
    return torch.tensor([[0.0, 300.0, 7.0], [5.0, -200.0, 1.0], [2.0, 1.0, -900.0]], requires_grad=True)


def expected():
    x = logits()
    loss = F.cross_entropy(x.double(), TARGET)
    return loss, torch.autograd.grad(loss, x)[0]


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager")


def picked(p):
    return -torch.log(p[range(3), TARGET]).mean()


def is_right(loss, x):
    value, gradient = expected()
    found = torch.autograd.grad(loss, x)[0]
    return torch.allclose(loss.double(), value) and torch.allclose(found, gradient)


def test_a_loss_by_hand_after_a_compiled_softmax():
    x, softmax = logits(), compiled(lambda x: torch.softmax(x, 1))
    for _ in range(2):
        with nanguard.stabilize() as swaps:
            loss = picked(softmax(x))
        assert [swap.rule for swap in swaps] == ["NG102"]
        assert is_right(loss, x)
    assert not picked(softmax(x)).isfinite()


def test_after_a_break():
    def run(x):
        p = torch.softmax(x, 1)
        return -sum([torch.log(p[row, TARGET[row].item()]) for row in range(3)]) / 3

    x = logits()
    with nanguard.stabilize():
        loss = compiled(run)(x)
    assert is_right(loss, x)


CHANGES = {
    "the result": lambda x, p: p.detach().mul_(0.5),
    "an argument": lambda x, p: x.detach().mul_(2),
    "the data of the result": lambda x, p: p.data.mul_(0.5),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_edits_end_it(change):
    def run(x):
        p = compiled(lambda x: torch.softmax(x, 1))(x)
        change(x, p)
        return torch.log(p.detach())

    plain = run(logits())
    with nanguard.stabilize() as swaps:
        guarded = run(logits())
    assert swaps == []
    assert torch.equal(plain, guarded)


STAYING = {
    "what was edited in the graph": lambda x: torch.softmax(x, 1).clone().mul_(torch.rand(3, 3)),
    "what is no probability": lambda x: x.abs() + 1,
}


@pytest.mark.parametrize("function", STAYING.values(), ids=STAYING.keys())
def test_all_else_stays_as_it_is(function):
    outcomes = []
    for guarded in (False, True):
        x = logits()
        torch.manual_seed(0)
        if guarded:
            with nanguard.stabilize() as swaps:
                value = torch.log(compiled(function)(x))
            assert swaps == []
        else:
            value = torch.log(compiled(function)(x))
        outcomes.append((value.detach(), torch.autograd.grad(value.sum(), x)[0]))
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_whose_backward_runs_later(reentrant):
    x, softmax = logits(), compiled(lambda x: torch.softmax(x / 100, 1))
    with nanguard.stabilize():
        loss = checkpoint(lambda x: picked(softmax(x)), x, use_reentrant=reentrant)
    reference = F.cross_entropy(x.double() / 100, TARGET)
    torch.testing.assert_close(loss.double(), reference, rtol=1e-5, atol=1e-6)
    found, wanted = torch.autograd.grad(reference, x)[0], x
    loss.backward()
    torch.testing.assert_close(wanted.grad, found, rtol=1e-4, atol=1e-6)


def test_without_gradients():
    with nanguard.stabilize(), torch.no_grad():
        p = compiled(lambda x: torch.softmax(x, 1))(logits())
        value = torch.log(p)
    assert not value.requires_grad
    torch.testing.assert_close(value, F.log_softmax(logits(), 1).detach())
