"""Savepoints: whatever a step does to a module, its optimizers and the random numbers can be put back."""

from __future__ import annotations

import collections
import queue
import random
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nanguard.rng import RngState
from nanguard.transaction import OptimizerSnapshot, Transaction
from nanguard.values import save_value


class Meter:
    """A user's own object that a step updates."""

    def __init__(self) -> None:
        self.total = 0.0
        self.history = [1]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.register_buffer("ema", torch.zeros(3))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.register_buffer("nothing", None)
        self.calls = 0
        self.seen = [1, [2]]
        self.table = {"a": torch.ones(2)}
        self.window = collections.deque([1, 2], maxlen=3)
        self.kinds = {1}
        self.meter = Meter()
        self.array = np.arange(3)
        self.generator = torch.Generator().manual_seed(3)
        self.numpy_generator = np.random.default_rng(3)
        self.python_generator = random.Random(3)
        self.state = torch.zeros(2)


def state_of(net: Net):
    return {
        "buffers": {name: buffer.clone() for name, buffer in net.named_buffers()},
        "names": sorted(net.__dict__),
        "plain": (
            net.calls,
            repr(net.seen),
            list(net.window),
            sorted(net.kinds),
            net.meter.total,
            list(net.meter.history),
        ),
        "table": {key: value.clone() for key, value in net.table.items()},
        "array": net.array.copy(),
        "state": net.state.clone(),
        "draws": (
            torch.rand(1, generator=torch.Generator().set_state(net.generator.get_state())).item(),
            net.numpy_generator.bit_generator.state,
            net.python_generator.getstate(),
        ),
        "training": [module.training for module in net.modules()],
    }


def same(one, other) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return bool(np.array_equal(one, other))
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def step_normal(net):
    net.body(torch.randn(5, 3))


def step_assign(net):
    net.calls += 1
    net.ema = torch.full((3,), float("nan"))
    net.state = torch.ones(2)
    net.new = 5
    net.table = {"a": torch.zeros(2)}
    net.nothing = torch.ones(1)


def step_in_place(net):
    net.ema.fill_(float("nan"))
    net.scratch.add_(1)
    net.state.add_(1)
    net.table["a"].mul_(2)
    net.table["b"] = torch.zeros(1)
    net.seen.append(3)
    net.seen[1].append(4)
    net.window.append(7)
    net.kinds.add(9)
    net.array += 1
    net.meter.total += 1
    net.meter.history.append(2)


def step_remove(net):
    del net.calls, net.seen[0], net.table["a"]
    net.kinds.clear()
    net.body.eval()


def step_draw(net):
    torch.rand(3), random.random(), np.random.rand(), np.random.randn()
    torch.rand(1, generator=net.generator), net.numpy_generator.random(), net.python_generator.random()


STEPS = [step_normal, step_assign, step_in_place, step_remove, step_draw]


@given(st.lists(st.sampled_from(STEPS), min_size=1, max_size=4, unique=True), st.integers(1, 2))
@settings(deadline=None)
def test_everything_is_put_back_however_often(steps, times):
    net = Net()
    transaction = Transaction(net)
    before, rng = state_of(net), RngState.save()
    savepoint = transaction.savepoint()
    holders = [net.ema, net.seen, net.table, net.meter, net.state]
    for _ in range(times):
        for step in sorted(steps, key=STEPS.index):
            step(net)
        savepoint.restore()
        assert same(state_of(net), before)
        # In place: others may hold references to the very objects.
        now = [net.ema, net.seen, net.table, net.meter, net.state]
        assert all(a is b for a, b in zip(now, holders, strict=True))
    assert same(draws_of(RngState.save()), draws_of(rng))


def draws_of(state):
    return state.python, state.torch, dict(state.numpy["state"], key=list(state.numpy["state"]["key"]))


def test_random_numbers_may_be_left_alone():
    net = Net()
    savepoint = Transaction(net).savepoint()
    torch.manual_seed(5)
    expected = torch.get_rng_state()
    savepoint.restore(rng=False)
    assert torch.equal(torch.get_rng_state(), expected)


def test_memory_is_used_again_and_never_shared_by_two_savepoints():
    net = Net()
    transaction = Transaction(net)
    first = transaction.savepoint()
    second = transaction.savepoint()
    assert {copy.data_ptr() for copy in first.copies}.isdisjoint(copy.data_ptr() for copy in second.copies)
    addresses = [copy.data_ptr() for copy in first.copies]
    first.release()
    assert [copy.data_ptr() for copy in transaction.savepoint().copies] == addresses
    net.register_buffer("more", torch.zeros(7))
    second.release()
    assert len(transaction.savepoint().copies) == len(addresses) + 1


