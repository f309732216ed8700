"""Everything else that checkpoints can do, and that may surround them, goes on working under `stabilize`."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from checkpointed import BOTH, assert_exact, by_hand, extreme, mild
from torch import nn
from torch.utils import checkpoint as torch_checkpoint
from torch.utils.checkpoint import checkpoint

import nanguard
from nanguard.stabilizer import checkpoints


class TestOptions:
    @BOTH
    def test_random_numbers_are_those_of_the_first_run(self, reentrant):
        def region(x):
            return by_hand(F.dropout(x, 0.5)) + F.dropout(x, 0.5).sum()

        gradients = []
        for run in (region, lambda x: checkpoint(region, x, use_reentrant=reentrant)):
            x = mild(20, 5)
            torch.manual_seed(3)
            with nanguard.stabilize() as swaps:
                loss = run(x)
            after = torch.rand(3)
            loss.backward()
            gradients.append((loss.detach(), x.grad, after))
            assert len(swaps) == 1
        torch.testing.assert_close(*gradients)
        assert torch.equal(gradients[0][2], gradients[1][2])

    @BOTH
    def test_autocast(self, reentrant):
        weight = nn.Parameter(torch.eye(3) * 300)

        def region(x):
            return by_hand(x @ weight)

        x = torch.eye(3, requires_grad=True)
        with nanguard.stabilize() as swaps, torch.autocast("cpu", torch.bfloat16):
            loss = checkpoint(region, x, use_reentrant=reentrant)
        loss.backward()
        assert len(swaps) == 1
        assert loss.item() == 600
        assert weight.grad.tolist() == [[1, -1, 0], [0, 0, 0], [0, -1, 1]]

    @BOTH
    def test_hooks_around_and_inside(self, reentrant):
        def offloaded(x):
            with torch.autograd.graph.save_on_cpu():
                return by_hand(x)

        for region in (by_hand, offloaded):
            x = extreme()
            with nanguard.stabilize() as swaps, torch.autograd.graph.save_on_cpu():
                loss = checkpoint(region, x, use_reentrant=reentrant)
            loss.backward()
            assert len(swaps) == 1
            assert_exact(loss, x)

    @BOTH
    def test_without_gradients(self, reentrant):
        with nanguard.stabilize() as swaps, torch.no_grad():
            loss = checkpoint(by_hand, extreme(), use_reentrant=reentrant)
        assert len(swaps) == 1
        assert loss.item() == 999 + 0

    @BOTH
    def test_modules_and_keyword_arguments(self, reentrant):
        class Loss(nn.Module):
            def forward(self, x, scale=2.0):
                return by_hand(x) * scale

        x = extreme()
        keywords = {} if reentrant else {"scale": 2.0}
        with nanguard.stabilize():
            loss = checkpoint(Loss(), x, use_reentrant=reentrant, **keywords)
        loss.backward()
        assert_exact(loss, x, 2.0)

    @BOTH
    def test_exceptions_in_the_region(self, reentrant):
        calls = []

        def region(x):
            loss = by_hand(x)
            calls.append(1)
            if len(calls) in failing:
                raise KeyError("user")
            return loss

        failing = {1}
        with nanguard.stabilize(), pytest.raises(KeyError, match="user"):
            checkpoint(region, extreme(), use_reentrant=reentrant)
        calls.clear()
        failing = {2}
        x = extreme()
        with nanguard.stabilize():
            loss = checkpoint(region, x, use_reentrant=reentrant) + 0 * x.sum()
            # Non-reentrant ones stop before they come to the exception.
            with pytest.raises(KeyError, match="user") if reentrant else contextlib.nullcontext():
                loss.backward()
        with nanguard.stabilize() as swaps:
            y = extreme()
            loss = by_hand(y)
        loss.backward()
        assert len(swaps) == 1
        assert_exact(loss, y)

    def test_selective_checkpoints(self):
        weight = nn.Parameter(torch.eye(3))

        def region(x):
            return by_hand(torch.mm(x, weight)) + x.clone().sum() * 0

        aten = torch.ops.aten
        everything = torch_checkpoint.CheckpointPolicy.MUST_SAVE
        for saved in ([aten.mm.default], [aten.clone.default], lambda *args, **kwargs: everything):

            def contexts(saved=saved):
                return torch_checkpoint.create_selective_checkpoint_contexts(saved)

            x = extreme()
            with nanguard.stabilize() as swaps:
                loss = checkpoint(region, x, use_reentrant=False, context_fn=contexts)
            loss.backward()
            assert len(swaps) == 1
            assert_exact(loss, x)

    def test_selective_checkpoints_see_nothing_that_is_not_computed_again(self):
        """Here nothing is swapped, but what is known needs copies of the array's memory."""

        def contexts():
            return torch_checkpoint.create_selective_checkpoint_contexts([torch.ops.aten.clone.default])

        gradients = []
        for block in (contextlib.nullcontext(), nanguard.stabilize()):
            constants = torch.from_numpy(torch.ones(4, 5).numpy())
            constants[0, 0] = 3

            def region(x, constants=constants):
                p = torch.softmax(constants, 1)
                q = (x * 2).clone()
                return (p * q).sin().sum() + (x.clone() * q).sum()

            x = mild()
            with block:
                torch.ones(1).numpy()  # an escape: nothing will be swapped in regions
                loss = checkpoint(region, x, use_reentrant=False, context_fn=contexts)
            loss.backward()
            gradients.append(x.grad)
        assert torch.equal(*gradients)


