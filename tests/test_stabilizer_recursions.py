"""Recursions of quotients: every step is computed from the one before, and what is computed is as right as ever."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import nanguard
from nanguard.stabilizer import memory

STATES = 8


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scaled_forward(x, steps, start=2.0):
    """The likelihood of a hidden Markov model, by normalised probabilities."""
    moves, emissions = x[:STATES].softmax(1), x[STATES : STATES + steps]
    alpha, total = (x[-1] * start).exp()[None], 0.0
    for step in range(steps):
        alpha = (alpha @ moves) * emissions[step].exp()
        norm = alpha.sum(1, keepdim=True)
        total = total + norm.log()
        alpha = alpha / norm
    return torch.cat([total.reshape(1), alpha[0].log()])


def log_forward(x, steps, start=2.0):
    moves, emissions = x[:STATES].log_softmax(1), x[STATES : STATES + steps]
    alpha = x[-1] * start
    for step in range(steps):
        alpha = torch.logsumexp(alpha[:, None] + moves, 0) + emissions[step]
    first = torch.logsumexp(x[-1] * start, 0) * 0.0
    return torch.cat([(first + torch.logsumexp(alpha, 0)).reshape(1), alpha.log_softmax(0)])


def sinkhorn(x, steps):
    kernel, n = torch.exp(-x), len(x)
    u = v = torch.ones(n, dtype=x.dtype)
    for _ in range(steps):
        u = (1 / n) / (kernel @ v)
        v = (1 / n) / (kernel.t() @ u)
    return torch.stack([u.log(), v.log()])


def log_sinkhorn(x, steps):
    n = torch.tensor(float(len(x)), dtype=x.dtype)
    u = v = torch.zeros(len(x), dtype=x.dtype)
    for _ in range(steps):
        u = -n.log() - torch.logsumexp(-x + v, 1)
        v = -n.log() - torch.logsumexp(-x.t() + u, 1)
    return torch.stack([u, v])


def filtered(x, steps):
    """Particle weights."""
    weight = torch.ones(x.shape[1], dtype=x.dtype) / x.shape[1]
    for step in range(steps):
        weight = weight * torch.exp(x[step])
        weight = weight / weight.sum()
    return weight.log()


def multiplicative(x, steps):
    """Multiplicative weights, which are normalised aside."""
    weight, shares = torch.exp(x[0]), []
    for step in range(1, steps):
        shares.append((weight / weight.sum())[:3].log())
        weight = weight * torch.exp(x[step])
    return torch.stack([*shares, (weight / weight.sum())[:3].log()])


def swishes(x, steps):
    for _ in range(steps):
        x = x / (1 + torch.exp(-x))
    return x


def silus(x, steps):
    for _ in range(steps):
        x = F.silu(x)
    return x


# The recursion, the same in logarithms, and its argument.
RECURSIONS = {
    "forward": (scaled_forward, log_forward, lambda: normal(STATES + 64, STATES)),
    "sinkhorn": (sinkhorn, log_sinkhorn, lambda: normal(80, 80).abs() * 3),
    "filter": (filtered, lambda x, steps: x[:steps].sum(0).log_softmax(0), lambda: normal(64, 20)),
    "weights": (
        multiplicative,
        lambda x, steps: x[:steps].cumsum(0).log_softmax(1)[:, :3],
        lambda: normal(64, 20),
    ),
    "swishes": (swishes, silus, lambda: normal(9, 7)),
}


def value_and_gradient(function, x, steps, guarded=False):
    x = x.clone().requires_grad_()
    if guarded:
        with nanguard.stabilize():
            value = function(x, steps)
    else:
        value = function(x, steps)
    (value * normal(*value.shape, seed=5).to(value)).sum().backward()
    return value.detach(), x.grad


@pytest.mark.parametrize("name", RECURSIONS)
class TestValuesAndGradients:
    @pytest.mark.parametrize("steps", [1, 2, 3, 5, 8, 40])
    @pytest.mark.parametrize("width", [1.0, 6.0, 60.0])
    def test_are_those_of_exact_arithmetic(self, name, steps, width):
        recursion, exact, make = RECURSIONS[name]
        x = make() * width
        for _ in range(2):  # also once every step has been seen
            value, gradient = value_and_gradient(recursion, x, steps, guarded=True)
            expected, slope = value_and_gradient(exact, x.double(), steps)
            scale = expected.abs().max().clamp(min=1.0).item()
            torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=3e-6 * scale)
            # Rounding of what is that far from 0 comes before every exponential.
            bound = 1e-5 * max(1.0, scale) * slope.abs().max().item()
            torch.testing.assert_close(gradient.double(), slope, rtol=1e-4, atol=bound)

    @pytest.mark.parametrize("steps", [3, 12])
    def test_are_the_same_without_gradients(self, name, steps):
        recursion, exact, make = RECURSIONS[name]
        x = make() * 6
        with torch.no_grad(), nanguard.stabilize():
            value = recursion(x, steps)
        assert not value.requires_grad
        expected = exact(x.double(), steps)
        scale = expected.abs().max().clamp(min=1.0).item()
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=3e-6 * scale)

    def test_have_second_derivatives(self, name):
        recursion, exact, make = RECURSIONS[name]

        def slope_of_slope(function, x):
            x = x.double().requires_grad_()
            value = function(x, 6)
            (slope,) = torch.autograd.grad(value.square().mean(), x, create_graph=True)
            (again,) = torch.autograd.grad(slope.square().sum(), x)
            return again

        x = make()
        with nanguard.stabilize():
            found = slope_of_slope(recursion, x)
        torch.testing.assert_close(found, slope_of_slope(exact, x), rtol=1e-7, atol=1e-9)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_are_the_same_under_a_checkpoint(self, name, reentrant):
        recursion, exact, make = RECURSIONS[name]
        x = make() * 6
        with nanguard.stabilize():
            leaf = x.clone().requires_grad_()
            value = checkpoint(recursion, leaf, 9, use_reentrant=reentrant)
        (value * normal(*value.shape, seed=5)).sum().backward()
        expected, slope = value_and_gradient(exact, x.double(), 9)
        scale = expected.abs().max().clamp(min=1.0).item()
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=3e-6 * scale)
        bound = 1e-5 * scale * slope.abs().max().item()
        torch.testing.assert_close(leaf.grad.double(), slope, rtol=1e-4, atol=bound)


def operations(function, *arguments):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, nanguard.stabilize():
        function(*arguments)
    return sum(event.count for event in profile.key_averages())


def nodes(value):
    stack, seen = [value.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack.extend(following for following, _ in node.next_functions)
    return len(seen)


@pytest.mark.parametrize("name", RECURSIONS)
class TestWork:
    @pytest.mark.parametrize("differentiable", [True, False])
    def test_grows_with_the_number_of_steps(self, name, differentiable):
        recursion, _, make = RECURSIONS[name]
        x = make().requires_grad_(differentiable)
        with torch.set_grad_enabled(differentiable):
            few, twice, most = (operations(recursion, x, steps) for steps in (16, 32, 64))
        assert most - twice <= 2.5 * (twice - few)

    def test_leaves_a_graph_that_grows_with_the_number_of_steps(self, name):
        recursion, _, make = RECURSIONS[name]
        x = make().requires_grad_()
        with nanguard.stabilize():
            few, twice, most = (nodes(recursion(x, steps)) for steps in (16, 32, 64))
        assert most - twice <= 2.5 * (twice - few)


class TestMemory:
    def test_of_a_running_average_is_bounded(self, monkeypatch):
        monkeypatch.setattr(memory, "MOST_MEMORY", 1 << 16)
        references = []
        with torch.no_grad(), nanguard.stabilize():
            average = torch.softmax(normal(64, 64), 1)
            for step in range(40):
                z = normal(64, 64, seed=step) * 1
                references.append(weakref.ref(z))
                average = 0.9 * average + 0.1 * torch.softmax(z, 1)
            del z
            gc.collect()
            assert sum(reference() is not None for reference in references) <= 6

    def test_of_small_ensembles_is_granted(self):
        with torch.no_grad(), nanguard.stabilize() as swaps:
            members = [normal(64, 64, seed=seed) * 200 for seed in range(12)]
            mean = sum(torch.softmax(member, 1) for member in members) / 12
            value = mean.log()
        exact = (
            torch.stack([member.double().log_softmax(1) for member in members]).logsumexp(0) - torch.tensor(12.0).log()
        )
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-4)
        assert swaps

    def test_of_steps_is_given_back(self):
        references = []
        with torch.no_grad(), nanguard.stabilize():
            weight = torch.ones(20) / 20
            for step in range(30):
                z = normal(20, seed=step) * 1
                references.append(weakref.ref(z))
                weight = weight * torch.exp(z)
                weight = weight / weight.sum()
            del z
            gc.collect()
            assert sum(reference() is not None for reference in references) <= 6


class TestWhoeverLooksAtAStep:
    """A step that is computed from the one before may be watched, edited, or cut off all the same."""

    def steps(self, x, between):
        weight = torch.exp(x[0])
        for step in range(1, 12):
            weight = weight * torch.exp(x[step])
            weight = weight / weight.sum()
            if step == 6:
                weight = between(weight)
        return weight.log()

    def compared(self, between, rtol=1e-4):
        found = []
        for guarded in (True, False):
            x = normal(12, 20).to(torch.float32 if guarded else torch.float64).requires_grad_()
            if guarded:
                with nanguard.stabilize():
                    value = self.steps(x, between)
            else:
                value = self.steps(x, between)
            (value * normal(20, seed=5).to(value)).sum().backward()
            found.append((value.detach().double(), x.grad.double()))
        torch.testing.assert_close(found[0][0], found[1][0], rtol=rtol, atol=1e-5)
        torch.testing.assert_close(found[0][1], found[1][1], rtol=rtol, atol=1e-5)

    def test_hook(self):
        def doubled(weight):
            weight.register_hook(lambda grad: 2 * grad)
            return weight

        self.compared(doubled)

    def test_kept_gradient(self):
        kept = []

        def watched(weight):
            weight.retain_grad()
            kept.append(weight)
            return weight

        self.compared(watched)
        torch.testing.assert_close(kept[0].grad.double(), kept[1].grad, rtol=1e-4, atol=1e-4)

    def test_edit(self):
        def edited(weight):
            weight[3] = 0.25
            return weight

        self.compared(edited)

    def test_unseen_edit(self):
        def edited(weight):
            weight = weight.clone()
            weight.data[3] = 0.25
            return weight

        self.compared(edited)

    def test_detached(self):
        self.compared(lambda weight: weight.detach())

    def test_without_gradients(self):
        def cut(weight):
            with torch.no_grad():
                return weight * 2

        self.compared(cut)

    def test_half_precision_between(self):
        self.compared(lambda weight: weight.float().to(weight.dtype))

    def test_derivative_at_a_step(self):
        slopes = []
        for guarded in (True, False):
            x = normal(12, 20).to(torch.float32 if guarded else torch.float64).requires_grad_()
            seen = []

            def noted(weight, seen=seen):
                seen.append(weight)
                return weight

            if guarded:
                with nanguard.stabilize():
                    value = self.steps(x, noted)
            else:
                value = self.steps(x, noted)
            (slope,) = torch.autograd.grad(value.square().sum(), seen[0])
            slopes.append(slope.double())
        torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-4)

    def test_what_was_divided_is_asked_for_afterwards(self):
        x = normal(40, 20) * 30
        with nanguard.stabilize():
            weight = torch.exp(x[0])
            for row in x[1:]:
                weight = weight * torch.exp(row)
            total = weight.sum()
            share = weight / total
            again = weight / total
            found = weight.log(), total.log(), share.log(), again.log()
        exact = x.double().sum(0)
        expected = exact, exact.logsumexp(0), exact.log_softmax(0), exact.log_softmax(0)
        for value, right in zip(found, expected, strict=True):
            torch.testing.assert_close(value.double(), right, rtol=1e-5, atol=1e-3)

    def test_batched_derivatives(self):
        x = normal(5)
        found = []
        for guarded in (True, False):
            y = x.clone().requires_grad_()
            if guarded:
                with nanguard.stabilize() as swaps:
                    value = swishes(y, 3)
            else:
                value = swishes(y, 3)
            found.append(torch.autograd.grad(value, y, torch.eye(5), is_grads_batched=True)[0])
        assert swaps
        torch.testing.assert_close(*found)

    def test_operands_in_any_order(self):
        x = normal(40, 20) * 30
        for _ in range(2):
            with nanguard.stabilize():
                weight, shares = torch.exp(x[0]), []
                for row in x[1:]:
                    weight = weight * torch.exp(row)
                    shares.append(torch.div(other=weight.sum(), input=weight)[:3].log())
            exact = x.double().cumsum(0)[1:].log_softmax(1)[:, :3]
            torch.testing.assert_close(torch.stack(shares).double(), exact, rtol=1e-5, atol=1e-3)


PRODUCTS = {
    "matrix": (lambda p, q: p @ q, (30, 20), (20, 10)),
    "batch": (lambda p, q: p @ q, (4, 20, 20), (4, 20, 10)),
    "vector": (lambda p, q: p @ q, (90, 80), (80,)),
    "from the left": (lambda p, q: p @ q, (80,), (80, 90)),
    "transposed": (lambda p, q: p.t() @ q, (80, 90), (80,)),
    "einsum": (lambda p, q: torch.einsum("ij,kj->ik", p, q), (30, 20), (10, 20)),
    "two dims": (lambda p, q: (p * q).sum((0, 1)), (30, 20, 10), (20, 10)),
}
NUMBERS = {
    "mild": lambda x: x,
    "wide": lambda x: x * 40,
    "far": lambda x: x * 3 + 1000,
    "masked": lambda x: x.masked_fill(x > 0.7, -torch.inf),
    "dead": lambda x: x.index_fill(x.ndim - 1, torch.tensor([0]), -torch.inf),
}


class TestTotalsOfProducts:
    @pytest.mark.parametrize("numbers", NUMBERS)
    @pytest.mark.parametrize("name", PRODUCTS)
    def test_are_those_of_exact_arithmetic(self, name, numbers):
        product, one, other = PRODUCTS[name]
        x, y = (NUMBERS[numbers](normal(*shape, seed=seed)) for seed, shape in enumerate((one, other)))
        found = []
        for dtype in (torch.float32, torch.float64):
            p, q = x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()
            with nanguard.stabilize():
                value = product(torch.exp(p), torch.exp(q)).log()
            taken = value.isfinite()
            slopes = torch.autograd.grad((value[taken] * normal(*value.shape, seed=5)[taken].to(dtype)).sum(), (p, q))
            found.append((value, *slopes))
        for single, double in zip(*found, strict=True):
            torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=2e-4)

    def test_weights_may_be_huge(self):
        x = torch.full((80, 90), -110.0)
        x[:, 0] = 0.0
        weight = torch.full((90,), 1e30)
        weight[0] = 1e-10
        for dtype in (torch.float32, torch.float64):
            with nanguard.stabilize():
                value = (torch.exp(x.to(dtype)) @ weight.to(dtype)).log()
            expected = torch.logsumexp(x.double() + weight.double().log(), 1)
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("width", [1.0, 50.0])
    def test_weights_may_be_of_either_sign(self, width):
        x, weight = normal(80, 90) * width, normal(90, seed=1)
        weight[:10] = 0.0
        with nanguard.stabilize():
            p = torch.exp(x)
            value = (p @ weight) / p.sum(1)
        expected = (x.double().softmax(1) * weight.double()).sum(1)
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-5)
