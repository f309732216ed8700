"""What the recording knows of the value to blame, from one line at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nanguard.diagnosis.facts import facts_of, state_facts
from nanguard.diagnosis.recording import Trace
from nanguard.diagnosis.walk import blame

Line = Callable[[Tensor, nn.Module], Tensor]
LOW, NEVER = -200.0, float("-inf")


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(4))
        self.v = nn.Parameter(torch.ones(4))
        self.register_buffer("zeros", torch.zeros(4))
        self.norm = nn.BatchNorm1d(4)


def facts(line: Line, x: Tensor | None = None, *, by_weights: bool = True) -> dict[str, str]:
    """The facts about what makes the sum of a line of code non-finite, for zeros of shape (2, 4)."""
    module = Weights()
    x = torch.zeros(2, 4) if x is None else x
    trace = Trace(module, [x], [*module.parameters(), *module.buffers()])
    with trace.recording():
        loss = line(x, module).sum()
    found = blame(trace, [loss])
    assert found is not None
    return facts_of(found, by_weights=by_weights)


TRAITS: dict[str, tuple[Line, set[str]]] = {
    "softmax": (lambda x, m: ((x + LOW * torch.eye(4)[0]).softmax(1)[:, 0] * 0.5).log(), {"softmax"}),
    "softmax, cast": (lambda x, m: (x.softmax(1).double() * 0).log(), {"softmax"}),
    "sigmoid": (lambda x, m: (x + LOW).sigmoid().log(), {"sigmoid"}),
    "one minus sigmoid": (lambda x, m: (1 - (x - LOW).sigmoid()).log(), {"sigmoid"}),
    "exp": (lambda x, m: (x + LOW).exp().log(), {"exponential"}),
    "scaled exp": (lambda x, m: (2 * (x + LOW).exp().sqrt()).log(), {"exponential"}),
    "sum of exp": (lambda x, m: (x + LOW).exp().sum(1).log(), {"exponentials"}),
    "exp and exp": (lambda x, m: ((x + LOW).exp() + (x + LOW).exp()).log(), {"exponentials"}),
    "quotient": (lambda x, m: ((x + LOW).exp() / x.exp().sum(1, keepdim=True)).log(), {"exponentials"}),
    "one minus exp": (lambda x, m: (1 - x.exp()).log(), {"shifted exponential"}),
    "divisor": (lambda x, m: 1 / (x + LOW).exp().mean(1), {"exponentials"}),
    "dividend": (lambda x, m: x.exp() / x, set()),
    "tanh": (lambda x, m: (1 - (x + 30).tanh() ** 2).log(), {"one minus squared tanh"}),
    "tanh by itself": (lambda x, m: (x.tanh() ** 2).log(), {"squared tanh"}),
    "tanh, not squared": (lambda x, m: (1 - (x + 30).tanh()).log(), {"tanh"}),
    "through a layer": (lambda x, m: torch.relu(x.softmax(1) @ torch.zeros(4, 4)).log(), set()),
    "contracted": (lambda x, m: (x.softmax(1) @ (x.softmax(1).mT * 0)).log(), {"softmax"}),
    "at the place of the largest": (lambda x, m: x.gather(1, x.softmax(1).max(1, keepdim=True).indices).log(), set()),
    "where": (lambda x, m: torch.where(x > 0, x, x.sigmoid() * 0).log(), {"sigmoid"}),
    "in place": (lambda x, m: x.sigmoid().mul_(0).log_(), {"sigmoid"}),
    "overwritten": (lambda x, m: x.sigmoid().relu_().mul_(0).log(), set()),
    "masked row": (lambda x, m: x.masked_fill(x == 0, NEVER).exp().sum(1).log(), {"exponentials", "masked row"}),
    "all of it masked": (lambda x, m: x.masked_fill(x == 0, NEVER).exp().sum().log(), {"exponentials", "masked row"}),
    "partly masked": (
        lambda x, m: (x + LOW).masked_fill(torch.arange(4) < 2, NEVER).exp().sum(1).log(),
        {"exponentials"},
    ),
    "columns masked": (
        lambda x, m: (x + LOW).masked_fill(torch.arange(2)[:, None] == 1, NEVER).exp().sum(0).log(),
        {"exponentials"},
    ),
}


@pytest.mark.parametrize("name", TRAITS)
def test_traits(name: str) -> None:
    line, expected = TRAITS[name]
    assert set(facts(line)) - {"zero", "minus one"} == expected


EPSILONS: dict[str, tuple[Line, str | None]] = {
    "half": (lambda x, m: 1 / (x.half() + 1e-8), "1e-08 rounds to 0 in float16"),
    "half, clamped": (lambda x, m: x.half().clamp(min=1e-8).log(), "1e-08 rounds to 0 in float16"),
    "half, from the left": (lambda x, m: 1 / (1e-8 + x.half()), "1e-08 rounds to 0 in float16"),
    "bfloat16": (lambda x, m: ((x.bfloat16() + 1e-8) * 0).log(), None),
    "bfloat16, one": (lambda x, m: (1 - (x.bfloat16() + 1).clamp(max=0.999)).log(), "0.999 rounds to 1 in bfloat16"),
    "single, one": (lambda x, m: torch.atanh((x + 1).clamp(max=1 - 1e-8)), "0.99999999 rounds to 1 in float32"),
    "smoothed": (lambda x, m: (1 - (x + 1) * (1 - 1e-8)).log(), "0.99999999 rounds to 1 in float32"),
    "one is one": (lambda x, m: (1 - (x + 1.0).clamp(max=1.0)).log(), None),
    "it holds": (lambda x, m: ((x + 1e-8) * 0).log(), None),
    "a factor of nothing": (lambda x, m: (x.half() * 1e-8).log(), None),
}


@pytest.mark.parametrize("name", EPSILONS)
def test_epsilons_that_are_none(name: str) -> None:
    line, expected = EPSILONS[name]
    lost = facts(line).get("lost")
    assert lost is None if expected is None else (lost or "").startswith(f"{expected}, where ")


WEIGHTS: dict[str, tuple[Line, str | None]] = {
    "itself": (lambda x, m: x / m.zeros, "is the buffer zeros"),
    "a view of it": (lambda x, m: x / m.w[None, :2].repeat(1, 2), "is made of the parameter w alone"),
    "its norm": (lambda x, m: x / m.w.norm(), "is made of the parameter w alone"),
    "of two": (lambda x, m: x / (m.v * m.w), "is made of the parameter v and the parameter w alone"),
    "with the batch": (lambda x, m: 1 / (m.v * x), None),
    "the dividend": (lambda x, m: m.v / x, None),
    "of none": (lambda x, m: x / torch.zeros(4), None),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_to_blame(name: str) -> None:
    line, expected = WEIGHTS[name]
    assert facts(line).get("weight") == expected
    assert "weight" not in facts(line, by_weights=False)


def test_names_are_those_that_a_user_would_write() -> None:
    class Compiled(Weights):
        def __init__(self) -> None:
            super().__init__()
            self._orig_mod = nn.Linear(4, 4)
            nn.init.zeros_(self._orig_mod.weight)

    module = Compiled()
    trace = Trace(module, [x := torch.ones(2, 4)])
    with trace.recording():
        loss = (x / module._orig_mod.weight[0]).sum()
    found = blame(trace, [loss])
    assert found is not None
    assert facts_of(found, by_weights=True)["weight"] == "is the parameter weight"


def test_exponents_and_poles() -> None:
    assert facts(lambda x, m: x.pow(-0.5))["exponent"] == "-0.5"
    assert "exponent" not in facts(lambda x, m: x ** (x - 1))
    assert "zero" in facts(lambda x, m: x.rsqrt())
    assert "zero" not in facts(lambda x, m: (x - torch.eye(4)[:2]).rsqrt())
    assert "minus one" in facts(lambda x, m: (x - 1).log1p())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("w", set()),
        ("norm.weight", set()),
        ("zeros", {"state"}),
        ("norm.running_var", {"statistics"}),
        ("x", {"state"}),
    ],
)
def test_state_that_no_optimizer_steps(name: str, expected: set[str]) -> None:
    assert set(state_facts(Weights(), name)) == expected