class TestUnknownSurroundings:
    def assert_untouched(self, run):
        outcomes = []
        for block in (contextlib.nullcontext([]), nanguard.stabilize()):
            x = mild()
            with block as swaps:
                loss = run(x)
            assert not swaps
            loss.backward()
            outcomes.append(x.grad)
        assert torch.equal(*outcomes)

    @pytest.mark.parametrize(("name", "reentrant"), [("_CHECKPOINT", False), ("_CHECKPOINT", True), ("_FORWARD", True)])
    def test_other_frames(self, monkeypatch, name, reentrant):
        monkeypatch.setattr(checkpoints, name, None)
        self.assert_untouched(lambda x: checkpoint(by_hand, x, use_reentrant=reentrant))

    @BOTH
    def test_other_names(self, monkeypatch, reentrant):
        monkeypatch.setattr(checkpoints, "recompute_attribute", lambda state: None)
        self.assert_untouched(lambda x: checkpoint(by_hand, x, use_reentrant=reentrant))

    def test_one_of_several_unknown(self, monkeypatch):
        """Then the others must not be recomputed with swaps either."""
        plain = checkpoints.recompute_attribute
        states = []

        def attribute(state):
            if not states:
                states.append(state)  # the innermost
            return plain(state) if state is states[0] else None

        def outer(x):
            return checkpoint(by_hand, x, use_reentrant=False)

        monkeypatch.setattr(checkpoints, "recompute_attribute", attribute)
        self.assert_untouched(lambda x: checkpoint(outer, x, use_reentrant=False))

    def test_checkpoints_that_leave_no_frame(self):
        from torch.distributed._composable.checkpoint_activation import checkpoint as composable

        class Loss(nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.inner = inner

            def forward(self, x):
                with torch.autograd.graph.save_on_cpu() if self.inner == "hooks" else contextlib.nullcontext():
                    if self.inner == "region":
                        return checkpoint(by_hand, x, use_reentrant=False)
                    return by_hand(x)

        for inner in ("nothing", "hooks", "region"):
            self.assert_untouched(composable(Loss(inner)))

    def test_hooks_are_put_back(self):
        def pair(name):
            return lambda tensor: (name, tensor), lambda packed: packed[1]

        first, second = pair("first"), pair("second")
        with torch.autograd.graph.saved_tensors_hooks(*first), torch.autograd.graph.saved_tensors_hooks(*second):
            assert checkpoints.hooks_of_saved_tensors() == [second[0], first[0]]
            assert checkpoints.hooks_of_saved_tensors() == [second[0], first[0]]
        assert checkpoints.hooks_of_saved_tensors() == []
