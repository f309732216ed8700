"""Graphs that dynamo breaks: what is known on one side of a break is known on the other."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import nanguard
from nanguard import NanGuardWarning

MASK = torch.tensor([[True, False, True], [False, True, False], [True, True, False], [False, False, True]])
CLASSES = torch.tensor([0, 2, 1, 1])


def logits(scale=300.0, rows=4):
    torch.manual_seed(0)
    return (torch.randn(rows, 3) * scale).requires_grad_()


def compiled(function, backend="aot_eager"):
    torch._dynamo.reset()
    return torch.compile(function, backend=backend)


def others(e):
    return e[F.one_hot(CLASSES, 3) == 0].view(4, 2)


def rest(x):
    return torch.logsumexp(x.unsqueeze(1).masked_fill(torch.eye(3, dtype=torch.bool), -torch.inf), 2)


# A loss by hand, each with a boolean mask between the exponential and the logarithm; and the same as it should be written.
LOSSES = {
    "softmax": (
        lambda x, m: -torch.log(torch.softmax(x, 1)[m]).mean(),
        lambda x, m: -F.log_softmax(x, 1)[m].mean(),
    ),
    "softmax of what is computed in the graph": (
        lambda x, m: -torch.log(torch.softmax(x.sin() * 200 + x, 1)[m]).sum(),
        lambda x, m: -F.log_softmax(x.sin() * 200 + x, 1)[m].sum(),
    ),
    "masked_select": (
        lambda x, m: torch.log(torch.sigmoid(x).masked_select(m)).sum(),
        lambda x, m: F.logsigmoid(x).masked_select(m).sum(),
    ),
    "two masks": (
        lambda x, m: torch.log(torch.sigmoid(x)[m]).sum() + torch.log(1 - torch.sigmoid(x)[~m]).sum(),
        lambda x, m: F.logsigmoid(x)[m].sum() + F.logsigmoid(-x)[~m].sum(),
    ),
    "complements of a softmax": (
        lambda x, m: torch.log1p(-torch.softmax(x, 1)[m]).sum(),
        lambda x, m: (rest(x) - torch.logsumexp(x, 1, True))[m].sum(),
    ),
    "sums of exponentials": (
        lambda x, m: torch.log(others(torch.exp(x)).sum(1)),
        lambda x, m: torch.logsumexp(others(x), 1),
    ),
    "two breaks": (
        lambda x, m: torch.log(torch.softmax(x, 1)[m][torch.ones(int(m.sum()), dtype=torch.bool)] * 0.5).mean(),
        lambda x, m: (F.log_softmax(x, 1)[m]).mean() - torch.tensor(2.0).log(),
    ),
    "labels": (
        lambda x, m: -sum(torch.log(torch.softmax(x, 1)[i, CLASSES[i].item()]) for i in range(4)),
        lambda x, m: F.cross_entropy(x, CLASSES, reduction="sum"),
    ),
    "a graph in between": (
        lambda x, m: between(torch.softmax(x, 1), m),
        lambda x, m: (F.log_softmax(x, 1)[m] * 2).mean(),
    ),
}


def between(p, m):
    squared = p[m] * p[m]
    torch._dynamo.graph_break()
    return torch.log(squared).mean()


def is_right(loss, reference, x, m):
    doubled = x.detach().double().requires_grad_()
    value = reference(doubled, m)
    torch.testing.assert_close(loss.double(), value, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(loss.sum(), x)[0]
    torch.testing.assert_close(found.double(), torch.autograd.grad(value.sum(), doubled)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 10.0, 300.0])
@pytest.mark.parametrize("name", LOSSES)
def test_a_logarithm_behind_a_break(name, scale):
    function, reference = LOSSES[name]
    run = compiled(function)
    for _ in range(2):
        x = logits(scale)
        with nanguard.stabilize() as swaps:
            loss = run(x, MASK)
        assert swaps != []
        is_right(loss, reference, x, MASK)
    outside = run(x.detach(), MASK)
    torch.testing.assert_close(outside, function(x.detach(), MASK), equal_nan=True)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_sizes_that_change(backend):
    function, reference = LOSSES["softmax"]
    run = compiled(function, backend)
    for rows in (4, 5, 7, 11):
        x = logits(rows=rows)
        m = torch.rand(rows, 3) > 0.5
        with nanguard.stabilize() as swaps:
            loss = run(x, m)
        assert [(swap.rule, swap.count) for swap in swaps] == [("NG102", 1)]
        is_right(loss, reference, x, m)


def test_no_graph_is_compiled_anew():
    run = compiled(LOSSES["softmax"][0])
    counts = []
    for _ in range(5):
        torch._dynamo.utils.counters.clear()
        with nanguard.stabilize():
            run(logits(), MASK)
        counts.append(torch._dynamo.utils.counters["frames"]["total"])
    assert counts[0] > 0
    assert counts[1:] == [0, 0, 0, 0]


def test_a_swap_says_where_it_is():
    def run(x, m):
        p = torch.softmax(x, 1)
        picked = p[m]
        return torch.log(picked).mean()

    with nanguard.stabilize() as swaps:
        compiled(run)(logits(), MASK)
    (swap,) = swaps
    assert swap.original == "torch.log(picked)"
    assert swap.replacement.startswith("F.log_softmax(")
    assert swap.file == __file__
    assert swap.line == run.__code__.co_firstlineno + 3


class Head(nn.Module):
    """The logits are seen by nobody outside."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(x).softmax(1)


