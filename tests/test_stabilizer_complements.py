"""What remains of 1 after a maximum or a mask, masks that put a 1, shares of sigmoids, and losses that look like them."""

import pytest
import torch
from derivatives import value_and_gradient
from torch.nn import functional as F

import nanguard

logsigmoid = F.logsigmoid
EXTREME = torch.tensor([[30.0, -30, 100, 4], [-120, 0, 20, -2], [17, 90, -300, 1]])
VANISHING = torch.tensor([[-130.0, -120, -125, -300], [-120, -122, -121, -110], [0, 1, 2, 3]])
DIAGONAL = torch.eye(3, 4, dtype=torch.bool)


def maximum(x):
    return torch.log(1 - torch.sigmoid(x).max(0).values)


def smallest(x):
    return torch.log(1 - torch.sigmoid(x).amin(1))


def in_order(x):
    return torch.log(1 - torch.sigmoid(x).sort(1).values)


def largest_two(x):
    return torch.log1p(-torch.sigmoid(x).topk(2, dim=1).values)


def of_two(x):
    return torch.log(1 - torch.minimum(torch.sigmoid(x), torch.sigmoid(-x)))


def filled_with_one(x):
    return torch.sigmoid(x).masked_fill(DIAGONAL, 1.0).log()


def one_where_masked(x):
    return torch.log(torch.where(DIAGONAL, torch.ones_like(x), torch.sigmoid(x)))


def masked_hazards(x):
    return torch.log(torch.cumprod(1 - torch.sigmoid(x) * ~DIAGONAL, 1))


def masked_product(x):
    return torch.log((1 - torch.sigmoid(x) * (~DIAGONAL).float()).prod(1))


def assigned(x):
    p = torch.sigmoid(x).clone()
    p[DIAGONAL] = 0
    return torch.log1p(-p)


def after_constant(x):
    return torch.log(1 - torch.cat([torch.zeros(3, 1), torch.sigmoid(x)], 1))


def odds_against(x):
    return torch.log(1 / torch.sigmoid(x) - 1)


def one_and_odds(x):
    p = torch.sigmoid(x)
    return torch.log(1 + p / (1 - p))


def survival_from_one(x):
    survival = torch.cumprod(1 - torch.sigmoid(x), 1)
    return torch.log(torch.cat([torch.ones_like(survival[:, :1]), survival], 1))


def shares(x):
    p = torch.sigmoid(x)
    return p / p.sum(1, keepdim=True)


def twice_sigmoid(x):
    return 2 / (1 + torch.exp(-2 * x)) - 1


PRIOR = torch.tensor(0.05)


def over_prior(x):
    return torch.log(torch.sigmoid(x) / PRIOR)


def times_prior(x):
    return torch.log(PRIOR * torch.sigmoid(x))


def plus_prior(x):
    return torch.log(1 - torch.sigmoid(x) + PRIOR * 0)


def posterior(x):
    joint = torch.softmax(x, 1) * torch.exp(2 * x)
    return joint / joint.sum(1, keepdim=True)


def product_of_experts(x):
    joint = torch.softmax(x, 1) * torch.softmax(-x, 1)
    return joint / joint.sum(1, keepdim=True)


def _zeros(x):
    return torch.zeros_like(x[:, :1])


