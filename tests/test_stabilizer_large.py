"""Logarithms of large softmaxes are made of the softmax that is there already."""

import pytest
import torch
import torch.nn.functional as F

import nanguard
from nanguard.stabilizer.picked import LARGE

ROWS = CLASSES = 256
INDEX = torch.arange(ROWS)
TARGET = torch.randint(0, CLASSES, (ROWS,), generator=torch.Generator().manual_seed(0))

PICKS = {
    "all": lambda p: p,
    "index": lambda p: p[INDEX, TARGET],
    "index with duplicates": lambda p: p[TARGET, INDEX],
    "the same element twice": lambda p: p[TARGET, TARGET],
    "negative index": lambda p: p[INDEX, TARGET - CLASSES],
    "gather": lambda p: p.gather(1, TARGET[:, None]),
    "gather, then squeeze": lambda p: p.gather(1, TARGET[:, None]).squeeze(1),
    "gather along the other dim": lambda p: p.gather(0, TARGET[None, :]),
    "gather from some rows": lambda p: p.gather(1, TARGET[:9, None]),
    "several of each row": lambda p: p.gather(1, torch.stack([TARGET, TARGET.flip(0), TARGET], 1)),
    "column": lambda p: p[:, 3],
    "mask": lambda p: p[F.one_hot(TARGET, CLASSES).bool()],
    "transposed": lambda p: p.t(),
}
LOGITS = {
    "mild": lambda x: x,
    "extreme": lambda x: x * 300,
    "far from 0": lambda x: x + 1e5,
    "masked": lambda x: x.masked_fill(x > 0.5, -torch.inf).index_fill(1, TARGET, 0.25),
    "one much larger": lambda x: x.index_fill(1, torch.tensor([0]), 17.0) + 1000.0,
}


def logits(name):
    return LOGITS[name](torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(1)))


def test_are_large():
    assert ROWS * CLASSES >= LARGE


class TestValuesAndGradients:
    @pytest.mark.parametrize("numbers", LOGITS)
    @pytest.mark.parametrize("name", PICKS)
    @pytest.mark.parametrize("dim", [0, 1])
    def test_are_those_of_exact_arithmetic(self, name, numbers, dim):
        x = logits(numbers).requires_grad_()
        with nanguard.stabilize() as swaps:
            value = PICKS[name](torch.softmax(x, dim)).log()
        weight = torch.randn(value.shape)
        taken = value.isfinite()  # a masked logit stays masked
        (gradient,) = torch.autograd.grad((value[taken] * weight[taken]).sum(), x)
        z = x.detach().double().requires_grad_()
        expected = PICKS[name](z.log_softmax(dim))
        assert torch.equal(taken, expected.isfinite())
        (slope,) = torch.autograd.grad((expected[taken] * weight[taken].double()).sum(), z)
        torch.testing.assert_close(value.double(), expected, rtol=4e-6, atol=4e-6)
        torch.testing.assert_close(gradient.double(), slope, rtol=1e-4, atol=1e-4)
        assert swaps

    @pytest.mark.parametrize("numbers", ["mild", "extreme"])
    @pytest.mark.parametrize("name", PICKS)
    def test_at_the_probability_itself(self, name, numbers):
        x = logits(numbers).clamp(-40, 40).requires_grad_()
        with nanguard.stabilize():
            p = torch.softmax(x, 1)
            loss = PICKS[name](p).log().sum() + (p * p).sum()
        (gradient,) = torch.autograd.grad(loss, p)
        again = torch.softmax(x, 1)
        (expected,) = torch.autograd.grad(PICKS[name](again).log().sum() + (again * again).sum(), again)
        torch.testing.assert_close(gradient, expected)

    @pytest.mark.parametrize("name", ["all", "index", "gather", "mask"])
    def test_twice(self, name):
        x = logits("far from 0").double().requires_grad_()
        with nanguard.stabilize():
            value = PICKS[name](torch.softmax(x, 1)).log().sum()
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        (second,) = torch.autograd.grad((gradient**3).sum(), x)
        (slope,) = torch.autograd.grad(PICKS[name](x.log_softmax(1)).sum(), x, create_graph=True)
        (expected,) = torch.autograd.grad((slope**3).sum(), x)
        torch.testing.assert_close(second, expected, rtol=1e-6, atol=1e-9)

    def test_no_new_nan_where_a_row_is_almost_certain(self):
        x = logits("one much larger").requires_grad_()
        with nanguard.stabilize():
            loss = (-torch.softmax(x, 1).log()).sqrt().sum()
        loss.backward()
        assert x.grad.isfinite().all()
