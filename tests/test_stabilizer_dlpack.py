"""Memory that is handed out by DLPack without a call that anybody sees, and edited through what came of it."""

import pytest
import torch
from torch.utils import dlpack

import nanguard

PARTS = {"all": lambda tensor: tensor, "some rows": lambda tensor: tensor[2:], "transposed": lambda tensor: tensor.t()}


def edited(tensor, part, number):
    """Multiply part of a tensor by a number, through a capsule."""
    dlpack.from_dlpack(dlpack.to_dlpack(PARTS[part](tensor.detach()))).mul_(number)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("which", ["input", "result"])
def test_what_is_known_is_forgotten(which, part):
    def run(x):
        p = torch.softmax(x, 1)
        edited(x if which == "input" else p, part, 0.25)
        return p.log()

    x = torch.randn(6, 5, dtype=torch.float64) * 8
    expected = run(x.clone())
    with nanguard.stabilize():
        assert torch.equal(run(x.clone()), expected)


def test_other_memory_is_no_matter():
    x = torch.randn(6, 5) * 100
    buffer = dlpack.from_dlpack(dlpack.to_dlpack(torch.ones(6, 5)))
    with nanguard.stabilize() as swaps:
        p = torch.softmax(x, 1)
        buffer.mul_(0.5)
        value = p.log()
    assert swaps
    torch.testing.assert_close(value, x.log_softmax(1))


@pytest.mark.parametrize("part", PARTS)
def test_branches_are_forgotten(part):
    def run(x):
        y = torch.log(x * 1.0)
        edited(y, part, 3.0)
        return torch.where(x > 0, y, 0.0)

    x = torch.tensor([[1.0, 0.0], [2.0, 3.0], [0.0, 4.0]], requires_grad=True)
    expected = run(x)
    with nanguard.stabilize() as swaps:
        found = run(x)
    assert not swaps
    assert torch.equal(found, expected)
