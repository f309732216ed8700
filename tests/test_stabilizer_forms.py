"""Forms as people write them, each with its stable reference: value and gradient at inputs where torch fails."""

import math

import pytest
import torch
import torch.nn.functional as F

import nanguard

TARGET = torch.tensor([0, 3, 1, 2, 4, 2])
ROWS = torch.arange(6)
MASK = torch.tensor(
    [[1, 1, 0, 1, 1], [1, 0, 1, 1, 0], [0, 1, 1, 0, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 0, 1, 0, 1]]
).bool()
KEPT = torch.tensor([1, 0, 1, 1, 1, 1]).bool()
EYE = torch.eye(6, dtype=torch.bool)
PRIOR = torch.tensor([0.5, 1.0, 2.0, 0.25, 1.5])
EPSILON = torch.linspace(-0.1, 0.1, 30).view(6, 5)


def lsm(x):
    return F.log_softmax(x, 1)


def masked(x, mask):
    return x.masked_fill(mask, -math.inf)


def logits(seed=0):
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed)) * 40
    x[1] += 150
    x[2] -= 150
    x[:, 1] += 170
    return x


def scores():
    x = torch.randn(6, 6, generator=torch.Generator().manual_seed(1)) * 60
    x[0, 0] += 130
    x[3] -= 120
    return x


def cross_entropy(x):
    return F.cross_entropy(x, TARGET)


def mixture(gate, x):
    p = F.softmax(x.unflatten(0, (2, 3)).transpose(0, 1), -1)
    return -torch.log((F.softmax(gate[:3, :2], 1).unsqueeze(-1) * p).sum(1)).mean()


def mixture_reference(gate, x):
    p = F.log_softmax(x.unflatten(0, (2, 3)).transpose(0, 1), -1)
    return -torch.logsumexp(F.log_softmax(gate[:3, :2], 1).unsqueeze(-1) + p, 1).mean()


def picked(x):
    return F.softmax(x, 1)[ROWS, TARGET]


def one_hot(x):
    return F.one_hot(TARGET, 5).to(x.dtype)


def ratio(x):
    new, old = F.softmax(x + EPSILON.to(x.dtype), 1), F.softmax(x, 1).detach()
    return ((new * one_hot(x)).sum(1) / (old * one_hot(x)).sum(1)).mean()


def ratio_reference(x):
    return (lsm(x + EPSILON.to(x.dtype)) - lsm(x).detach())[ROWS, TARGET].exp().mean()


def shares(s, others):
    e = torch.exp(s)
    return -torch.log(e[ROWS, ROWS.roll(1)] / others(e)).mean()


def shares_reference(s):
    return -(s[ROWS, ROWS.roll(1)] - masked(s, EYE).logsumexp(1)).mean()


def filled(x):
    e, total = torch.exp(x), torch.zeros(6, dtype=x.dtype)
    for row in range(6):
        total[row] = e[row, TARGET[row]] / e[row].sum()
    return -torch.log(total).mean()


def pairs(s):
    e, loss = torch.exp(s), 0
    for row in range(6):
        loss = loss - torch.log(e[row, row - 1] / (e[row].sum() - e[row, row]))
    return loss / 6


def renormalised(p):
    return F.nll_loss(torch.log(p / p.sum(1, keepdim=True)), TARGET)


def without_own(s):
    e = torch.exp(s) * ~EYE
    return -torch.log((e / e.sum(1, keepdim=True)).masked_fill(EYE, 1.0)).mean()


def chain(x):
    p, state = F.softmax(x, 1), torch.full((5,), 0.2, dtype=x.dtype)
    state = p[0] * state
    for step in range(1, 6):
        state = (state @ STEPS.to(x.dtype)) * p[step]
    return -torch.log(state.sum())


def chain_reference(x):
    state = lsm(x)[0] - math.log(5)
    for log_p in lsm(x)[1:]:
        state = torch.logsumexp(state[:, None] + STEPS.to(x.dtype).log(), 0) + log_p
    return -state.logsumexp(0)


STEPS = torch.eye(5) * 0.9 + torch.eye(5).roll(1, 0) * 0.1
ALLOWED = MASK | F.one_hot(TARGET, 5).bool()

