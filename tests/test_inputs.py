"""Batches that the step writes into are kept as they were; the others are not copied."""

from __future__ import annotations

import collections

import torch

from nanguard.inputs import InputKeeper, copy_of

Pair = collections.namedtuple("Pair", "x y")


def test_only_what_is_written_into_is_copied_after_the_first_time():
    keeper = InputKeeper()
    batch = Pair({"image": torch.ones(3)}, torch.zeros(2))
    for step in range(3):
        image = torch.ones(3)
        batch = Pair({"image": image}, torch.zeros(2))
        kept = keeper.keep((batch, step))
        assert isinstance(kept[0], Pair)
        assert kept[1] == step
        image.div_(255)
        assert kept[0].x["image"].tolist() == [1, 1, 1]
        assert (kept[0].y is batch.y) == (step > 0)
        assert not keeper.learn()


def test_batches_that_nobody_writes_into_are_passed_on():
    keeper = InputKeeper()
    for step in range(3):
        batch = [torch.ones(2), "text"]
        kept = keeper.keep((batch,))
        assert (kept[0][0] is batch[0]) == (step > 0)


def test_a_write_that_comes_as_a_surprise_is_reported_once():
    keeper = InputKeeper()
    keeper.keep((torch.ones(2),))
    batch = torch.ones(2)
    keeper.keep((batch,))  # learns that the first one was not written into
    batch.add_(1)
    assert keeper.learn()
    batch = torch.ones(2)
    kept = keeper.keep((batch,))
    batch.add_(1)
    assert kept[0].tolist() == [1, 1]
    assert not keeper.learn()


def test_copies_keep_identity_strides_and_requires_grad():
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    one, other, rest = copy_of((x, {"again": x}, 5))
    assert one is other["again"]
    assert rest == 5
    assert one.stride() == x.stride()
    assert one.requires_grad
    assert one.is_leaf
    assert one.data_ptr() != x.data_ptr()
    assert torch.equal(one, x)
