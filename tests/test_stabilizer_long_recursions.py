"""Recursions that are no quotients: products and forward probabilities of any length, and what they cost."""

import gc
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import nanguard

STATES = 4


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def forward(x):
    """The likelihood of a hidden Markov model."""
    moves, emissions = x[:STATES].softmax(1), x.softmax(1)
    alpha = emissions[0]
    for step in range(1, len(x)):
        alpha = (alpha @ moves) * emissions[step]
    return alpha.sum().log()


def log_forward(x):
    moves, emissions = x[:STATES].log_softmax(1), x.log_softmax(1)
    alpha = emissions[0]
    for step in range(1, len(x)):
        alpha = torch.logsumexp(alpha[:, None] + moves, 0) + emissions[step]
    return torch.logsumexp(alpha, 0)


MOVES = torch.rand(STATES, STATES, generator=torch.Generator().manual_seed(1))


def with_constant_moves(x):
    emissions = x.softmax(1)
    alpha = emissions[0]
    for step in range(1, len(x)):
        alpha = (alpha @ MOVES.to(x)) * emissions[step]
    return alpha.sum().log()


def log_with_constant_moves(x):
    emissions = x.log_softmax(1)
    alpha = emissions[0]
    for step in range(1, len(x)):
        alpha = torch.logsumexp(alpha[:, None] + MOVES.to(x).log(), 0) + emissions[step]
    return torch.logsumexp(alpha, 0)


def in_place(x):
    moves, emissions = x[:STATES].softmax(1), x.softmax(1)
    alpha = emissions[0]
    for step in range(1, len(x)):
        alpha = alpha @ moves
        alpha *= emissions[step]
    return alpha.sum().log()


def backward(x):
    moves, emissions = x[:STATES].softmax(1), x.softmax(1)
    beta = torch.ones(STATES, dtype=x.dtype)
    for step in range(len(x) - 1, 0, -1):
        beta = moves @ (emissions[step] * beta)
    return (beta * emissions[0]).sum().log()


def stacked(x):
    moves, emissions = x[:STATES].softmax(1), x.softmax(1)
    alphas = [emissions[0]]
    for step in range(1, len(x)):
        alphas.append((alphas[-1] @ moves) * emissions[step])
    return torch.stack(alphas).sum(1).log()[-1]


def scaled_by_totals(x):
    """The same with steps that are normalised."""
    moves, emissions = x[:STATES].softmax(1), x.softmax(1)
    alpha, total = emissions[0], 0.0
    for step in range(1, len(x)):
        norm = alpha.sum()
        total = total + norm.log()
        alpha = (alpha / norm) @ moves * emissions[step]
    return total + alpha.sum().log()


def product(x):
    p, result = x.softmax(1), 1.0
    for step in range(len(x)):
        result = result * p[step, 1]
    return result.log()


def survival(x):
    hazard, alive = x.sigmoid(), 1.0
    for step in range(len(x)):
        alive = alive * (1 - hazard[step])
    return alive.log().sum()


def alignment(x):
    """The likelihood of an alignment, of scalars in lists."""
    p = x.softmax(1)
    alpha = [p[0, 0], p[0, 1], p[0, 0] * 0.5]
    for step in range(1, len(x)):
        before = alpha
        alpha = []
        for state in range(3):
            number = before[state]
            for earlier in range(state):
                number = number + before[earlier]
            alpha.append(number * p[step, state])
    return torch.log(alpha[-1] + alpha[-2])


def log_alignment(x):
    l = x.log_softmax(1)  # noqa: E741
    alpha = [l[0, 0], l[0, 1], l[0, 0] + torch.tensor(0.5).log()]
    for step in range(1, len(x)):
        alpha = [torch.logsumexp(torch.stack(alpha[: state + 1]), 0) + l[step, state] for state in range(3)]
    return torch.logaddexp(alpha[-1], alpha[-2])


RECURSIONS = {
    "forward": (forward, log_forward),
    "constant_moves": (with_constant_moves, log_with_constant_moves),
    "in_place": (in_place, log_forward),
    "backward": (backward, log_forward),
    "stacked": (stacked, log_forward),
    "scaled": (scaled_by_totals, log_forward),
    "product": (product, lambda x: x.log_softmax(1)[:, 1].sum()),
    "survival": (survival, lambda x: torch.nn.functional.logsigmoid(-x).sum()),
    "alignment": (alignment, log_alignment),
}
every_recursion = pytest.mark.parametrize("name", RECURSIONS)


