"""Products with a reciprocal are quotients, whatever has moved its elements; and NaN that is replaced by 0."""

import pytest
import torch

import nanguard

RECIPROCALS = {
    "none": lambda e: e * (1 / e.sum(1))[:, None],
    "from_the_left": lambda e: (1 / e.sum(1))[:, None] * e,
    "unsqueeze": lambda e: e * (1 / e.sum(1)).unsqueeze(1),
    "power": lambda e: e * e.sum(1).pow(-1).view(-1, 1),
    "reciprocal": lambda e: e * e.sum(1).reciprocal()[:, None],
    "expand_as": lambda e: e * (1 / e.sum(1, keepdim=True)).expand_as(e),
    "transposed": lambda e: e * (1 / e.t().sum(0, keepdim=True)).t(),
    "permuted": lambda e: e * (1 / e.sum(1)[None]).permute(1, 0),
    "twice_transposed": lambda e: (e.t() * (1 / e.sum(1))).t(),
    "constant": lambda e: e * (2 / e.sum(1))[:, None] / 2,
    "einsum": lambda e: torch.einsum("ij,i->ij", e, 1 / e.sum(1)),
    "einsum_from_the_left": lambda e: torch.einsum("i,ij->ij", 1 / e.sum(1), e),
    "picked": lambda e: e[:2] * (1 / e.sum(1, keepdim=True))[:2],
}
LOGITS = {
    "far": [[0.0, 200, -150], [-300, -301, -302], [1, 2, 3]],
    "mild": [[0.3, -0.2, 1], [2, 0, -1], [1, 2, 3]],
    "masked": [[0.0, -torch.inf, 150], [-300, -torch.inf, -301], [1, 2, -torch.inf]],
}


def value_and_gradient(function, x, guarded=True, backend=None):
    x = x.clone().requires_grad_()
    run = function if backend is None else torch.compile(function, backend=backend)
    if guarded:
        with nanguard.stabilize():
            value = run(x)
    else:
        value = run(x)
    weight = torch.arange(1.0, value.numel() + 1).reshape(value.shape).to(value)
    (value.masked_fill(value.detach().isinf(), 0.0) * weight).sum().backward()
    return value.detach(), x.grad


def agree(found, expected):
    for single, double in zip(found, expected, strict=True):
        torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("name", RECIPROCALS)
def test_product_with_a_reciprocal_is_a_softmax(name, logits, backend):
    torch._dynamo.reset()
    x, form = torch.tensor(LOGITS[logits]), RECIPROCALS[name]
    expected = value_and_gradient(lambda x: x.softmax(1)[: 2 if name == "picked" else 3], x.double(), guarded=False)
    agree(value_and_gradient(lambda x: form(torch.exp(x)), x, backend=backend), expected)


@pytest.mark.parametrize("make", [lambda e: e * (1 / e.sum(1)), lambda e: e * (1 / e.sum(0))[:, None]])
def test_misaligned_reciprocal_is_no_softmax(make):
    x = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    expected = value_and_gradient(lambda x: make(torch.exp(x)), x.double(), guarded=False)
    agree(value_and_gradient(lambda x: make(torch.exp(x)), x), expected)


FILLINGS = {
    "function": lambda p: torch.nan_to_num(p),
    "method": lambda p: p.nan_to_num(),
    "named": lambda p: torch.nan_to_num(p, nan=0.0),
    "positional": lambda p: p.nan_to_num(0),
    "spelled_out": lambda p: p.nan_to_num(nan=0.0, posinf=1.0, neginf=0.0),
    "in_place": lambda p: p.nan_to_num_(),
    "in_place_function": lambda p: torch.nan_to_num_(p, nan=0.0),
}
PROBABILITIES = {
    "softmax": (lambda x: x.softmax(1) * 1, lambda x: x.log_softmax(1)),
    "by_hand": (lambda x: torch.exp(x) / torch.exp(x).sum(1, keepdim=True), lambda x: x.log_softmax(1)),
    "sigmoid": (lambda x: x.sigmoid() * 1, torch.nn.functional.logsigmoid),
}
_NOTHING = [[-torch.inf] * 3]


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("probabilities", PROBABILITIES)
@pytest.mark.parametrize("name", FILLINGS)
class TestNanToNum:
    def test_is_the_identity_for_probabilities(self, name, probabilities, backend):
        torch._dynamo.reset()
        filling, (make, exact) = FILLINGS[name], PROBABILITIES[probabilities]
        x = torch.tensor([[0.0, 200, -150], [1, 2, 3]])
        found = value_and_gradient(lambda x: torch.log(filling(make(x))), x, backend=backend)
        agree(found, value_and_gradient(exact, x.double(), guarded=False))

    def test_nothing_is_zero(self, name, probabilities, backend):
        torch._dynamo.reset()
        filling, (make, exact) = FILLINGS[name], PROBABILITIES[probabilities]
        x = torch.tensor([[0.0, 200, -150], *_NOTHING])
        value, gradient = value_and_gradient(lambda x: torch.log(filling(make(x))), x, backend=backend)
        assert (value[1] == -torch.inf).all()
        expected = value_and_gradient(exact, x[:1].double(), guarded=False)
        agree((value[:1], gradient[:1]), expected)


class TestNanToNumOfOthers:
    @pytest.mark.parametrize(
        "make",
        [
            lambda x: torch.nan_to_num(torch.exp(x)),
            lambda x: torch.nan_to_num(x.softmax(1), nan=1.0),
            lambda x: torch.nan_to_num(x.softmax(1) / (x * 2).softmax(1)),
            lambda x: torch.nan_to_num(x.log()),
        ],
    )
    def test_stays_as_it_is(self, make):
        x = torch.tensor([[0.0, 200, -150], *_NOTHING])
        with nanguard.stabilize():
            value = make(x)
            logarithm = torch.log(value)
        torch.testing.assert_close(logarithm, torch.log(value), rtol=0, atol=0, equal_nan=True)

    def test_no_gradient_becomes_nan(self):
        x = torch.tensor([[0.0, 2, 1], *_NOTHING])

        def loss(x):
            p = torch.nan_to_num(x.softmax(1))
            return torch.log(p[:1])

        found, expected = value_and_gradient(loss, x), value_and_gradient(loss, x, guarded=False)
        assert not (found[1].isnan() & ~expected[1].isnan()).any()
