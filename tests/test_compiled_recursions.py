"""Recursions that are unrolled in a compiled graph: what has a long history is computed from what is remembered of it."""

import pytest
import torch
from test_stabilizer_long_recursions import RECURSIONS, STATES, agree, normal, value_and_gradient

import nanguard

# Longer than what is known of one term.
STEPS = {
    "forward": 40,
    "constant_moves": 40,
    "backward": 40,
    "stacked": 12,
    "scaled": 14,
    "product": 80,
    "survival": 70,
}


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager")


@pytest.mark.parametrize("name", STEPS)
def test_are_those_of_exact_arithmetic(name):
    recursion, exact = RECURSIONS[name]
    x = normal(STEPS[name], STATES) * 30
    agree(value_and_gradient(compiled(recursion), x, guarded=True), value_and_gradient(exact, x.double()))


def test_alignment_of_scalars():
    recursion, exact = RECURSIONS["alignment"]
    x = normal(9, STATES) * 30
    agree(value_and_gradient(compiled(recursion), x, guarded=True), value_and_gradient(exact, x.double()))


def test_are_the_same_without_gradients():
    recursion, exact = RECURSIONS["forward"]
    x = normal(40, STATES) * 30
    with torch.no_grad(), nanguard.stabilize():
        value = compiled(recursion)(x)
    torch.testing.assert_close(value.double(), exact(x.double()), rtol=1e-5, atol=1e-3)


def grown(x):
    p = x.softmax(1)
    weight = p[0]
    for step in range(1, len(x)):
        weight = weight * p[step]
    return weight


def nodes_of(function, x):
    """How many nodes the graph has after it was stabilised, and the result."""
    counted = []

    def backend(module, inputs):
        counted.append(len(module.graph.nodes))
        return module.forward

    torch._dynamo.reset()
    with nanguard.stabilize():
        value = torch.compile(function, backend=backend)(x)
    return counted, value


def test_what_nobody_asks_for_is_not_computed():
    x = normal(60, STATES)
    counted, value = nodes_of(lambda x: (grown(x), x.softmax(0)[0].log()), x)
    plain, _ = nodes_of(lambda x: (grown(x), x.log_softmax(0)[0]), x)
    assert counted[0] <= plain[0] + 2
    assert torch.equal(value[0], grown(x))


def test_graph_grows_with_the_number_of_steps():
    few, twice, most = (nodes_of(lambda x: grown(x).log(), normal(steps, STATES))[0][0] for steps in (40, 80, 160))
    assert most - twice <= 2.5 * (twice - few)
    assert most < 160 * 4


def test_edit_of_a_step_is_seen():
    def edited(x):
        weight = grown(x)
        weight[2] = 0.25
        return weight.log()

    x = normal(60, STATES) * 0.1
    with nanguard.stabilize():
        value = compiled(edited)(x)
    torch.testing.assert_close(value, edited(x))


def test_hook_at_a_step_is_seen():
    def watched(x):
        p = x.softmax(1)
        weight = p[0]
        for step in range(1, len(x)):
            weight = weight * p[step]
            if step == 5:
                weight.register_hook(lambda gradient: 2 * gradient)
        return weight.log().sum()

    x = normal(40, STATES) * 0.3
    found = value_and_gradient(compiled(watched), x, guarded=True)
    agree(found, value_and_gradient(watched, x.double()))