def value_and_gradient(function, x, guarded=False):
    x = x.clone().requires_grad_()
    if guarded:
        with nanguard.stabilize():
            value = function(x)
    else:
        value = function(x)
    value.backward()
    return value.detach(), x.grad


def agree(found, expected):
    (value, gradient), (exact, slope) = found, expected
    scale = max(1.0, exact.abs().item())
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5 * scale)
    bound = 3e-6 * scale * max(1.0, slope.abs().max().item())
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-4, atol=bound)


@every_recursion
class TestValuesAndGradients:
    @pytest.mark.parametrize(("steps", "width"), [(6, 60.0), (30, 1.0), (40, 60.0), (90, 8.0)])
    def test_are_those_of_exact_arithmetic(self, name, steps, width):
        recursion, exact = RECURSIONS[name]
        x = normal(steps, STATES) * width
        for _ in range(2):  # also once every step has been seen
            agree(value_and_gradient(recursion, x, guarded=True), value_and_gradient(exact, x.double()))

    def test_are_the_same_without_gradients(self, name):
        recursion, exact = RECURSIONS[name]
        x = normal(50, STATES) * 8
        with torch.no_grad(), nanguard.stabilize():
            value = recursion(x)
        assert not value.requires_grad
        torch.testing.assert_close(value.double(), exact(x.double()), rtol=1e-5, atol=1e-3)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_are_the_same_under_a_checkpoint(self, name, reentrant):
        recursion, exact = RECURSIONS[name]
        x = normal(40, STATES) * 8

        def checkpointed(x):
            return checkpoint(recursion, x, use_reentrant=reentrant)

        agree(value_and_gradient(checkpointed, x, guarded=True), value_and_gradient(exact, x.double()))

    def test_have_second_derivatives(self, name):
        def curvature(function, x):
            x = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(function(x), x, create_graph=True)
            return torch.autograd.grad((slope * normal(*x.shape, seed=3)).sum(), x)[0]

        recursion, exact = RECURSIONS[name]
        x = normal(24, STATES).double()
        with nanguard.stabilize():
            found = curvature(recursion, x)
        torch.testing.assert_close(found, curvature(exact, x), rtol=1e-6, atol=1e-8)

    def test_stay_as_they_are_where_nobody_asks(self, name):
        """Without a logarithm every bit stays, in value and gradient, but of what is replaced as a quotient."""
        if name == "scaled":
            pytest.skip("quotients are replaced")
        x, found = normal(50, STATES) * 0.1 + 1, []
        for guarded in (True, False):
            leaf = x.clone().requires_grad_()
            with nanguard.stabilize() if guarded else torch.enable_grad(), pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.Tensor, "log", lambda tensor: tensor * 1)
                patch.setattr(torch, "log", lambda tensor: tensor * 1)
                value = RECURSIONS[name][0](leaf)
            value.backward()
            found.append((value.detach(), leaf.grad))
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)


def operations(function, *arguments):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, nanguard.stabilize():
        function(*arguments)
    return sum(event.count for event in profile.key_averages())


@every_recursion
@pytest.mark.parametrize("differentiable", [True, False])
def test_work_grows_with_the_number_of_steps(name, differentiable):
    recursion = RECURSIONS[name][0]
    with torch.set_grad_enabled(differentiable):
        few, twice, most = (
            operations(recursion, normal(steps, STATES).requires_grad_(differentiable)) for steps in (16, 32, 64)
        )
    assert most - twice <= 2.5 * (twice - few)


