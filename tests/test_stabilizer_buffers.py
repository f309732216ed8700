"""Memory that is filled piece by piece: known once every element has been assigned, and not before."""

import pytest
import torch
import torch.nn.functional as F
from derivatives import value_and_gradient

import nanguard

X = torch.tensor([[1.0, 500, -300], [0, -200, 40]])
ROWS = torch.arange(2)
SOME = torch.tensor([True, False])


def by_rows(x):
    p = torch.empty(2, 3, dtype=x.dtype)
    for row in range(2):
        p[row] = x[row].softmax(0)
    return p.log()


def by_elements(x):
    p = torch.empty_like(x)
    for row in range(2):
        for column in range(3):
            p[row, column] = x[row].softmax(0)[column]
    return p.log()


def from_behind(x):
    p = x.new_empty(2, 3)
    p[-1], p[-2] = x[1].softmax(0), x[0].softmax(0)
    return p.log()


def by_columns(x):
    p, q = torch.empty_like(x), x.softmax(1)
    p[..., 0], p[:, 1:] = q[:, 0], q[:, 1:]
    return p.log()


def interleaved(x):
    p, q = torch.empty(2, 4, dtype=x.dtype), torch.softmax(x, 1)
    p[:, ::2], p[:, 1::2] = q[:, :2], q[:, 1:]
    return p[:, :3].log()


def overwritten(x):
    p = torch.empty_like(x)
    p[:] = torch.sigmoid(x)
    p[0] = x[0].softmax(0)
    p[1, :] = x[1].softmax(0)
    return p.log()


def one_first(x):
    survival = torch.empty(4, dtype=x.dtype)
    survival[0] = 1.0
    survival[1:] = torch.cumprod(1 - torch.sigmoid(x[0]), 0)
    return survival.log()


def one_first_among_zeros(x):
    survival = torch.zeros(4, dtype=x.dtype)
    survival[0] = 1
    survival[1:] = torch.cumprod(1 - torch.sigmoid(x[0]), 0)
    return survival.log()


def by_masks(x):
    p = torch.zeros_like(x)
    p[SOME], p[~SOME] = x[SOME].softmax(1), x[~SOME].softmax(1)
    return p.log()


def among_ones(x):
    p = torch.ones_like(x)
    p[torch.arange(2), torch.tensor([0, 2])] = x.softmax(1)[:, 1]
    return p.log()


def lsm(x):
    return F.log_softmax(x, 1)


def survival(x):
    return torch.cat([torch.zeros_like(x[0, :1]), F.logsigmoid(-x[0]).cumsum(0)])


def placed(x):
    return torch.zeros_like(x).index_put((ROWS, torch.tensor([0, 2])), lsm(x)[:, 1])


FILLED = {
    by_rows: lsm,
    by_elements: lsm,
    from_behind: lsm,
    by_columns: lsm,
    interleaved: lambda x: lsm(x)[:, [0, 1, 1]],
    overwritten: lsm,
    one_first: survival,
    one_first_among_zeros: survival,
    by_masks: lsm,
    among_ones: placed,
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("loss", FILLED, ids=lambda loss: loss.__name__)
def test_what_is_filled_is_known(loss, compiled):
    if compiled and loss is by_masks:
        pytest.skip("a mask breaks the graph")
    torch._dynamo.reset()
    with nanguard.stabilize() as swaps:
        found = value_and_gradient(torch.compile(loss, backend="aot_eager") if compiled else loss, X)
    assert swaps
    for one, other in zip(found, value_and_gradient(FILLED[loss], X.double()), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-6)


def half_filled(x, p):
    p[0] = x[0].softmax(0)
    return p


def filled_but_for_one(x, p):
    p[0], p[1, :2] = x[0].softmax(0), x[1, :2].sigmoid()
    return p


def edited_through_a_view(x, p):
    p[0] = x[0].softmax(0)
    row = p[1]
    row.copy_(x[1].sigmoid())
    return p


def edited_behind(x, p):
    p[0], p[1] = x[0].softmax(0), x[1].softmax(0)
    p.data.add_(0.5)
    return p


def added_to(x, p):
    p[0], p[1] = x[0].softmax(0), x[1].softmax(0)
    p += x.abs()
    return p


def of_either_sign(x, p):
    p[0], p[1] = x[0].softmax(0), x[1]
    return p


def named_twice(x, p):
    p[:] = 1.0
    p[torch.tensor([0, 0])] = x.softmax(1)
    return p


def numbers_only(x, p):
    p[0], p[1] = 0.5, 1.0
    return p * x


def below_zero(x, p):
    p[0], p[1] = x[0].softmax(0), -1.0
    return p


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    "fill",
    [
        *(half_filled, filled_but_for_one, edited_through_a_view, edited_behind, added_to),
        *(of_either_sign, named_twice, numbers_only, below_zero),
    ],
    ids=lambda fill: fill.__name__,
)
def test_what_is_not_keeps_every_bit(fill, compiled):
    def loss(x):
        return torch.log(fill(x, torch.empty_like(x).fill_(0.25)) if memory == "filled" else fill(x, x.new_empty(2, 3)))

    def run(found):
        torch._dynamo.reset()
        return value_and_gradient(torch.compile(found, backend="aot_eager") if compiled else found, X / 100)

    memory = "filled"
    plain = run(loss)
    with nanguard.stabilize() as swaps:
        guarded = run(loss)
    assert not [swap for swap in swaps if swap.rule.startswith("NG1")]
    for one, other in zip(plain, guarded, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    memory = "empty"
    with nanguard.stabilize() as swaps:
        run(loss)
    assert not [swap for swap in swaps if swap.rule.startswith("NG1")]


def test_a_hook_on_what_was_filled_so_far():
    def run():
        x, seen = X.clone().requires_grad_(), []
        p = torch.empty(2, 3)
        p[0] = x[0].softmax(0)
        p.register_hook(seen.append)
        p[1] = x[1].softmax(0)
        torch.autograd.grad(p.log().sum(), x)
        return seen

    plain = run()
    with nanguard.stabilize() as swaps:
        assert len(run()) == len(plain) == 1
    assert swaps == []


def test_pieces_without_gradients_stay_without():
    x = X.clone().requires_grad_()
    with nanguard.stabilize() as swaps:
        p = torch.empty(2, 3)
        with torch.no_grad():
            p[0] = x[0].softmax(0)
        p[1] = x[1].softmax(0)
        (gradient,) = torch.autograd.grad(p.log().sum(), x)
    assert swaps
    assert gradient[0].abs().sum() == 0
    torch.testing.assert_close(gradient[1], torch.tensor([1.0, 1, -2]))
