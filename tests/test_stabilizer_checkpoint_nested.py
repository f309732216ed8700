"""Several checkpointed regions: nested, one after the other, and what is known in one of them and not in the other."""

import pytest
import torch
from checkpointed import BOTH, assert_exact, by_hand, exact, extreme, in_thread, mild
from torch import nn
from torch.utils import checkpoint as torch_checkpoint
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import nanguard


class TestSeveralRegions:
    @pytest.mark.parametrize("inner", [True, False])
    @pytest.mark.parametrize("outer", [True, False])
    @pytest.mark.parametrize("where", ["inside", "outside", "other thread"])
    @pytest.mark.parametrize("place", ["inner", "outer", "both"])
    def test_nested(self, inner, outer, where, place):
        def function(x):
            loss = checkpoint(by_hand if place != "outer" else exact, x, use_reentrant=inner)
            # What follows depends on the value of the inner region when it is recomputed.
            loss = loss * loss / loss.detach()
            return loss + by_hand(x * 1) if place != "inner" else loss

        x = extreme()
        with nanguard.stabilize() as swaps:
            loss = checkpoint(function, x, use_reentrant=outer)
            if where == "inside":
                loss.backward()
        if where == "outside":
            loss.backward()
        if where == "other thread":
            in_thread(loss.backward)
        factor = {"inner": 2, "outer": 3, "both": 3}[place]
        value = 1 if place == "inner" else 2
        plain = extreme()
        expected = exact(plain)
        expected.backward()
        assert len(swaps) == 1
        torch.testing.assert_close(loss.detach(), value * expected.detach())
        torch.testing.assert_close(x.grad, factor * plain.grad)

    @BOTH
    def test_three_deep_and_one_beside_the_other(self, reentrant):
        def deep(x, depth):
            if depth == 0:
                return by_hand(x)
            return sum(checkpoint(deep, x, depth - 1, use_reentrant=reentrant) for _ in range(2))

        x = extreme()
        with nanguard.stabilize() as swaps:
            loss = checkpoint(deep, x, 3, use_reentrant=reentrant)
        loss.backward()
        assert [swap.count for swap in swaps] == [8]
        assert_exact(loss, x, 8)

    @BOTH
    def test_a_sequence(self, reentrant):
        class Log(nn.Module):
            def forward(self, p):
                return p.log()

        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(4, 4), nn.Softmax(1), Log(), nn.Linear(4, 4), nn.Softmax(1), Log())
        for layer in layers.parameters():
            layer.data *= 500
        outcomes = []
        for run in (layers, lambda x: checkpoint_sequential(layers, 2, x, use_reentrant=reentrant)):
            layers.zero_grad()
            x = mild(3, 4)
            with nanguard.stabilize() as swaps:
                out = run(x)
            out.sum().backward()
            assert [swap.count for swap in swaps] == [2]
            outcomes.append([out.detach(), x.grad, *(parameter.grad.clone() for parameter in layers.parameters())])
        for one, other in zip(*outcomes, strict=True):
            assert torch.equal(one, other)
            assert one.isfinite().all()

    @BOTH
    def test_what_is_known_outside_is_not_used_inside(self, reentrant):
        """The recomputation cannot know it."""

        def region(p, x):
            # log(s) has a stable form with what is known about p, and another one without it.
            s = p + torch.softmax(x, 1)
            return torch.log(p).sum() + torch.log(p * 0.5).sum() + torch.log(s).sin().sum()

        x, y = mild(), mild()
        with nanguard.stabilize() as swaps:
            loss = checkpoint(region, torch.softmax(x, 1), x, use_reentrant=reentrant)
        loss.backward()
        expected = region(torch.softmax(y, 1), y)
        expected.backward()
        assert all(swap.original == "torch.log(s)" for swap in swaps)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(x.grad, y.grad)

    def test_what_is_known_in_the_outer_region_is_not_used_in_the_inner_one(self):
        def inner(p, x):
            return p.log().sum() + by_hand(x)

        def outer(x):
            p = torch.softmax(x, 1)
            return checkpoint(inner, p, x, use_reentrant=False) + p.log().sum()

        x, y = mild(), mild()
        with nanguard.stabilize() as swaps:
            loss = checkpoint(outer, x, use_reentrant=False)
        loss.backward()
        outer(y).backward()
        assert sorted(swap.count for swap in swaps) == [1, 1]
        torch.testing.assert_close(x.grad, y.grad)

    @pytest.mark.parametrize("around", [True, False])
    def test_what_is_known_inside_is_used_outside(self, around):
        def region(x):
            return torch.softmax(x * 1, 1)

        def function(x):
            return -checkpoint(region, x, use_reentrant=False)[:, 1].log().sum()

        x = extreme()
        with nanguard.stabilize() as swaps:
            loss = checkpoint(function, x, use_reentrant=False) if around else function(x)
        loss.backward()
        assert len(swaps) == 1
        assert_exact(loss, x)

    @BOTH
    def test_after_an_escape_nothing_is_swapped_in_regions(self, reentrant):
        def region(x, y):
            return torch.log(torch.softmax(x, 1)).sum() + torch.log(torch.softmax(y, 1)).sum()

        def escaping(x, y):
            first = torch.log(torch.softmax(x, 1)).sum()
            y.detach().numpy()
            return first + torch.log(torch.softmax(y * 1, 1)).sum()

        for function, early, expected in ((region, True, 0), (escaping, False, 1), (region, False, 2)):
            x, y, other, another = mild(), mild(), mild(), mild()
            with nanguard.stabilize() as swaps:
                if early:
                    x.detach().numpy()
                loss = checkpoint(function, x, y, use_reentrant=reentrant)
            loss.backward()
            region(other, another).backward()
            assert sum(swap.count for swap in swaps) == expected
            torch.testing.assert_close(x.grad, other.grad)
            torch.testing.assert_close(y.grad, another.grad)

    @BOTH
    def test_a_watched_derivative_prevents_the_swap_both_times(self, reentrant):
        seen = []

        def region(x):
            p = torch.softmax(x, 1)
            if p.requires_grad:
                p.register_hook(seen.append)
            return torch.log(p).sum()

        x, y = mild(), mild()
        with nanguard.stabilize():
            loss = checkpoint(region, x, use_reentrant=reentrant)
        loss.backward()
        region(y).backward()
        torch.testing.assert_close(x.grad, y.grad)
        torch.testing.assert_close(seen[0], seen[1])

    @BOTH
    def test_a_gradient_taken_inside(self, reentrant):
        def region(x):
            with torch.enable_grad():
                y = x.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(checkpoint(by_hand, y, use_reentrant=False), y)
            return by_hand(x) + (gradient * x).sum()

        x = extreme()
        with nanguard.stabilize():
            loss = checkpoint(region, x, use_reentrant=reentrant)
        loss.backward()
        assert x.grad.isfinite().all()
        assert x.grad[0].tolist() == [2, -2, 0]

    @BOTH
    def test_transforms_inside_are_left_alone(self, reentrant):
        def region(x):
            return torch.func.vmap(lambda row: torch.log(torch.softmax(row, 0)).sum())(x).sum() + by_hand(x)

        x, y = mild(), mild()
        with nanguard.stabilize() as swaps:
            loss = checkpoint(region, x, use_reentrant=reentrant)
        loss.backward()
        assert len(swaps) == 1
        region(y).backward()
        torch.testing.assert_close(x.grad, y.grad)

    def test_a_backward_pass_in_the_middle_of_a_region(self):
        for early_stop in (True, False):

            def region(x):
                loss = by_hand(x)
                (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
                return by_hand(x * 1) + (gradient * x).sum()

            x = extreme()
            with nanguard.stabilize(), torch_checkpoint.set_checkpoint_early_stop(early_stop):
                loss = checkpoint(region, x, use_reentrant=False)
            loss.backward()
            assert x.grad[0].tolist() == [2, -2, 0]