class TestMemory:
    @pytest.mark.parametrize("size", [8, 512])
    def test_of_an_average_that_nobody_asks_for_is_given_back(self, size):
        references = []
        with torch.no_grad(), nanguard.stabilize():
            average = torch.softmax(normal(size, size), 1)
            for step in range(100):
                z = normal(size, size, seed=step) * 1
                references.append(weakref.ref(z))
                average = 0.9 * average + 0.1 * torch.softmax(z, 1)
            del z
            gc.collect()
            assert sum(reference() is not None for reference in references) <= 16

    def test_of_large_tensors_is_not_needed(self):
        x = normal(300, 300)
        with torch.no_grad():
            p = x.softmax(1)

            def grown(steps):
                result = p
                for _ in range(steps):
                    result = result * torch.sigmoid(x)
                return result

            activities = [torch.profiler.ProfilerActivity.CPU]
            with torch.profiler.profile(activities=activities) as profile, nanguard.stabilize():
                grown(60)
        assert not any("logsigmoid" in event.key for event in profile.key_averages())

    def test_of_a_very_long_history_is_given_back(self):
        with nanguard.stabilize():
            p = torch.zeros(STATES, requires_grad=True).softmax(0)
            result = p[0]
            for _ in range(5000):
                result = result * p[1]
            value = result.log()
            reference = weakref.ref(result)
            del result
            assert reference() is not None  # part of the user's graph
            torch.testing.assert_close(value.detach(), -5001 * torch.tensor(4.0).log(), rtol=1e-4, atol=0)
            del value, p
            gc.collect()
            assert reference() is None


class TestWhoeverLooksAtAStep:
    """What is remembered in its place does not hide where something came from."""

    def steps(self, x, between, late=lambda weight: None):
        p, seen = x.softmax(1), None
        weight = p[0]
        for step in range(1, len(x)):
            weight = weight * p[step]
            if step == 20:
                weight = seen = between(weight)
        late(seen)
        return weight

    def compared(self, between, late=lambda weight: None):
        found = []
        for guarded in (True, False):
            x = (normal(50, STATES) * 0.3).to(torch.float32 if guarded else torch.float64).requires_grad_()
            with nanguard.stabilize() if guarded else torch.enable_grad():
                value = self.steps(x, between, late).log()
            (value * normal(STATES, seed=5).to(value)).sum().backward()
            found.append((value.detach().double(), x.grad.double()))
        for single, double in zip(*found, strict=True):
            torch.testing.assert_close(single, double, rtol=1e-4, atol=1e-4)

    def test_hook(self):
        def doubled(weight):
            weight.register_hook(lambda grad: 2 * grad)
            return weight

        self.compared(doubled)

    def test_hook_that_comes_late(self):
        self.compared(lambda weight: weight, lambda seen: seen.register_hook(lambda grad: 2 * grad))

    def test_kept_gradient_that_comes_late(self):
        kept = []

        def watch(seen):
            seen.retain_grad()
            kept.append(seen)

        self.compared(lambda weight: weight, watch)
        torch.testing.assert_close(kept[0].grad.double(), kept[1].grad, rtol=1e-4, atol=1e-4)

    def test_edit(self):
        def edited(weight):
            weight = weight * 1
            weight[2] = 0.25
            return weight

        self.compared(edited)

    def test_unseen_edit(self):
        def edited(weight):
            weight = weight.clone()
            weight.data[2] = 0.25
            return weight

        self.compared(edited)

    def test_edit_of_what_comes_last(self):
        x = normal(50, STATES) * 8
        with nanguard.stabilize() as swaps:
            weight = self.steps(x, lambda weight: weight)
            weight.data[2] = 0.25
            value = weight.log()
        assert not swaps
        torch.testing.assert_close(value, weight.log(), rtol=0, atol=0)

    def test_detached(self):
        self.compared(lambda weight: weight.detach())

    def test_derivative_at_a_step(self):
        slopes = []
        for guarded in (True, False):
            x = (normal(50, STATES) * 0.3).to(torch.float32 if guarded else torch.float64).requires_grad_()
            seen = []
            with nanguard.stabilize() if guarded else torch.enable_grad():
                value = self.steps(x, lambda weight, seen=seen: (seen.append(weight), weight)[1]).log()
            (slope,) = torch.autograd.grad(value.square().sum(), seen[0])
            slopes.append(slope.double())
        torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-4)

    def test_transforms(self):
        x = normal(50, STATES) * 0.3
        with nanguard.stabilize():
            found = torch.func.grad(lambda x: self.steps(x, lambda weight: weight).log().sum())(x)
        expected = torch.func.grad(lambda x: x.log_softmax(1).sum())(x.double())
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)