CASES = {
    maximum: (EXTREME, lambda x: logsigmoid(-x.max(0).values)),
    smallest: (EXTREME, lambda x: logsigmoid(-x.amin(1))),
    in_order: (EXTREME, lambda x: logsigmoid(-x.sort(1).values)),
    largest_two: (EXTREME, lambda x: logsigmoid(-x.topk(2, dim=1).values)),
    of_two: (EXTREME, lambda x: logsigmoid(-torch.minimum(x, -x))),
    filled_with_one: (EXTREME, lambda x: logsigmoid(x).masked_fill(DIAGONAL, 0.0)),
    one_where_masked: (EXTREME, lambda x: logsigmoid(x).masked_fill(DIAGONAL, 0.0)),
    masked_hazards: (EXTREME, lambda x: logsigmoid(-x).masked_fill(DIAGONAL, 0.0).cumsum(1)),
    masked_product: (EXTREME, lambda x: logsigmoid(-x).masked_fill(DIAGONAL, 0.0).sum(1)),
    assigned: (EXTREME, lambda x: logsigmoid(-x).masked_fill(DIAGONAL, 0.0)),
    after_constant: (EXTREME, lambda x: torch.cat([_zeros(x), logsigmoid(-x)], 1)),
    odds_against: (EXTREME, lambda x: -x),
    one_and_odds: (EXTREME, F.softplus),
    survival_from_one: (EXTREME, lambda x: torch.cat([_zeros(x), logsigmoid(-x).cumsum(1)], 1)),
    over_prior: (EXTREME, lambda x: logsigmoid(x) - PRIOR.log()),
    times_prior: (EXTREME, lambda x: logsigmoid(x) + PRIOR.log()),
    plus_prior: (EXTREME, lambda x: logsigmoid(-x)),
    shares: (VANISHING, lambda x: torch.softmax(logsigmoid(x), 1)),
    posterior: (EXTREME, lambda x: torch.softmax(3 * x, 1)),
    product_of_experts: (EXTREME, lambda x: torch.softmax(0 * x, 1)),
    twice_sigmoid: (EXTREME, torch.tanh),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("loss", CASES, ids=lambda loss: loss.__name__)
def test_value_and_gradient_are_those_of_exact_arithmetic(loss, compiled):
    x, exact = CASES[loss]
    torch._dynamo.reset()
    with nanguard.stabilize() as swaps:
        found = value_and_gradient(torch.compile(loss, backend="aot_eager") if compiled else loss, x)
    assert swaps
    for one, other in zip(found, value_and_gradient(exact, x.double()), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-6)


def dice(x):
    p, y = torch.sigmoid(x), (x > 0).to(x.dtype)
    return 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)


def jaccard(x):
    p, y = torch.sigmoid(x), (x > 0).to(x.dtype)
    common = (p * y).sum()
    return 1 - common / (p.sum() + y.sum() - common + 1e-3)


def soft_f1(x):
    p, y = torch.sigmoid(x), (x > 0).to(x.dtype)
    precision = (p * y).sum(0) / (p.sum(0) + 1e-3)
    recall = (p * y).sum(0) / ((p * y).sum(0) + ((1 - p) * y).sum(0) + 1e-3)
    return 1 - 2 * precision * recall / (precision + recall + 1e-3)


def aligned_to_marginal(x):
    p = torch.softmax(x, 1).detach()
    p = p * (0.25 / (p.mean(0) + 1e-3))
    return p / p.sum(1, keepdim=True) * x


def smooth_shares(x):
    p = torch.softmax(x, 1)
    return (p[:, :2].sum() + 1) / (p.sum() + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("x", [EXTREME, EXTREME / 50], ids=["saturated", "moderate"])
@pytest.mark.parametrize(
    "loss", [dice, jaccard, smooth_shares, soft_f1, aligned_to_marginal], ids=lambda loss: loss.__name__
)
def test_parts_of_a_total_with_a_floor_stay_as_they_are(loss, x, dtype):
    plain = value_and_gradient(loss, x.to(dtype))
    with nanguard.stabilize() as swaps:
        found = value_and_gradient(loss, x.to(dtype))
    assert not swaps
    assert all(torch.equal(one, other) for one, other in zip(plain, found, strict=True))


@pytest.mark.parametrize("root", [torch.sqrt, lambda p: p**0.5, lambda p: p.pow(0.3), torch.rsqrt], ids=range(4))
def test_roots_of_moderate_numbers_keep_their_bits(root):
    def loss(x):
        return root(torch.sigmoid(x).detach() * torch.sigmoid(-x)) + root(torch.softmax(x, 1))

    x = EXTREME / 100
    plain = value_and_gradient(loss, x)
    with nanguard.stabilize() as swaps:
        found = value_and_gradient(loss, x)
    assert {swap.rule for swap in swaps} <= {"NG203", "NG204"}
    assert all(torch.equal(one, other) for one, other in zip(plain, found, strict=True))
