"""Several blocks and checkpointed regions, and what they leave behind."""

import contextlib
import gc
import math
import weakref

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from checkpointed import BOTH, EXTREME, by_hand, extreme, mild, quotient
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from trainers import make_trainer, policy

import nanguard
from nanguard.stabilizer.unstable_ops import has_unstable_ops


class TestSeveralBlocks:
    @BOTH
    @pytest.mark.parametrize("where", ["inside", "outside"])
    def test_a_block_within_the_region(self, reentrant, where):
        noted = []
        decorated = nanguard.stabilize(swaps=noted)(by_hand)

        def region(x):
            loss = decorated(x)
            return loss * loss / loss.detach()

        x = extreme()
        loss = checkpoint(region, x, use_reentrant=reentrant)
        with nanguard.stabilize() if where == "inside" else contextlib.nullcontext():
            loss.backward()
        assert [swap.count for swap in noted] == [1]
        assert x.grad[0].tolist() == [2, -2, 0]

    @BOTH
    def test_a_block_in_the_middle_of_the_region_knows_nothing_of_what_was_before(self, reentrant):
        def region(x):
            p = torch.softmax(x, 1)
            with nanguard.stabilize() as swaps:
                loss = p.log().sum() + torch.log(torch.softmax(x, 1)).sum()
            assert not swaps or sum(swap.count for swap in swaps) == 1
            return loss

        x, y = mild(), mild()
        checkpoint(region, x, use_reentrant=reentrant).backward()
        region(y).backward()
        torch.testing.assert_close(x.grad, y.grad)

    @BOTH
    @pytest.mark.parametrize("inner", ["keep", "drop"])
    def test_a_block_around_and_a_block_within(self, reentrant, inner):
        def region(x):
            loss = by_hand(x)
            with nanguard.stabilize(inner):
                loss = loss - torch.log(torch.softmax(x * 1, 1)[:, 1] + 1e-8).sum()
            return loss

        outcomes = []
        for run in (region, lambda x: checkpoint(region, x, use_reentrant=reentrant)):
            x = extreme()
            with nanguard.stabilize():
                loss = run(x)
            loss.backward()
            outcomes.append((loss.detach(), x.grad))
        for one, other in zip(*outcomes, strict=True):
            assert torch.equal(one, other)
            assert one.isfinite().all()

    @BOTH
    def test_two_blocks_around(self, reentrant):
        def region(x):
            return -torch.log(torch.softmax(x, 1)[:, 1] + 1e-8).sum() + quotient(x)

        outcomes = []
        for run in (region, lambda x: checkpoint(region, x, use_reentrant=reentrant)):
            x = extreme()
            with nanguard.stabilize(), nanguard.stabilize("drop"):
                loss = run(x)
            loss.backward()
            outcomes.append((loss.detach(), x.grad))
        for one, other in zip(*outcomes, strict=True):
            assert torch.equal(one, other)
            assert one.isfinite().all()

    @BOTH
    def test_backward_passes_of_users_are_left_alone(self, reentrant):
        """Also in a recomputation, and in a block of their own."""

        class Penalty(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x.clone()

            @staticmethod
            def backward(ctx, grad):
                (x,) = ctx.saved_tensors
                with torch.enable_grad(), nanguard.stabilize() as swaps:
                    y = x.detach().requires_grad_()
                    values.append(by_hand(y).item())
                found.extend(swaps)
                return grad

        def region(x):
            return by_hand(Penalty.apply(x))

        values, found = [], []
        x = extreme()
        with nanguard.stabilize():
            loss = checkpoint(region, x, use_reentrant=reentrant)
            loss.backward()
        assert values == [float("inf")]
        assert not found


class TestTraces:
    @BOTH
    def test_nothing_is_kept_alive(self, reentrant):
        class Owner:
            pass

        owner = Owner()
        seen = []

        def region(x, owner=owner):
            hidden = x * 1
            p = torch.softmax(hidden, 1)
            seen.extend([weakref.ref(hidden), weakref.ref(p)])
            return -torch.log(p[:, 1]).sum()

        x = extreme()
        with nanguard.stabilize() as swaps:
            loss = checkpoint(region, x, use_reentrant=reentrant)
            assert len(swaps) == 1
        gc.collect()
        assert [ref() for ref in seen] == [None, None]
        loss.backward()
        gc.collect()
        assert [ref() for ref in seen] == [None] * 4
        leaf, function = weakref.ref(x), weakref.ref(region)
        watched = weakref.ref(owner)
        del x, loss, region, owner
        gc.collect()
        assert (leaf(), function(), watched()) == (None, None, None)

    @BOTH
    def test_no_mode_is_left_behind(self, reentrant):
        from torch.overrides import _get_current_function_mode_stack

        x = extreme()
        with nanguard.stabilize():
            loss = checkpoint(by_hand, x, use_reentrant=reentrant)
            loss.backward()
            assert len(_get_current_function_mode_stack()) == 1
        assert not _get_current_function_mode_stack()
        assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None

    @BOTH
    def test_a_healthy_model_is_the_same_to_the_bit(self, reentrant):
        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.1))

            def forward(self, x):
                weights = torch.softmax(x @ x.transpose(-1, -2) / 3, -1)
                return x + torch.sigmoid(self.inner(x)) * (weights @ x) + x.exp() * 0.01

        def train(block):
            torch.manual_seed(0)
            layers = nn.ModuleList(Block() for _ in range(3))
            optimizer = torch.optim.SGD(layers.parameters(), 0.1)
            for _ in range(3):
                with block:
                    x = torch.randn(2, 4, 8, requires_grad=True)
                    for layer in layers:
                        x = checkpoint(layer, x, use_reentrant=reentrant)
                    loss = F.cross_entropy(x.flatten(0, 1), torch.arange(8))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            return [loss.detach(), *(parameter.detach() for parameter in layers.parameters())]

        swaps = []
        for one, other in zip(train(contextlib.nullcontext()), train(nanguard.stabilize(swaps=swaps)), strict=True):
            assert torch.equal(one, other)
        assert not swaps

    @BOTH
    def test_regions_without_swaps_are_recomputed_by_torch_alone(self, reentrant):
        found = []

        def region(x):
            found.append(torch.overrides._get_current_function_mode_stack())
            return torch.softmax(x, 1).sin().sum()

        with nanguard.stabilize():
            loss = checkpoint(region, mild(), use_reentrant=reentrant)
        loss.backward()
        assert [len(stack) for stack in found] == [1, 0]

    def test_healthy_losses_are_the_same_as_without_a_checkpoint(self):
        """To rounding: in regions nothing depends on the numbers, so that all is replaced there."""
        outcomes = []
        for run in (by_hand, lambda x: checkpoint(by_hand, x, use_reentrant=False)):
            x = mild()
            with nanguard.stabilize():
                loss = run(x)
            loss.backward()
            outcomes.append((loss.detach(), x.grad))
        torch.testing.assert_close(*outcomes)


