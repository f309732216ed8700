"""What was learnt from one call is used for all that look the same, and for no other."""

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nanguard
from nanguard.stabilizer import queries, student
from nanguard.stabilizer.memo import Memo


@pytest.fixture(autouse=True)
def forgetful(monkeypatch):
    """Nothing is remembered from other tests."""
    forget(monkeypatch)


def forget(monkeypatch):
    monkeypatch.setattr(student, "_LESSONS", Memo())
    monkeypatch.setattr(queries, "_REPLIES", Memo())


def outcome(function, *inputs, **options):
    """Value, gradients and rules."""
    inputs = [value.clone().requires_grad_() if value.is_floating_point() else value for value in inputs]
    with nanguard.stabilize(**options) as swaps:
        value = function(*inputs)
    leaves = [entry for entry in inputs if entry.requires_grad]
    gradients = torch.autograd.grad(value.sum(), leaves, allow_unused=True) if value.requires_grad else ()
    return [value.detach(), *gradients], [swap.rule for swap in swaps]


def assert_identical(one, other):
    for a, b in zip(one, other, strict=True):
        assert (a is None and b is None) or torch.equal(a.nan_to_num(123.0), b.nan_to_num(123.0))


ROWS = torch.arange(4)
PROGRAMS = {
    "cross entropy": lambda x, y: -torch.log(torch.softmax(x, 1)[ROWS, y]).mean(),
    "gathered": lambda x, y: -torch.softmax(x, 1).log().gather(1, y[:, None]),
    "by hand": lambda x, y: -torch.log((x.exp() / x.exp().sum(1, keepdim=True)).gather(1, y[:, None])),
    "one exponential": lambda x, y: (lambda e: torch.log(e / e.sum(1, keepdim=True)))(x.exp()),
    "sigmoid": lambda x, y: torch.log(1 / (1 + torch.exp(-x))) + torch.log(1 - torch.sigmoid(x)),
    "entropy": lambda x, y: (lambda p: -(p * p.log()).sum(1))(x.softmax(1)),
    "total": lambda x, y: x.exp().sum(1).log(),
    "epsilon": lambda x, y: torch.log(torch.softmax(x, 1) + 1e-8),
    "masked": lambda x, y: torch.log(torch.softmax(x.masked_fill(x > 0.5, -torch.inf), 1)[ROWS, y]),
    "squared": lambda x, y: torch.log(torch.exp(x) * torch.exp(x)),
    "joined": lambda x, y: torch.log(torch.cat([x.softmax(1), x.sigmoid()], 1)),
    "where": lambda x, y: torch.where(x > 0, x.softmax(1).log(), 0.0),
}


class TestTheSameTwice:
    @pytest.mark.parametrize("scale", [1.0, 300.0])
    @pytest.mark.parametrize("name", PROGRAMS)
    def test_gives_the_same_bits(self, name, scale):
        x, y = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)) * scale, torch.tensor([1, 0, 4, 2])
        first, rules = outcome(PROGRAMS[name], x, y)
        for _ in range(2):
            again, told = outcome(PROGRAMS[name], x, y)
            assert_identical(first, again)
            assert told == rules

    @pytest.mark.parametrize("name", PROGRAMS)
    def test_other_numbers_are_answered_as_at_first_sight(self, name, monkeypatch):
        y = torch.tensor([1, 0, 4, 2])
        for scale in (1.0, 400.0, 0.01, 60.0, 400.0, 1.0):
            x = torch.randn(4, 5) * scale
            remembered = outcome(PROGRAMS[name], x, y)
            with monkeypatch.context() as fresh:
                forget(fresh)
                anew = outcome(PROGRAMS[name], x, y)
            assert_identical(remembered[0], anew[0])
            assert remembered[1] == anew[1]

    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_programs_in_any_order(self, data):
        monkeypatch = pytest.MonkeyPatch()
        y = torch.tensor([1, 0, 4, 2])
        for _ in range(data.draw(st.integers(2, 6))):
            program = PROGRAMS[data.draw(st.sampled_from(sorted(PROGRAMS)))]
            x = torch.randn(4, data.draw(st.sampled_from([5, 7]))) * data.draw(st.sampled_from([1.0, 500.0]))
            x = x.to(data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])))
            epsilon = data.draw(st.sampled_from(["keep", "drop"]))
            remembered = outcome(program, x, y, epsilon=epsilon)
            with monkeypatch.context() as fresh:
                forget(fresh)
                anew = outcome(program, x, y, epsilon=epsilon)
            assert_identical(remembered[0], anew[0])
            assert remembered[1] == anew[1]


