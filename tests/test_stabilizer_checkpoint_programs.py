"""Random programs in checkpointed regions: the recomputation makes the decisions of the first run, whatever they are."""

import contextlib
import random

import pytest
import torch
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import nanguard


def hooked(x, y):
    x = x * 1
    if x.requires_grad:
        x.register_hook(lambda grad: None)
    return x


def escaped(x, y):
    x = x * 1
    x.detach().numpy()
    return x


def in_a_block(x, y):
    with nanguard.stabilize():
        return torch.log(torch.softmax(x, 1) + 1e-8) + torch.log(torch.sigmoid(y))


def without_gradients(x, y):
    with torch.no_grad():
        return torch.log(torch.softmax(x, 1))


STEPS = {
    "softmax": lambda x, y: torch.softmax(x, 1),
    "sigmoid": lambda x, y: torch.sigmoid(x),
    "exp": lambda x, y: torch.exp(x.clamp(max=3)),
    "log": lambda x, y: torch.log(x) if bool((x > 0).all()) else x,
    "log of the sum": lambda x, y: torch.log(x + y) if bool((x + y > 0).all()) else y,
    "log of the product": lambda x, y: torch.log(x * y) if bool((x * y > 0).all()) else y,
    "log with epsilon": lambda x, y: torch.log(x.clamp(min=1e-6) + 1e-8),
    "log in place": lambda x, y: torch.softmax(x, 1).clone().log_(),
    "softplus": lambda x, y: torch.log(1 + torch.exp(x.clamp(max=5))),
    "quotient": lambda x, y: (lambda e: e / e.sum(1, keepdim=True))(torch.exp(x.clamp(max=3))),
    "edit": lambda x, y: (x * 1).mul_(0.5),
    "half": lambda x, y: x * 0.5,
    "detach": lambda x, y: x.detach() * y,
    "index": lambda x, y: x[:, torch.tensor([1, 0, 3, 2])],
    "hook": hooked,
    "escape": escaped,
    "block": in_a_block,
    "no_grad": without_gradients,
}


def program(source, depth, reentrant):
    """Steps, some of which are programs in a region of their own."""
    steps = []
    for _ in range(source.randint(3, 9)):
        where = source.random(), source.random()
        if depth and source.random() < 0.25:
            inner = program(source, depth - 1, reentrant)
            options = {"use_reentrant": reentrant and source.random() < 0.5}
            early_stop = source.random() < 0.5

            def step(*args, inner=inner, options=options, early_stop=early_stop):
                with set_checkpoint_early_stop(early_stop):
                    return checkpoint(run, inner, *args, **options)

        else:
            step = STEPS[source.choice(list(STEPS))]
        steps.append((step, where))
    return steps


def run(steps, *values):
    values = list(values)
    for step, where in steps:
        x, y = (values[int(place * len(values))] for place in where)
        values.append(step(x, y))
    return sum(values)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("number", range(40))
def test_programs(number, reentrant):
    steps = program(random.Random(number), 2, reentrant)
    outcomes = []
    for block in (contextlib.nullcontext([]), nanguard.stabilize()):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(number), dtype=torch.float64, requires_grad=True)
        with block:
            loss = checkpoint(run, steps, x, torch.softmax(x, 1), use_reentrant=False).sum()
            if number % 2:
                loss.backward()
        if not number % 2:
            loss.backward()
        outcomes.append((loss.detach(), x.grad))
    (value, gradient), (guarded, guarded_gradient) = outcomes
    torch.testing.assert_close(guarded, value, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(guarded_gradient, gradient, rtol=1e-5, atol=1e-6)