def test_a_model_that_is_compiled_alone():
    torch.manual_seed(0)
    head, x = Head(), torch.randn(4, 3) * 500
    whole = compiled(head)
    with nanguard.stabilize() as swaps:
        p = whole(x)
        loss = -torch.log(p[torch.arange(4), CLASSES]).mean()
    assert len(swaps) == 1
    assert p.shape == (4, 3)
    reference = F.cross_entropy(head.layer(x).double(), CLASSES)
    torch.testing.assert_close(loss.double(), reference, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(loss, head.layer.weight)[0]
    torch.testing.assert_close(found, torch.autograd.grad(reference, head.layer.weight)[0], rtol=1e-5, atol=1e-5)


def test_the_derivative_at_what_is_between():
    """Somebody may ask for it: it is the one of the code as written."""

    def derivative(around):
        x = logits(2.0)
        with around:
            p = torch.softmax(x, 1)[MASK]
            loss = compiled(lambda p: torch.log(p).sum())(p)
        return torch.autograd.grad(loss, p)[0]

    torch.testing.assert_close(derivative(nanguard.stabilize()), derivative(torch.enable_grad()))


def hooked(p):
    p.register_hook(lambda grad: grad * 2)
    return p


STAYING = {
    "an unknown factor": lambda p, m: p * torch.rand(4, 3, generator=torch.Generator().manual_seed(0)),
    "an edit": lambda p, m: p.clone().mul_(torch.rand(4, 3, generator=torch.Generator().manual_seed(0))),
    "an edit through data": lambda p, m: (p.data.mul_(0.5), p)[1],
    "a hook": lambda p, m: hooked(p),
}


@pytest.mark.parametrize("change", STAYING.values(), ids=STAYING.keys())
def test_what_stays_as_it_is(change):
    after = compiled(lambda p: torch.log(p + 0).sum())
    outcomes = []
    for around in (torch.enable_grad(), nanguard.stabilize()):
        x = logits(20.0)
        with around:
            loss = after(change(torch.softmax(x, 1), MASK))
        outcomes.append((loss.detach(), torch.autograd.grad(loss, x)[0]))
    assert all(torch.equal(one, other) for one, other in zip(*outcomes, strict=True))


def test_calls_in_which_nothing_is_known():
    after = compiled(lambda p: torch.log(p).sum())
    x = logits()
    with nanguard.stabilize() as swaps:
        loss = after(torch.softmax(x, 1)[MASK])
        unknown = torch.rand(MASK.sum())
        other = after(unknown)
    assert [swap.count for swap in swaps] == [1]
    torch.testing.assert_close(loss.double(), F.log_softmax(x.double(), 1)[MASK].sum())
    assert torch.equal(other, torch.log(unknown).sum())


def test_calls_in_which_something_else_is_known():
    """The logarithm of what may be negative says less than that of a probability."""
    after = compiled(lambda p: torch.log(torch.maximum(p, p * 0.5 + 0.1)).sum())
    outcomes = []
    for around in (torch.enable_grad(), nanguard.stabilize()):
        x = logits(1.0)
        with around:
            p = torch.sigmoid(x)
            outcomes.append([after(p).detach(), after(2 * p - 1).detach(), after(1 - p.cumsum(-1)).detach()])
    for plain, guarded in zip(*outcomes, strict=True):
        torch.testing.assert_close(guarded, plain, equal_nan=True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_a_checkpoint(reentrant):
    run = compiled(LOSSES["softmax"][0])
    x = logits(10.0)
    with nanguard.stabilize():
        loss = checkpoint(run, x, MASK, use_reentrant=reentrant)
    loss.backward()
    reference = torch.autograd.grad(LOSSES["softmax"][1](x, MASK), x)[0]
    torch.testing.assert_close(x.grad, reference, rtol=1e-4, atol=1e-6)


def test_a_backend_that_cannot_take_more_inputs():
    def narrow(module, inputs):
        if any(node.name.startswith("log_") and node.op == "placeholder" for node in module.graph.nodes):
            raise ValueError("too many")
        return module.forward

    x = logits(2.0)
    warned = pytest.warns(NanGuardWarning, match="after a graph break is left as it is: ValueError: too many")
    with warned, nanguard.stabilize():
        loss = compiled(LOSSES["softmax"][0], narrow)(x, MASK)
    torch.testing.assert_close(loss, LOSSES["softmax"][1](x, MASK))


def test_without_gradients():
    run = compiled(LOSSES["softmax"][0])
    with nanguard.stabilize(), torch.no_grad():
        loss = run(logits(), MASK)
    torch.testing.assert_close(loss, LOSSES["softmax"][1](logits(), MASK).detach())


def test_probabilities_that_are_masked_out():
    """Where p is exactly 0 its logarithm is -inf, as it is without the guard, and no derivative is NaN that was none."""
    x = torch.tensor([[1.0, -torch.inf, 2.0], [0.0, 1.0, -torch.inf]], requires_grad=True)
    m = torch.tensor([[True, False, True], [False, True, False]])
    with nanguard.stabilize():
        loss = compiled(LOSSES["softmax"][0])(x, m)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, x)[0].isfinite().all()


def complements(x, m):
    p = torch.sigmoid(x)
    torch._dynamo.graph_break()
    q, rest = p * (1 - p), torch.log(1 - p)
    torch._dynamo.graph_break()
    return torch.log(q) + 0 * rest


def detached(x, m):
    p = torch.softmax(x, -1)
    torch._dynamo.graph_break()
    q = p * p.detach()
    torch._dynamo.graph_break()
    return torch.log(q[:, 0])


def of_either_sign(x, m):
    d = 2 * torch.sigmoid(x) - 1
    torch._dynamo.graph_break()
    return torch.log(d.abs() + 1e-8) + torch.log(torch.relu(d) + 1e-6) + torch.log(d.clamp(min=1e-6)) + torch.log(d * d)


def below_zero(x, m):
    q, s = 1 - torch.sigmoid(x).cumsum(-1), torch.sigmoid(x) * 0.5
    torch._dynamo.graph_break()
    return torch.log(torch.maximum(q, s))


def weighed(x, m):
    q = torch.exp(x) * m
    torch._dynamo.graph_break()
    return (q / q.sum(-1, keepdim=True)).square()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("function", [complements, detached, of_either_sign, below_zero, weighed])
def test_what_crosses_breaks_means_the_same(function, backend):
    """At ordinary numbers value and derivatives are those of the code as written."""
    outcomes = []
    for around in (torch.enable_grad(), nanguard.stabilize()):
        x, m = logits(1.0), MASK.float().requires_grad_()
        with around:
            value = compiled(function, backend)(x, m)
        gradients = torch.autograd.grad(value.sum(), (x, m), allow_unused=True, materialize_grads=True)
        outcomes.append((value.detach(), *gradients))
    for plain, guarded in zip(*outcomes, strict=True):
        torch.testing.assert_close(guarded, plain, rtol=1e-4, atol=1e-6)