class TestWhatOnlyLooksAlike:
    def test_the_same_tensor_twice(self):
        def total(x, z):
            e = x.exp()
            return torch.log(e / z.exp().sum(1, keepdim=True))

        x, z = torch.randn(4, 4) * 200, torch.randn(4, 4) * 200
        outcome(total, x, z)
        same, _ = outcome(lambda x: total(x, x), x)
        torch.testing.assert_close(same[0], x.log_softmax(1))
        torch.testing.assert_close(outcome(total, x, z)[0][0], x - z.logsumexp(1, keepdim=True))

    @pytest.mark.parametrize("constants", [(1, True), (2, 2.0), (0.0, -0.0), (0, False)])
    def test_numbers_that_are_equal(self, constants):
        x = torch.tensor([-300.0, 1.0, 300.0])
        for constant in (*constants, *constants):
            value, _ = outcome(lambda x, c=constant: torch.log(torch.exp(x) + c), x)
            exact = x if type(constant) is bool else x.double()  # what is added is no number, and not recognised
            torch.testing.assert_close(value[0], torch.log(torch.exp(exact) + constant).float())

    def test_other_dims(self):
        x = torch.randn(4, 4) * 300
        for dim in (0, 1, -1, 0):
            value, _ = outcome(lambda x, dim=dim: torch.log(torch.softmax(x, dim)), x)
            torch.testing.assert_close(value[0], x.log_softmax(dim))

    def test_an_index_that_counts_up_only_once(self):
        """What a complement sums over depends on the numbers of an index."""
        x = torch.randn(4, 4) * 50
        for rows in (ROWS, torch.tensor([0, 1, 1, 3]), ROWS):
            value, _ = outcome(lambda x, r=rows: torch.log(1 - torch.softmax(x, 1)[r, r]), x)
            exact = torch.log1p(-torch.softmax(x.double(), 1)[rows, rows])
            close = exact.isfinite() & (exact > -30)
            torch.testing.assert_close(value[0][close], exact[close].float(), rtol=1e-4, atol=1e-6)

    def test_tensors_with_and_without_gradients(self):
        x = torch.randn(4, 4) * 300
        for tracked in (True, False, True):
            with nanguard.stabilize():
                value = torch.softmax(x.clone().requires_grad_(tracked), 1).log()
            assert value.requires_grad is tracked
            torch.testing.assert_close(value.detach(), x.log_softmax(1))

    def test_tensors_that_were_edited(self):
        x = torch.randn(4, 4) * 300
        for edited in (False, True, False):
            with nanguard.stabilize() as swaps:
                p = torch.softmax(x, 1)
                if edited:
                    p += 1.0
                p.log()
            assert (len(swaps) == 1) is not edited

    def test_memory_that_is_edited_unseen(self):
        for shared in (False, True, False):
            x = torch.randn(4, 4)
            array = x.numpy() if shared else None
            with nanguard.stabilize():
                p = torch.exp(x)
                if array is not None:
                    array[:] = 0.0
                value = p.log()
            torch.testing.assert_close(value, p.log())

    def test_a_hook_on_a_probability(self):
        for watched in (False, True, False):
            x, seen = torch.full((2, 2), 300.0, requires_grad=True), []
            with nanguard.stabilize() as swaps:
                p = torch.softmax(x - torch.tensor([0.0, 299.0]), 1)
                if watched:
                    p.register_hook(seen.append)
                loss = p.log().sum()
            loss.backward()
            assert (len(swaps) == 0) is watched
            assert (len(seen) == 1) is watched

    def test_autocast(self):
        x = torch.randn(4, 4).to(torch.bfloat16)
        for enabled in (False, True, False):
            with nanguard.stabilize(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                guarded = torch.softmax(x, 1).log().dtype
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                assert guarded == torch.softmax(x, 1).log().dtype

    def test_an_implicit_argument_by_name(self):
        x = torch.randn(3, 4) * 300
        for call in (
            lambda x: torch.softmax(input=x, dim=1).log(),
            lambda x: torch.softmax(x, dim=1).log(),
            lambda x: torch.log(input=torch.softmax(x, 1)),
            lambda x: torch.special.xlogy(1.0, torch.softmax(x, 1)),
        ):
            for _ in range(2):
                torch.testing.assert_close(outcome(call, x)[0][0], x.log_softmax(1))


class TestMemory:
    @pytest.mark.parametrize("size", [5, 70_000])
    def test_nothing_is_kept_alive(self, size):
        gc.disable()
        try:
            with nanguard.stabilize():
                for _ in range(3):
                    x = torch.randn(4, size, requires_grad=True)
                    p = torch.softmax(x, 1)
                    q = p[ROWS, torch.tensor([1, 2, 3, 4])]
                    loss = -q.log().mean()
                    loss.backward()
                    alive = [weakref.ref(value) for value in (x, p, q, loss)]
                    del x, p, q, loss
                    assert [ref() for ref in alive] == [None] * 4
        finally:
            gc.enable()

    def test_what_is_forgotten_leaves_no_cycle(self):
        gc.collect()
        gc.disable()
        try:
            with nanguard.stabilize():
                for _ in range(3):
                    x = torch.randn(4, 4)
                    p = torch.softmax(x, 1)
                    x.zero_()  # whatever is known of p is forgotten
                    alive = weakref.ref(p)
                    del p
                    assert alive() is None
        finally:
            gc.enable()

    def test_constants_that_change_all_the_time(self):
        x = torch.randn(2, 2)
        with nanguard.stabilize():
            for number in range(5000):
                torch.log(torch.exp(x) * (1.0 + number))
        assert len(student._LESSONS._entries) <= 4096
        assert len(queries._REPLIES._entries) <= 4096
