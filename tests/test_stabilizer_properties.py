"""Laws that hold for every chain of operations: equal to float64, equal to the original where that is accurate."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nanguard

SOURCES = {
    "softmax0": lambda x: torch.softmax(x, 0),
    "softmax1": lambda x: torch.softmax(x, 1),
    "sigmoid": torch.sigmoid,
    "exp": torch.exp,
    "by hand": lambda x: (lambda e: e / e.sum(1, keepdim=True))(x.exp()),
    "by hand, other dim": lambda x: (lambda e: e / e.sum(0))(x.exp()),
    "of another": lambda x: x.exp() / (x + 1).exp().sum(1, keepdim=True),
}

STEPS = {
    "transpose": lambda p: p.transpose(0, -1),
    "rows": lambda p: p[:2],
    "reversed view": lambda p: p.T.contiguous(),
    "picked": lambda p: p[torch.tensor([1, 0, 0])],
    "masked": lambda p: p[p.shape[0] * [True]],
    "new dim": lambda p: p[:, None].squeeze(1),
    "flat and back": lambda p: p.reshape(-1).view(p.shape),
    "gathered": lambda p: p.gather(0, torch.zeros_like(p, dtype=torch.long)),
    "repeated": lambda p: p[:1].expand(p.shape),
    "scaled": lambda p: 0.25 * p,
    "divided": lambda p: p / 3,
    "squared": lambda p: p**2,
    "rooted": torch.sqrt,
    "epsilon": lambda p: p + 1e-6,
    "epsilon before": lambda p: 1e-3 + p,
    "floor": lambda p: p.clamp(min=1e-5),
    "both bounds": lambda p: p.clamp(1e-5, 0.75),
    "share": lambda p: p / p.sum(-1, keepdim=True),
    "wide": lambda p: p.double().to(p.dtype),
    "with itself": lambda p: p * p,
    "sum with itself": lambda p: p + p,
    "cumulated": lambda p: p.mean(0, keepdim=True).expand(p.shape),
    "doubled": lambda p: torch.cat([p, p]),
    "stacked": lambda p: torch.stack([p, p / 2], 1).select(1, 1),
    "rows apart": lambda p: torch.stack(p.unbind(0)),
    "halves": lambda p: torch.cat(p.chunk(2)),
    "reciprocal twice": lambda p: 1 / (1 / p),
    "running total": lambda p: p.cumsum(-1),
    "running product": lambda p: p.cumprod(-1),
    "product": lambda p: p.prod(0, keepdim=True).expand(p.shape),
    "other way round": lambda p: p.flip(0),
    "in order": lambda p: p.sort(-1).values,
    "largest": lambda p: p.amax(-1, keepdim=True).expand(p.shape),
    "larger": lambda p: torch.maximum(p, p.flip(0)),
    "share of two": lambda p: p / (p + p.flip(0)),
    "mixed": lambda p: torch.lerp(p, p.flip(0), 0.3),
    "transitions": lambda p: p @ transitions(p),
    "contracted": lambda p: torch.einsum("...j,jk->...k", p, transitions(p)) if p.ndim < 2 else p.mm(transitions(p)),
    "weighted": lambda p: (p * (1 + torch.arange(p.shape[-1])) / 4).sum(-1, keepdim=True).expand(p.shape),
    "scattered": lambda p: torch.zeros_like(p).scatter_add(0, torch.zeros_like(p, dtype=torch.long), p) + p,
    "chosen": lambda p: torch.where(torch.arange(p.shape[-1]) % 2 == 0, p, p.flip(-1)),
}
MATRIX = torch.tensor([[0.7, 0.3, 0.0], [0.2, 0.5, 0.3], [0.0, 0.1, 0.9]])


def transitions(p):
    """From each of the last dim to each, with some that are impossible; several blocks where rows were doubled."""
    size = p.shape[-1]
    return torch.block_diag(*[MATRIX] * -(-size // 3))[:size, :size].to(p)


def compute(x, source, steps):
    p = SOURCES[source](x)
    for step in steps:
        p = STEPS[step](p)
    return torch.log(p)


# These multiply the size of a term, and too large a term is forgotten.
GROWING = {
    "share of two",
    "mixed",
    "scattered",
    "chosen",
    "larger",
    "doubled",
    "stacked",
    "rows apart",
    "halves",
    "with itself",
    "sum with itself",
    "share",
}
chains = st.lists(st.sampled_from(sorted(STEPS)), max_size=5)
chains = chains.filter(lambda steps: sum(step in GROWING for step in steps) <= 2)
# A tensor of either sign ends what is known about the sign: only sums and the logarithm itself follow.
WEIGHTED = {"transitions", "contracted", "weighted"}
chains = chains.filter(lambda steps: not WEIGHTED & set(steps[:-1]))
# These multiply logarithms, until float64 is too small for the reference, too.
POWERS = {"product", "running product", "squared", "with itself"}
chains = chains.filter(lambda steps: sum(step in POWERS for step in steps) <= 2)


def outcome(x, source, steps, weights):
    x = x.clone().requires_grad_()
    value = compute(x, source, steps)
    (gradient,) = torch.autograd.grad((value * weights(value)).sum(), x)
    return value.detach(), gradient


@settings(max_examples=150, deadline=None)
@given(
    source=st.sampled_from(sorted(SOURCES)), steps=chains, seed=st.integers(0, 99), spread=st.sampled_from([1.0, 6.0])
)
def test_any_chain_agrees_with_float64(source, steps, seed, spread):
    """In float64 these chains are accurate, so the naive float64 value is the reference."""
    torch.manual_seed(seed)
    x = torch.randn(3, 3) * spread
    weights = lambda value: torch.linspace(-1, 1, value.numel()).to(value).reshape(value.shape)  # noqa: E731
    expected, slope = outcome(x.double(), source, steps, weights)
    with nanguard.stabilize() as swaps:
        value, gradient = outcome(x, source, steps, weights)
    assert swaps
    torch.testing.assert_close(value.double(), expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-3, atol=1e-4 * max(1, slope.abs().max().item()))


@settings(max_examples=100, deadline=None)
@given(source=st.sampled_from(sorted(SOURCES)), steps=chains, seed=st.integers(0, 99))
def test_any_chain_is_finite_on_extreme_logits(source, steps, seed):
    """Every logarithm of a chain is a finite number, however far apart the logits are, and so is its gradient."""
    torch.manual_seed(seed)
    x = torch.randn(3, 3) * 1000
    with nanguard.stabilize():
        value, gradient = outcome(x, source, steps, torch.ones_like)
    assert value.isfinite().all()
    assert gradient.isfinite().all()


@settings(max_examples=100, deadline=None)
@given(
    source=st.sampled_from(sorted(SOURCES)),
    steps=chains,
    edit=st.sampled_from(["leaf", "result", "data"]),
    seed=st.integers(0, 99),
)
def test_any_chain_that_is_edited_is_bit_identical(source, steps, edit, seed):
    def run():
        torch.manual_seed(seed)
        x = torch.randn(3, 3)
        p = SOURCES[source](x)
        for step in steps:
            p = STEPS[step](p)
        target = {"leaf": x, "result": p.contiguous(), "data": x.data}[edit]
        target.fill_(0.25)
        return torch.log(p if edit != "result" else target)

    expected = run()
    with nanguard.stabilize() as swaps:
        value = run()
    assert [swap for swap in swaps if swap.rule.startswith("NG1")] == []
    # A quotient before the edit may have been replaced.
    exact = {"rtol": 1e-4, "atol": 1e-5} if swaps else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(value, expected, equal_nan=True, **exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0, 1e3, 1e4])
def test_log_probabilities_against_exact_arithmetic(dtype, scale):
    mpmath = pytest.importorskip("mpmath")
    x = (torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scale).to(dtype)
    with nanguard.stabilize():
        value = torch.log(torch.softmax(x, 0))
    with mpmath.workdps(60):
        total = mpmath.fsum(mpmath.exp(mpmath.mpf(entry)) for entry in x.tolist())
        exact = [float(mpmath.mpf(entry) - mpmath.log(total)) for entry in x.tolist()]
    tolerance = 2 * torch.finfo(dtype).eps
    for found, expected in zip(value.tolist(), exact, strict=True):
        assert math.isclose(found, expected, rel_tol=tolerance, abs_tol=tolerance * max(1.0, scale))