# Name: form, reference, inputs.
FORMS = {
    "vstack": (lambda x: F.nll_loss(torch.vstack([F.softmax(row, 0) for row in x]).log(), TARGET), cross_entropy),
    "column_stack": (
        lambda x: F.nll_loss(torch.column_stack(list(F.softmax(x, 1).unbind(1))).log(), TARGET),
        cross_entropy,
    ),
    "tensor_split": (
        lambda x: -torch.cat([part.log() for part in F.softmax(x, 1).tensor_split([2, 3])])[ROWS, TARGET].mean(),
        cross_entropy,
    ),
    "outer": (
        lambda x: torch.log(torch.outer(F.softmax(x[0], 0), F.softmax(x[3], 0))).mean(),
        lambda x: (lsm(x)[0][:, None] + lsm(x)[3]).mean(),
    ),
    "add with alpha": (
        lambda x: torch.log(torch.add(F.softmax(x[:3], 1), F.softmax(x[3:], 1), alpha=0.5)).mean(),
        lambda x: torch.logaddexp(lsm(x[:3]), lsm(x[3:]) + math.log(0.5)).mean(),
    ),
    "mixture of softmaxes": (mixture, mixture_reference, (logits(2), logits())),
    "relative to a prior": (
        lambda x: torch.log(F.softmax(x, 1) / PRIOR.to(x.dtype))[ROWS, TARGET].mean(),
        lambda x: (lsm(x) - PRIOR.to(x.dtype).log())[ROWS, TARGET].mean(),
    ),
    "masked mean": (
        lambda x: torch.log((x.exp() * MASK).sum(1, keepdim=True) / MASK.sum(1, keepdim=True)).mean(),
        lambda x: (masked(x, ~MASK).logsumexp(1) - MASK.sum(1).log()).mean(),
    ),
    "marginal of some samples": (
        lambda x: torch.log((F.softmax(x, 1) * KEPT[:, None]).sum(0) / KEPT.sum()).mean(),
        lambda x: (lsm(x)[KEPT].logsumexp(0) - math.log(5)).mean(),
    ),
    "padded with ones": (
        lambda x: -picked(x).masked_fill(~KEPT, 1.0).log().sum(),
        lambda x: -lsm(x)[ROWS, TARGET][KEPT].sum(),
    ),
    "where padded with ones": (
        lambda x: -torch.where(KEPT, picked(x), torch.ones_like(picked(x))).log().sum(),
        lambda x: -lsm(x)[ROWS, TARGET][KEPT].sum(),
    ),
    "ratio by one-hot": (ratio, ratio_reference),
    "triangles": (
        lambda s: shares(s, lambda e: e.triu(1).sum(1) + torch.tril(e, -1).sum(1)),
        shares_reference,
        (scores(),),
    ),
    "without an embedded diagonal": (
        lambda s: shares(s, lambda e: (e - torch.diag_embed(e.diagonal())).sum(1)),
        shares_reference,
        (scores(),),
    ),
    "without a diagonal matrix": (
        lambda s: shares(s, lambda e: (e - torch.diag(torch.diag(e))).sum(1)),
        shares_reference,
        (scores(),),
    ),
    "without the weighted": (
        lambda s: shares(s, lambda e: (e - e * EYE.to(e.dtype)).sum(1)),
        shares_reference,
        (scores(),),
    ),
    "invalid actions": (
        lambda x: renormalised(F.softmax(x, 1) * ALLOWED),
        lambda x: cross_entropy(masked(x, ~ALLOWED)),
    ),
    "invalid actions, filled": (
        lambda x: renormalised(F.softmax(x, 1).masked_fill(~ALLOWED, 0)),
        lambda x: cross_entropy(masked(x, ~ALLOWED)),
    ),
    "weighed by a prior": (
        lambda x: renormalised(F.softmax(x, 1) * PRIOR.to(x.dtype)),
        lambda x: cross_entropy(x + PRIOR.to(x.dtype).log()),
    ),
    "shares of others, padded with ones": (
        without_own,
        lambda s: -F.log_softmax(masked(s, EYE), 1).masked_fill(EYE, 0).mean(),
        (scores(),),
    ),
    "markov chain": (chain, chain_reference, ((torch.randn(6, 5, generator=torch.Generator().manual_seed(3)) * 90),)),
    "inner": (
        lambda x: torch.log(torch.inner(F.softmax(x[:3] * 3, 1), F.softmax(-x[3:] * 3, 1))).mean(),
        lambda x: torch.logsumexp(lsm(x[:3] * 3)[:, None] + lsm(-x[3:] * 3), 2).mean(),
    ),
    "tensordot": (
        lambda x: torch.log(torch.tensordot(PRIOR.to(x.dtype)[:2], F.softmax(x, 1)[:, [0, 4]], dims=([0], [1]))).mean(),
        lambda x: torch.logsumexp(lsm(x)[:, [0, 4]] + PRIOR.to(x.dtype)[:2].log(), 1).mean(),
        (logits(),),
    ),
    "zeros filled in a loop": (filled, cross_entropy),
    "pairs in a loop": (pairs, lambda s: -(s[ROWS, ROWS - 1] - masked(s, EYE).logsumexp(1)).mean(), (scores(),)),
    "rows and columns": (
        lambda s: -torch.log(s.exp().diagonal() / torch.sqrt(s.exp().sum(1) * s.exp().sum(0))).mean(),
        lambda s: -(s.diagonal() - (s.logsumexp(1) + s.logsumexp(0)) / 2).mean(),
        (scores(),),
    ),
}


