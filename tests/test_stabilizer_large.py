"""Logarithms of large softmaxes are made of the softmax that is there already."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

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


def by_hand(x, dim):
    e = torch.exp(x)
    return e / e.sum(dim, keepdim=True)


def shifted(x, dim):
    e = torch.exp(x - x.amax(dim, keepdim=True).detach())
    return e.div(e.sum(dim).unsqueeze(dim))


class TestQuotients:
    """A softmax by hand whose digits are all there: the derivative of what is picked from it is computed in one pass."""

    @pytest.mark.parametrize("function", [by_hand, shifted])
    @pytest.mark.parametrize("name", sorted(set(PICKS) - {"all", "transposed"}))
    @pytest.mark.parametrize("dim", [0, 1])
    def test_values_are_kept_and_gradients_are_exact(self, name, dim, function):
        x = logits("mild").requires_grad_()
        with nanguard.stabilize() as swaps:
            value = PICKS[name](function(x, dim)).log()
        assert torch.equal(value, PICKS[name](function(x, dim)).log())
        weight = torch.randn(value.shape)
        (gradient,) = torch.autograd.grad((value * weight).sum(), x)
        z = x.detach().double().requires_grad_()
        (slope,) = torch.autograd.grad((PICKS[name](z.log_softmax(dim)) * weight.double()).sum(), z)
        torch.testing.assert_close(gradient.double(), slope, rtol=1e-5, atol=1e-6)
        assert {swap.rule for swap in swaps} == {"NG102", "NG201"}

    @pytest.mark.parametrize("function", [by_hand, shifted])
    def test_extreme_numbers(self, function):
        x = logits("extreme").requires_grad_()
        with nanguard.stabilize():
            value = PICKS["index"](function(x, 1)).log()
        (gradient,) = torch.autograd.grad(value.sum(), x)
        z = x.detach().double().requires_grad_()
        expected = PICKS["index"](z.log_softmax(1))
        torch.testing.assert_close(value.double(), expected, rtol=4e-6, atol=4e-6)
        torch.testing.assert_close(gradient.double(), torch.autograd.grad(expected.sum(), z)[0], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("leaf", [True, False])
    def test_at_every_intermediate(self, leaf):
        """Also beside other uses of the same probabilities, whose derivative takes the way that it always took."""
        x = logits("mild").requires_grad_()
        z = x if leaf else x * 1.0

        def loss(p):
            return PICKS["index"](p).log().sum() + (p * p).sum() + p[:, 1].sum()

        with nanguard.stabilize():
            e = torch.exp(z)
            p = e / e.sum(1, keepdim=True)
            value = loss(p)
        again = torch.exp(z)
        quotient = again / again.sum(1, keepdim=True)
        expected = loss(quotient)
        for one, other in ((z, z), (x, x), (p, quotient), (e, again)):
            found = torch.autograd.grad(value, one, retain_graph=True)[0]
            torch.testing.assert_close(found, torch.autograd.grad(expected, other, retain_graph=True)[0])

    def test_twice(self):
        x = logits("mild").double().requires_grad_()
        with nanguard.stabilize():
            value = PICKS["index"](by_hand(x, 1)).log().sum()
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        (slope,) = torch.autograd.grad(PICKS["index"](x.log_softmax(1)).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((gradient**3).sum(), x)
        (expected,) = torch.autograd.grad((slope**3).sum(), x)
        torch.testing.assert_close(second, expected, rtol=1e-6, atol=1e-9)

    def test_edits_after_the_logarithm_do_what_they_do_unguarded(self):
        """The quotient may be edited, as no derivative has saved it; the exponential may not."""
        x = logits("mild").requires_grad_()
        for edited, fails in ((1, False), (0, True)):
            with nanguard.stabilize():
                e = torch.exp(x)
                p = e / e.sum(1, keepdim=True)
                value = PICKS["index"](p).log().sum()
            with torch.no_grad():
                (e, p)[edited].mul_(2.0)
            if fails:
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    torch.autograd.grad(value, x)
            else:
                (gradient,) = torch.autograd.grad(value, x)
                (expected,) = torch.autograd.grad(PICKS["index"](x.log_softmax(1)).sum(), x)
                torch.testing.assert_close(gradient, expected)

    @pytest.mark.parametrize("leaf", [True, False])
    def test_at_every_intermediate_of_what_was_replaced(self, leaf):
        x = (logits("mild") + 30.0).double().requires_grad_()  # its divisor is large, but all digits are there
        z = x if leaf else x * 1.0

        def pieces():
            e = torch.exp(z)
            p = e / e.sum(1, keepdim=True)
            return e, p, PICKS["index"](p).log().sum() + (p * p).sum() + p[:, 1].sum()

        with nanguard.stabilize() as swaps:
            e, p, value = pieces()
        again, quotient, expected = pieces()
        torch.testing.assert_close(p, quotient)
        for one, other in ((z, z), (x, x), (p, quotient)):
            found = torch.autograd.grad(value, one, retain_graph=True)[0]
            torch.testing.assert_close(found, torch.autograd.grad(expected, other, retain_graph=True)[0])
        (at_exponential,) = torch.autograd.grad(value, e, retain_graph=True)
        torch.testing.assert_close(at_exponential, torch.autograd.grad(expected, again)[0], rtol=1e-7, atol=1e-20)
        assert {swap.rule for swap in swaps} == {"NG102", "NG201"}

    def test_what_was_replaced_may_be_edited(self):
        x = (logits("mild") + 30.0).requires_grad_()
        with nanguard.stabilize():
            p = by_hand(x, 1)
            before = p.detach().clone()
            value = PICKS["index"](p).log().sum()
            p.mul_(2.0)
            total = (p * p).sum()
        torch.testing.assert_close(p, before * 2.0)
        (gradient,) = torch.autograd.grad(value + total, x)
        q = x.softmax(1)
        (expected,) = torch.autograd.grad(PICKS["index"](x.log_softmax(1)).sum() + (4 * q * q).sum(), x)
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(
        "build", [by_hand, lambda x, dim: torch.exp(x) * torch.exp(x).sum(dim, keepdim=True) ** -1]
    )
    def test_infinite_logits_are_what_they_were(self, build):
        x = logits("mild") + 30.0
        x[3, 5] = torch.inf
        x[7] = -torch.inf
        x.requires_grad_()
        with nanguard.stabilize():
            p = build(x, 1)
        assert torch.equal(p.isnan(), build(x, 1).isnan())
        torch.testing.assert_close(p, build(x, 1), equal_nan=True, rtol=1e-5, atol=1e-7)

    def test_a_second_backward_pass_is_refused_as_ever(self):
        x = logits("mild").requires_grad_()
        with nanguard.stabilize():
            value = PICKS["index"](by_hand(x, 1)).log().sum()
        value.backward()
        with pytest.raises(RuntimeError, match="second time"):
            value.backward()


@pytest.mark.parametrize("edit", [lambda t: t.data.mul_(0.5), lambda t: t.detach().numpy().__imul__(0.5)])
@pytest.mark.parametrize("which", [0, 1])
def test_unseen_edits_of_what_a_quotient_was_made_of(edit, which):
    x = logits("extreme")

    def loss():
        z = x.clone().requires_grad_()
        e = (z - z.amax(1, keepdim=True).detach()).exp()
        total = e.sum(1, keepdim=True)
        p = e / total
        edit((e, total)[which])
        return p[:, 3].log()

    with nanguard.stabilize():
        guarded = loss()
    torch.testing.assert_close(guarded, loss())


def _loss_by_hand(z):
    e = z.exp()
    return -(e / e.sum(1, keepdim=True))[INDEX, TARGET].log()


@pytest.mark.parametrize("numbers", ["mild", "extreme"])
@pytest.mark.parametrize("loss", [lambda z: -z.softmax(1)[INDEX, TARGET].log(), _loss_by_hand])
@pytest.mark.parametrize("nested", [False, True])
def test_under_a_checkpoint(numbers, loss, nested):
    def region(z):
        return checkpoint(loss, z * 1.0, use_reentrant=False) if nested else loss(z * 1.0)

    x = logits(numbers).requires_grad_()
    with nanguard.stabilize() as swaps:
        value = checkpoint(region, x, use_reentrant=False)
    assert swaps
    (slope,) = torch.autograd.grad(value.sum(), x)
    z = x.detach().double().requires_grad_()
    expected = F.cross_entropy(z, TARGET, reduction="none")
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(slope.double(), torch.autograd.grad(expected.sum(), z)[0], rtol=1e-4, atol=1e-6)


def test_what_nodes_save_is_asked_for_once():
    saved = {}

    def pack(tensor):
        key = len(saved)
        saved[key] = tensor.clone()
        return key

    x = logits("extreme").requires_grad_()
    with nanguard.stabilize() as swaps:
        with torch.autograd.graph.saved_tensors_hooks(pack, saved.pop):
            p = torch.softmax(x, 1)
        value = p[INDEX, TARGET].log()
    assert swaps
    assert torch.autograd.grad(value.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("dim", [0, 1])
def test_what_was_replaced_may_be_edited_under_a_dispatch_mode(dim):
    x = logits("extreme").requires_grad_()
    with nanguard.stabilize() as swaps, FlopCounterMode(display=False):
        e = (x - x.amax(dim, keepdim=True).detach()).exp()
        p = e / e.sum(dim, keepdim=True)
        value = p.t().log()
        value.mul_(2)
        p.mul_(2)
    assert swaps
    torch.testing.assert_close(value, 2 * x.log_softmax(dim).t())