class TestGuarded:
    @BOTH
    def test_what_is_swapped_in_regions_keeps_the_watch_awake(self, reentrant):
        for function, expected in ((by_hand, True), (lambda x: x.sin().sum(), False)):
            x = mild()
            with nanguard.stabilize():
                loss = checkpoint(function, x, use_reentrant=reentrant)
            assert has_unstable_ops(loss) is expected

    @pytest.mark.filterwarnings("ignore::nanguard.errors.NanGuardWarning")
    @BOTH
    def test_training_with_lightning(self, tmp_path, reentrant):
        class Net(pl.LightningModule):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(3, 3)

            def training_step(self, batch, batch_idx):
                loss = checkpoint(self.loss, batch, use_reentrant=reentrant)
                losses.append(loss.item())
                return loss

            def loss(self, x):
                return by_hand(self.layer(x) + x * 0)

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), 1e-6)

        data = [torch.tensor(EXTREME, requires_grad=True) for _ in range(6)]
        data[4] = torch.full((2, 3), math.nan, requires_grad=True)
        finite = {}
        for callbacks in ([], [guard := nanguard.NanGuard(policy(tmp_path, stabilize={"enabled": True}))]):
            losses = []
            torch.manual_seed(0)
            model = Net()
            make_trainer(tmp_path, callbacks).fit(model, DataLoader(data, batch_size=None))
            finite[bool(callbacks)] = [math.isfinite(loss) for loss in losses]
        assert not any(finite[False])
        assert finite[True][:4] == [True] * 4
        assert finite[True][-1]
        (incident,) = guard.incidents
        assert incident.batch_idx == 4
        assert model.layer.weight.isfinite().all()
        (swap,) = guard.swaps
        assert swap.line == by_hand.__code__.co_firstlineno + 2