def outcome(function, inputs, dtype):
    given = [x.to(dtype).requires_grad_() for x in inputs]
    value = function(*given)
    return value.detach().double(), [grad.double() for grad in torch.autograd.grad(value, given)]


def is_right(found, expected):
    return all(
        torch.allclose(one, other, rtol=1e-4, atol=1e-6 * float(other.abs().max()))
        for one, other in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True)
    )


@pytest.mark.parametrize("name", FORMS)
def test_value_and_gradient(name):
    form, reference, *given = FORMS[name]
    inputs = given[0] if given else (logits(),)
    expected = outcome(reference, inputs, torch.float64)
    assert not is_right(outcome(form, inputs, torch.float32), expected), "torch is right: it is no unstable form"
    with nanguard.stabilize() as swaps:
        found = outcome(form, inputs, torch.float32)
    assert swaps
    assert is_right(found, expected), (found, expected)


def test_a_total_that_cancels_has_no_new_nan():
    """What is left of a total after its largest part is so small that its reciprocal has no finite derivative."""
    s = (torch.eye(6) * 85).requires_grad_()
    with nanguard.stabilize():
        e = s.exp()
        loss = (1 / (e - e * torch.where(EYE, 1.0, 0.5).requires_grad_()).sum(1)).sum()
    assert torch.autograd.grad(loss, s)[0].isfinite().all()


def index(p):
    """The Tversky index of the target classes."""
    t = F.one_hot(TARGET, 5).to(p.dtype)
    hits = (p * t).sum(0)
    return hits / (hits + 0.3 * (p * (1 - t)).sum(0) + 0.7 * ((1 - p) * t).sum(0) + 1e-6)


# Quotients of probabilities that are as good as any.
QUOTIENTS = {
    "overlap": lambda p: index(p),
    "a part by all, and one": lambda p: p[:, :2].sum(1) / (p.sum(1) + 1),
    "a floor": lambda p: p[:, :2].sum(1) / p[:, 2:].sum(1).clamp(min=1e-6),
    "mean of some": lambda p: (p * MASK).sum(1) / MASK.sum(1),
}


@pytest.mark.parametrize("quotient", QUOTIENTS.values(), ids=QUOTIENTS.keys())
def test_bounded_quotients_keep_every_bit(quotient):
    def run():
        x = logits().requires_grad_()
        value = quotient(F.softmax(x, 1))
        return value, torch.autograd.grad(value.sum(), x)[0]

    plain = run()
    with nanguard.stabilize() as swaps:
        guarded = run()
    assert swaps == []
    assert all(torch.equal(one, other) for one, other in zip(plain, guarded, strict=True))
