"""Every rule proves itself by its own documentation: a new rule is in these tests from the moment it is declared."""

import math
import re

import pytest
import torch
import torch.nn.functional as F

import nanguard
from nanguard.algebra import rules
from nanguard.stabilizer.memo import Memo

REPLACED = [known for known in rules() if known.kind != "advice"]
TARGET = torch.tensor([1, 3, 0, 2])
DTYPES = [torch.float16, torch.bfloat16, torch.float64]


def blocks(known):
    return dict(re.findall(r"## (Example|Use instead)\n\n```python\n(.*?)```", known.documentation, re.DOTALL))


def program(known, part):
    """The code of one part of a rule's documentation, as a function of its two inputs."""
    code = compile(blocks(known)[part], f"<{known.code}>", "exec")

    def run(logits, other):
        space = {"torch": torch, "F": F, "math": math, "target": TARGET, "logits": logits, "other": other}
        exec(code, space)
        return space["result"]

    return run


def inputs(size=1.0, dtype=torch.float32, masked=False):
    torch.manual_seed(1)
    logits, other = (torch.randn(2, 4, 4) * size).to(dtype)
    if masked:
        logits[0, 0] = logits[3, 2] = -math.inf
    return logits.requires_grad_(), other


def outcome(run, logits, other):
    value = run(logits, other)
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).reshape(value.shape)
    return value.detach(), torch.autograd.grad((value * weights).sum(), logits)[0]


def guarded(run, logits, other):
    with nanguard.stabilize() as swaps:
        value, gradient = outcome(run, logits, other)
    return value, gradient, [swap.rule for swap in swaps]


@pytest.mark.parametrize("known", REPLACED, ids=lambda known: known.code)
class TestEveryRule:
    @pytest.mark.parametrize("size", [1.0, 30.0, 300.0])
    def test_fires_in_compiled_code(self, known, size):
        if known.kind == "branch":
            pytest.skip("branches are for eager code only")
        torch._dynamo.reset()
        logits, other = inputs(size)
        compiled = torch.compile(program(known, "Example"), backend="aot_eager")
        value, gradient, fired = guarded(compiled, logits, other)
        assert known.code in fired
        expected, slope = outcome(program(known, "Use instead"), *(inputs(size, torch.float64)))
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5 * size)
        torch.testing.assert_close(gradient.double(), slope, rtol=1e-4, atol=1e-5 * size)

    @pytest.mark.parametrize("size", [0.5, 6.0])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_in_other_precisions(self, known, dtype, size):
        logits, other = inputs(size, dtype)
        value, gradient, fired = guarded(program(known, "Example"), logits, other)
        assert known.code in fired
        assert value.dtype == gradient.dtype == dtype
        exact = logits.detach().double().requires_grad_()
        expected, slope = outcome(program(known, "Use instead"), exact, other.double())
        # Intermediate results of the original, such as logits + 1, are rounded as well.
        tolerance = 16 * torch.finfo(dtype).eps
        largest = max(1.0, expected[expected.isfinite()].abs().max().item())
        torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=tolerance * largest, equal_nan=True)
        finite = slope.isfinite()
        close = torch.isclose(gradient.double(), slope, rtol=4 * tolerance, atol=4 * tolerance * largest)
        assert (close | ~finite | (slope.abs() > torch.finfo(dtype).max)).all()

    @pytest.mark.parametrize("size", [1.0, 300.0])
    def test_masked_logits_bring_no_nan(self, known, size):
        plain, slope = outcome(program(known, "Example"), *inputs(size, masked=True))
        value, gradient, _ = guarded(program(known, "Example"), *inputs(size, masked=True))
        assert not (value.isnan() & ~plain.isnan()).any()
        assert not (gradient.isnan() & ~slope.isnan()).any()

    def test_what_it_suggests_is_left_alone(self, known):
        """Idempotent: the stable form is not replaced once more."""
        expected, slope = outcome(program(known, "Use instead"), *inputs(6.0))
        value, gradient, fired = guarded(program(known, "Use instead"), *inputs(6.0))
        assert fired == []
        torch.testing.assert_close((value, gradient), (expected, slope), rtol=0, atol=0, equal_nan=True)

    def test_within_another_block_once(self, known):
        logits, other = inputs()
        with nanguard.stabilize() as outer:
            value, gradient, fired = guarded(program(known, "Example"), logits, other)
        assert known.code in fired
        alone = guarded(program(known, "Example"), *inputs())
        torch.testing.assert_close((value, gradient), alone[:2], rtol=0, atol=0)
        assert len({(swap.rule, swap.line) for swap in outer}) == len(outer)


def test_a_rule_that_cannot_fire_would_be_noticed(monkeypatch):
    """These tests take their examples from the registry, so that a rule without a law behind it fails them."""
    known = next(entry for entry in REPLACED if entry.code == "NG101")
    monkeypatch.setattr("nanguard.algebra.decisions.match", lambda term, kind: None)
    monkeypatch.setattr("nanguard.stabilizer.queries._REPLIES", Memo())  # with nothing from earlier calls
    assert guarded(program(known, "Example"), *inputs())[2] == []