def test_ignored_names_stay_and_participants_are_undone():
    net, log = Net(), []
    net.calls = 1
    savepoint = Transaction(net, ignored=["calls"], participants=[lambda: lambda: log.append("undone")]).savepoint()
    net.calls = 2
    savepoint.restore()
    assert net.calls == 2
    assert log == ["undone"]


def test_submodules_that_are_shared_or_cyclic_are_saved_once():
    net = Net()
    net.again = net.body
    net.body.parent = nn.Identity()
    object.__setattr__(net.body, "owner", net)  # a plain reference upwards, not a submodule
    savepoint = Transaction(net).savepoint()
    before = state_of(net)
    step_normal(net)
    savepoint.restore()
    assert same(state_of(net), before)


def test_long_containers_only_lose_what_was_appended():
    log = list(range(5000))
    table = {i: i for i in range(5000)}
    undo_log, undo_table = save_value(log), save_value(table)
    log.extend([1, 2, 3])
    undo_log()
    undo_table()
    assert log == list(range(5000))
    assert len(table) == 5000


def test_objects_of_libraries_are_left_alone():
    counter = collections.Counter("aab")
    machinery = torch.utils.data.TensorDataset(torch.zeros(2))
    undo = save_value([counter, machinery])
    counter["a"] = 9
    machinery.tensors = ()
    undo()
    assert counter["a"] == 2  # a dictionary
    assert machinery.tensors == ()  # an object of torch


class Slotted:
    """A user's own object without a dictionary."""

    __slots__ = ("count", "seen")

    def __init__(self):
        self.seen = [0]


def test_state_in_slots_and_containers_of_the_standard_library():
    slotted, space, line, text = Slotted(), types.SimpleNamespace(n=1, log=[1]), queue.Queue(), bytearray(b"ab")
    line.put("first")
    held = collections.UserDict(a=[1])
    undo = save_value([slotted, space, line, text, held])
    for _ in range(2):
        slotted.count = 3
        slotted.seen.append(1)
        space.n, space.more = 2, True
        space.log.append(2)
        line.put("second")
        text.extend(b"c")
        held["a"].append(2)
        held["b"] = 3
        undo()
        assert not hasattr(slotted, "count")
        assert (slotted.seen, vars(space)) == ([0], {"n": 1, "log": [1]})
        assert (list(line.queue), text, dict(held)) == (["first"], b"ab", {"a": [1]})


def test_a_tensor_that_holds_a_nan_is_not_written_for_that():
    tensor = torch.tensor([1.0, float("nan")])
    undo = save_value([tensor])
    version = tensor._version
    undo()
    assert tensor._version == version
    tensor.data[0] = 2.0
    undo()
    assert tensor[0] == 1.0


def test_cycles_end():
    loop = []
    loop.append(loop)
    undo = save_value(loop)
    loop.append(1)
    undo()
    assert len(loop) == 1
    assert loop[0] is loop


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, torch.tensor(0.1), amsgrad=True, capturable=False, foreach=False),
        lambda p: torch.optim.AdamW(p, 0.1, fused=True),
        lambda p: torch.optim.LBFGS(p, 0.1, history_size=3),
        lambda p: torch.optim.Rprop(p, 0.1),
        lambda p: torch.optim.ASGD(p, 0.1),
        lambda p: torch.optim.Adadelta(p),
    ],
)
@pytest.mark.parametrize("warm", [0, 2])
def test_optimizers_go_on_as_if_nothing_had_been(make, warm):
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    optimizer = make(net.parameters())
    data = torch.randn(20, 4, 3)

    def step(batch):
        def closure():
            optimizer.zero_grad()
            loss = net(batch).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)

    for i in range(warm):
        step(data[i])
    snapshot = OptimizerSnapshot([optimizer])
    step(data[5])
    expected = [p.detach().clone() for p in net.parameters()]
    snapshot.restore()
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * 1
    step(torch.full_like(data[6], float("nan")))
    optimizer.param_groups[0]["weight_decay"] = 5.0
    snapshot.restore()
    step(data[5])
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), expected, strict=True))


def test_tensors_that_were_made_in_inference_mode_are_put_back_outside_it():
    module = nn.Module()
    module.register_buffer("mean", torch.zeros(2))
    with torch.inference_mode():
        module.total, module.mean = torch.zeros(2), torch.ones(2)
    held = module.total
    savepoint = Transaction(module).savepoint()
    with torch.inference_mode():
        module.total += 1
        module.mean += 1
    savepoint.restore()
    assert module.total is held
    assert (module.total.tolist(), module.mean.tolist()) == ([0.0, 0.0], [1.0, 1.0])
