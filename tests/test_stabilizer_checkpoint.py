"""`stabilize` inside `torch.utils.checkpoint`: what runs twice makes the same swaps twice, wherever the backward pass runs."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from checkpointed import BOTH, assert_exact, by_hand, exact, extreme, in_thread, mild, quotient
from torch.utils import checkpoint as torch_checkpoint
from torch.utils.checkpoint import checkpoint

import nanguard


class TestOneRegion:
    @BOTH
    @pytest.mark.parametrize("where", ["inside", "outside", "other thread"])
    @pytest.mark.parametrize("loss_of", [by_hand, quotient])
    def test_value_and_gradient_are_exact(self, reentrant, where, loss_of):
        x = extreme()
        with nanguard.stabilize() as swaps:
            loss = checkpoint(loss_of, x, use_reentrant=reentrant)
            if where == "inside":
                loss.backward()
        if where == "outside":
            loss.backward()
        if where == "other thread":
            in_thread(loss.backward)
        assert_exact(loss, x)
        assert swaps

    @BOTH
    def test_a_swap_is_reported_once_at_its_line(self, reentrant):
        x = extreme()
        with nanguard.stabilize() as swaps:
            checkpoint(by_hand, x, use_reentrant=reentrant).backward()
        (swap,) = swaps
        assert (swap.count, swap.original) == (1, "torch.log(torch.softmax(x, 1)[:, 1])")
        assert (swap.file, swap.line) == (by_hand.__code__.co_filename, by_hand.__code__.co_firstlineno + 2)

    @BOTH
    def test_epsilons_are_treated_as_in_the_block(self, reentrant):
        def guarded(x):
            return -torch.log(torch.softmax(x, 1)[:, 1] + 1e-8).sum()

        for epsilon in ("keep", "drop"):
            x, plain = extreme(), extreme()
            with nanguard.stabilize(epsilon):
                loss = checkpoint(guarded, x, use_reentrant=reentrant)
                expected = guarded(plain)
            loss.backward()
            expected.backward()
            assert torch.equal(loss, expected)
            assert torch.equal(x.grad, plain.grad)
        assert_exact(loss, x)

    @BOTH
    def test_nothing_is_swapped_without_a_block(self, reentrant):
        x, y = mild(), mild()
        with nanguard.stabilize():
            checkpoint(by_hand, x, use_reentrant=reentrant)
        checkpoint(by_hand, x, use_reentrant=reentrant).backward()
        checkpoint(by_hand, y, use_reentrant=reentrant).backward()
        assert torch.equal(x.grad, y.grad)

    @BOTH
    def test_a_region_that_ran_before_the_block_is_recomputed_as_it_was(self, reentrant):
        x, y = mild(), mild()
        checkpoint(by_hand, y, use_reentrant=reentrant).backward()
        loss = checkpoint(by_hand, x, use_reentrant=reentrant)
        with nanguard.stabilize() as swaps:
            loss.backward()
        assert not swaps
        assert torch.equal(x.grad, y.grad)

    def test_saved_tensors_read_by_hand_are_those_of_the_first_run(self):
        def region(x):
            return torch.softmax(x, 1).log().exp()

        outcomes = []
        for guarded in (False, True):
            x = mild()
            out = checkpoint(region, x, use_reentrant=False)  # before the block: as written
            with nanguard.stabilize() if guarded else contextlib.nullcontext():
                outcomes.append(out.grad_fn._saved_result)  # recomputed here, outside of any backward pass
            out.sum().backward()
        assert torch.equal(*outcomes)
        x = extreme()
        with nanguard.stabilize() as swaps:
            out = checkpoint(region, x, use_reentrant=False)
        torch.testing.assert_close(out.grad_fn._saved_result, torch.softmax(x.detach(), 1))
        assert len(swaps) == 1

    @pytest.mark.parametrize("early_stop", [True, False])
    @pytest.mark.parametrize("check", ["default", "none"])
    def test_early_stop_and_determinism_check(self, early_stop, check):
        def region(x):
            return by_hand(x), (x * x).sum()

        x = extreme()
        with nanguard.stabilize(), torch_checkpoint.set_checkpoint_early_stop(early_stop):
            loss, _ = checkpoint(region, x, use_reentrant=False, determinism_check=check)
        loss.backward()
        assert_exact(loss, x)

    def test_the_debug_mode(self):
        x = extreme()
        with nanguard.stabilize():
            loss = checkpoint(by_hand, x, use_reentrant=False, debug=True)
        loss.backward()
        assert_exact(loss, x)

    def test_repeated_backward_passes(self):
        x = extreme()
        with nanguard.stabilize():
            loss = checkpoint(by_hand, x, use_reentrant=False)
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        (third,) = torch.autograd.grad(loss, x)
        torch.testing.assert_close(x.grad, 2 * third)
        assert third[0].tolist() == [1, -1, 0]

    def test_double_backward(self):
        def second(function, checkpointed):
            x = mild().double().detach().requires_grad_()
            with nanguard.stabilize():
                loss = checkpoint(function, x, use_reentrant=False) if checkpointed else function(x)
            (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
            gradient.pow(2).sum().backward()
            return x.grad

        torch.testing.assert_close(second(by_hand, True), second(exact, False))

    def test_batched_backward_passes_and_forward_mode(self):
        def region(x):
            return torch.log(torch.softmax(x, 1))[:, :2]

        x = extreme()
        with nanguard.stabilize():
            out = checkpoint(region, x, use_reentrant=False).flatten()
        rows = torch.eye(4)
        (batched,) = torch.autograd.grad(out, x, rows, is_grads_batched=True, retain_graph=True)
        with torch.autograd.forward_ad.dual_level():
            single = [torch.autograd.grad(out, x, row, retain_graph=True)[0] for row in rows]
        expected = torch.func.jacrev(lambda x: F.log_softmax(x, 1)[:, :2].flatten())(x.detach())
        torch.testing.assert_close(batched, expected)
        torch.testing.assert_close(torch.stack(single), expected)

    @BOTH
    def test_torch_functions_switched_off_around_the_backward_pass(self, reentrant):
        x = extreme()
        with nanguard.stabilize():
            loss = checkpoint(by_hand, x, use_reentrant=reentrant)
        with torch._C.DisableTorchFunction():
            loss.backward()
        assert_exact(loss, x)
