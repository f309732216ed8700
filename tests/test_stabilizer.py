"""What `stabilize` computes: the textbook batch in every spelling, and every law and rule against float64."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nanguard
from nanguard.algebra import laws, rules
from nanguard.stabilizer.resolve import function

BATCH = torch.tensor([[2, 1, 0.1], [1000, 1, -1000], [3, 2, 1]])
TARGET = torch.tensor([0, 2, 1])
ROWS = torch.arange(3)


def by_hand(x, d=1):
    e = torch.exp(x)
    return e / e.sum(d, keepdim=True)


def shifted(x):
    e = torch.exp(x - x.max(dim=1, keepdim=True).values)
    return e / e.sum(dim=1, keepdim=True)


def shifted_detached(x):
    e = (x - x.detach().amax(1, keepdim=True)).exp()
    return e / torch.sum(e, axis=1, keepdims=True)


def unsqueezed(x):
    e = x.exp()
    return torch.div(e, e.sum(1).unsqueeze(1))


def none_indexed(x):
    e = x.exp()
    return e / e.sum(-1)[:, None]


def times_reciprocal(x):
    e = x.exp()
    return e * (1 / e.sum(1, keepdim=True))


def times_power(x):
    e = x.exp()
    return e * e.sum(1).view(-1, 1) ** -1


def in_columns(x):
    e = torch.exp(x.t())
    return (e / e.sum(0)).T


def divided_in_place(x):
    e = torch.exp(x.detach().requires_grad_() if x.grad_fn else x)
    p = e * 1.0
    p /= e.sum(1, keepdim=True)
    return p


SOFTMAXES = [
    by_hand,
    shifted,
    shifted_detached,
    unsqueezed,
    none_indexed,
    times_reciprocal,
    times_power,
    in_columns,
    divided_in_place,
    lambda x: torch.softmax(x, 1),
    lambda x: torch.softmax(input=x, dim=-1),
    lambda x: x.softmax(1),
    lambda x: F.softmax(x, dim=1),
    lambda x: torch.special.softmax(x, 1),
    nn.Softmax(dim=1),
    lambda x: nn.Softmax(dim=0)(x.T).T,
]

PICKS = [
    lambda p, y: p[ROWS, y],
    lambda p, y: p[range(3), y],
    lambda p, y: p[[0, 1, 2], y],
    lambda p, y: p.gather(1, y[:, None]),
    lambda p, y: torch.gather(p, 1, y.view(-1, 1)).squeeze(1),
    lambda p, y: torch.take_along_dim(p, y.unsqueeze(1), dim=1),
    lambda p, y: p[F.one_hot(y, 3).bool()],
    lambda p, y: torch.masked_select(p, F.one_hot(y, 3).bool()),
    lambda p, y: p.index_select(1, y).diagonal(),
    lambda p, y: p.reshape(-1)[ROWS * 3 + y],
    lambda p, y: p.t()[y, ROWS],
    lambda p, y: p.clone().double().float()[ROWS, y],
]

LOGS = [
    torch.log,
    torch.Tensor.log,
    lambda q: torch.log2(q) * math.log(2),
    lambda q: q.log10() * math.log(10),
    lambda q: torch.log(input=q),
    lambda q: (q * 1.0).log_(),
]


def guarded(loss):
    """Value, gradient and swaps under `stabilize`."""
    x = BATCH.clone().requires_grad_()
    with nanguard.stabilize() as swaps:
        value = loss(x)
    (gradient,) = torch.autograd.grad(value, x)
    return value.detach(), gradient, swaps


def expect_cross_entropy(loss):
    x = BATCH.clone().requires_grad_()
    reference = F.cross_entropy(x, TARGET)
    (expected,) = torch.autograd.grad(reference, x)
    value, gradient, swaps = guarded(loss)
    torch.testing.assert_close(value, reference.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    assert value.item() == pytest.approx(667.2748, rel=1e-6)
    return swaps


class TestTextbook:
    def loss(self, x):
        return -torch.log(by_hand(x)[ROWS, TARGET]).mean()

    def test_unguarded_it_fails(self):
        x = BATCH.clone().requires_grad_()
        loss = self.loss(x)
        loss.backward()
        assert not loss.isfinite()
        assert x.grad[1].isnan().all()

    def test_guarded_it_is_the_cross_entropy(self):
        assert [swap.rule for swap in expect_cross_entropy(self.loss)] == ["NG201", "NG102"]

    def test_to_the_last_bit(self):
        value, gradient, _ = guarded(self.loss)
        x = BATCH.clone().requires_grad_()
        reference = F.cross_entropy(x, TARGET)
        assert torch.equal(value, reference.detach())
        assert torch.equal(gradient, torch.autograd.grad(reference, x)[0])

    def test_a_gap_of_two_thousand(self):
        with nanguard.stabilize():
            p = torch.softmax(torch.tensor([1000.0, 1, -1000]), 0)
            assert -torch.log(p[2]).item() == 2000

    @pytest.mark.parametrize("softmax", SOFTMAXES)
    @pytest.mark.parametrize("log", LOGS[:2])
    def test_every_softmax(self, softmax, log):
        expect_cross_entropy(lambda x: -log(softmax(x)[ROWS, TARGET]).mean())

    @pytest.mark.parametrize("pick", PICKS)
    @pytest.mark.parametrize("softmax", [by_hand, nn.Softmax(1)])
    def test_every_pick(self, pick, softmax):
        swaps = expect_cross_entropy(lambda x: -torch.log(pick(softmax(x), TARGET)).mean())
        assert "NG102" in [swap.rule for swap in swaps] or pick is PICKS[8]

    @pytest.mark.parametrize("pick", PICKS[:-1])
    def test_log_first(self, pick):
        expect_cross_entropy(lambda x: -pick(torch.log(torch.softmax(x, 1)), TARGET).mean())

    @pytest.mark.parametrize("log", LOGS)
    def test_every_log(self, log):
        expect_cross_entropy(lambda x: -log(torch.softmax(x, 1)[ROWS, TARGET]).mean())

    def test_across_modules_and_functions(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.soft = nn.Softmax(dim=1)

            def forward(self, x):
                return self.soft(x)

        def criterion(p, y):
            return F.nll_loss(torch.log(p), y)

        swaps = expect_cross_entropy(lambda x: criterion(Net()(x), TARGET))
        assert [swap.rule for swap in swaps] == ["NG101"]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_dtypes(self, dtype):
        x = BATCH.clone().to(dtype).requires_grad_()
        with nanguard.stabilize() as swaps:
            loss = -torch.log(torch.softmax(x, 1)[ROWS, TARGET]).mean()
        loss.backward()
        assert swaps
        assert loss.dtype == x.grad.dtype == dtype
        reference = x.detach().double().requires_grad_()
        expected = F.cross_entropy(reference, TARGET)
        expected.backward()
        tolerance = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
        torch.testing.assert_close(x.grad.double(), reference.grad, rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast_keeps_its_dtypes(self, dtype):
        weight = torch.eye(3, requires_grad=True)

        def run():
            with torch.autocast("cpu", dtype=dtype):
                p = torch.softmax(BATCH.clamp(-40, 40) @ weight, 1)
                return p, torch.log(p)

        plain, naive = run()
        with nanguard.stabilize() as swaps:
            p, stable = run()
        assert swaps
        assert (p.dtype, stable.dtype) == (plain.dtype, naive.dtype)
        stable.sum().backward()
        assert weight.grad.isfinite().all()


# One value for each parameter of a law's signature; `P` is a known probability, `Q` another.
P, Q = object(), object()
INDEX = torch.tensor([[0, 2, 1], [1, 1, 0], [2, 0, 0]])
MASK = torch.eye(3, dtype=torch.bool)
ARGUMENTS = {
    "input": P,
    "other": Q,
    "tensors": (P, Q),
    "dim": 1,
    "exponent": 2.5,
    "min": 0.2,
    "max": 0.4,
    "shape": (9,),
    "sizes": (3, 1),
    "size": (9,),
    "dims": (1, 0),
    "dim0": 0,
    "dim1": 1,
    "key": (slice(None), 1),
    "index": INDEX,
    "indices": INDEX,
    "mask": MASK,
    "start": 1,
    "length": 2,
    "chunks": 2,
    "split_size": 2,
    "split_size_or_sections": 2,
    "indices_or_sections": 2,
    "target": torch.float64,
    "mat2": Q,
    "vec2": Q,
    "weight": Q,
    "equation": "ij,kj->ik",
    "operands": (P, Q),
    "src": Q,
    "condition": MASK,
    "value": 0.3,
    "source": 0,
    "destination": 1,
    "shifts": 1,
    "repeats": 2,
    "end": Q,
    "p": 1,
    "threshold": 0.3,
    "fill_value": 0.0,
    "training": False,
    "pad": (1, 1),
    "k": 2,
}
# What another law takes for the same name, or one of its spellings; `X` is a tensor that nothing is known about.
X = object()
SPECIAL = {
    ("expand", "size"): (2, 3, 3),
    ("broadcast_to", "size"): (2, 3, 3),
    ("squeeze", "dim"): None,
    ("index_select", "index"): torch.tensor([2, 0]),
    ("select", "index"): 1,
    ("hsplit", "indices"): (1, 2),
    ("vsplit", "indices"): (1, 2),
    ("new_zeros", "size"): (3, 3),
    ("new_ones", "size"): (3, 3),
    ("zeros", "size"): (3, 3),
    ("new_empty", "size"): (3, 3),
    ("empty", "size"): (3, 3),
    ("unfold", "dimension"): 1,
    ("unfold", "size"): 2,
    ("unfold", "step"): 1,
    ("matrix_power", "n"): 3,
    ("scatter_reduce", "reduce"): "sum",
    ("embedding", "input"): INDEX,
    ("embedding", "weight"): P,
    ("ones", "size"): (3, 3),
    ("__rpow__", "exponent"): X,
    ("__rpow__", "input"): 2.5,
    ("roll", "dims"): 1,
    ("tensordot", "dims"): ([1], [0]),
    ("lerp", "weight"): 0.3,
    ("__setitem__", "value"): 0,
    ("dropout", "p"): 0.5,
    ("index_add", "index"): torch.tensor([2, 0, 2]),
    ("index_add", "source"): Q,
    ("xlogy", "other"): X,
    ("xlog1py", "other"): X,
}
OPTIONAL = {"min", "max", "dims", "p", "training"}


def filled(buffer, p):
    buffer[0], buffer[1:] = p[0], p[1:]
    return buffer


# What shows that a number is known whose logarithm itself is no help.
SHOWN_BY = {
    "neg": lambda result, p: torch.log(1 + result),
    "sub": lambda result, p: torch.log(2 + result),
    "diff": lambda result, p: torch.log(2 + result),
    "set_item": lambda result, p: torch.log(result.sum(1)),
    "fill_diagonal": lambda result, p: torch.log(result.sum(1)),
    "where": lambda result, p: torch.log(result.sum(1)),
    "masked_fill": lambda result, p: torch.log(result.sum(1)),
    "tril": lambda result, p: torch.log(result.sum(1)),
    "triu": lambda result, p: torch.log(result.sum(0)),
    "diag_embed": lambda result, p: torch.log(result.sum(1)),
    "tanh": lambda result, p: torch.log(1 - result),
    "log_softmax": lambda result, p: torch.log(1 - result.exp()),
    "logsigmoid": lambda result, p: torch.log(1 - result.exp()),
    "softplus": lambda result, p: torch.log(result.exp() - 1),
    "erf": lambda result, p: torch.log(1 - result),
    "zeros": lambda result, p: torch.log(result + p),
    "ones": lambda result, p: torch.log(result - p),
    "empty": lambda result, p: torch.log(filled(result, p)),
    "prod": lambda result, p: torch.log(result),
}
POSITIVE = {"expm1", "sinh", "prod"}
SPELLINGS = [(law, spelling) for law in laws() for spelling in law.spellings]


def arguments(law, spelling, known):
    method = spelling.path.rpartition(".")[2]
    found = []
    for parameter in spelling.parameters:
        name = parameter.name
        required = parameter.default.__class__ is object or parameter.star
        if not required and not (name in OPTIONAL or (name == "dim" and "softm" in method)):
            break
        value = SPECIAL.get((method, name), SPECIAL.get((law.name, name), ARGUMENTS.get(name, Q)))
        if name in ("tensors", "operands"):
            value = [known[entry] for entry in value]
        value = next((tensor for key, tensor in known.items() if key is value), value)
        found += value if name == "operands" else [value]
    return found


def shaped(method, p, q):
    if method in ("bmm", "baddbmm"):
        return p[None], q[None]
    return (p, q[0]) if method == "mv" else (p[0], q[0]) if method in ("dot", "outer", "ger") else (p, q)


class TestEveryLaw:
    @pytest.mark.parametrize(("law", "spelling"), SPELLINGS, ids=[spelling.path for _, spelling in SPELLINGS])
    def test_fires_and_is_right(self, law, spelling):
        """Each spelling of each law, registered under a name that torch has, carries the logarithm on."""
        call = function(spelling.path)
        torch.manual_seed(0)
        x, z = torch.randn(2, 3, 3)
        if law.name in POSITIVE:
            x = x.abs()

        def run(x, z):
            p, q = torch.softmax(x, 1), torch.sigmoid(z)
            known = p
            if law.role == "source" and law.name != "pow":
                p = x * 1.0
            if law.name in ("log1p", "xlog1py"):  # of a probability it is stable
                p = x.exp()
            if law.name == "nan_to_num" and not spelling.in_place:  # it carries on what is known, and selects
                return call(torch.log(x))
            if law.name == "arcsine":  # its derivative is infinite at 1
                return torch.where(x.abs() < 0.5, call(x.clamp(-1, 1)), 0.0)
            first, second = shaped(spelling.path.rpartition(".")[2], p, q)
            first = first * 1.0 if spelling.in_place else first
            result = call(*arguments(law, spelling, {P: first, Q: second, X: x * 1.0}))
            result = first if result is None else result
            result = (
                result[0 if law.name in ("max", "min", "sort", "topk", "broadcast_tensors") else -1]
                if isinstance(result, tuple)
                else result
            )
            if law.role == "query":
                return result
            return SHOWN_BY[law.name](result, known) if law.name in SHOWN_BY else torch.log(result)

        x32, z32 = x.clone().requires_grad_(), z.clone().requires_grad_()
        with nanguard.stabilize() as swaps:
            value = run(x32, z32)
        assert swaps, "the law did not fire"
        x64, z64 = x.double().requires_grad_(), z.double().requires_grad_()
        expected = run(x64, z64)
        tolerance = max(1e-5, 4 * torch.finfo(expected.dtype).eps)
        torch.testing.assert_close(value.double(), expected.double(), rtol=tolerance, atol=tolerance)
        if law.name == "detach":
            assert not value.requires_grad
            return
        weights = torch.randn_like(expected)
        gradient = torch.autograd.grad((value * weights).sum(), x32)[0]
        reference = torch.autograd.grad((expected * weights).sum(), x64)[0]
        torch.testing.assert_close(gradient.double(), reference, rtol=9 * tolerance, atol=9 * tolerance)

    def test_an_unknown_name_would_be_noticed(self):
        with pytest.raises(AttributeError):
            function("torch.no_such_function")


def blocks(documentation):
    found = re.findall(r"## (Example|Use instead)\n\n```python\n(.*?)```", documentation, re.DOTALL)
    return dict(found)


class TestEveryRule:
    @pytest.mark.parametrize(
        "known", [known for known in rules() if known.kind != "advice"], ids=lambda known: known.code
    )
    @pytest.mark.parametrize("size", [1.0, 300.0], ids=["mild", "extreme"])
    def test_its_example_fires_and_becomes_what_it_says(self, known, size):
        example, instead = (blocks(known.documentation)[name] for name in ("Example", "Use instead"))
        torch.manual_seed(1)
        logits, other = (torch.randn(2, 4, 4) * size).double()

        def run(code, logits, other):
            space = {"torch": torch, "F": F, "math": math, "target": torch.tensor([1, 3, 0, 2])}
            space.update(logits=logits, other=other)
            exec(compile(code, "<example>", "exec"), space)
            return space["result"]

        small, reference = logits.float().requires_grad_(), logits.requires_grad_()
        with nanguard.stabilize() as swaps:
            value = run(example, small, other.float())
        assert [swap.rule for swap in swaps][-1] == known.code
        expected = run(instead, reference, other)
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
        gradient = torch.autograd.grad(value.sum(), small)[0]
        torch.testing.assert_close(
            gradient.double(), torch.autograd.grad(expected.sum(), reference)[0], rtol=1e-4, atol=1e-5
        )


class TestEpsilon:
    def test_keep_is_exact(self):
        x = torch.tensor([[0.0, 30.0, 5.0]], requires_grad=True)
        reference = x.detach().double().requires_grad_()
        with nanguard.stabilize():
            value = torch.log(torch.softmax(x, 1) + 1e-8)
        expected = torch.log(torch.softmax(reference, 1) + 1e-8)
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
        gradient = torch.autograd.grad(value[0, 0], x)[0]
        torch.testing.assert_close(
            gradient.double(), torch.autograd.grad(expected[0, 0], reference)[0], rtol=1e-5, atol=1e-9
        )

    @pytest.mark.parametrize("guard", [lambda p: p + 1e-8, lambda p: 1e-8 + p, lambda p: p.clamp(min=1e-8)])
    def test_drop_computes_log_p(self, guard):
        x = torch.tensor([[0.0, 30.0, 5.0]], requires_grad=True)
        with nanguard.stabilize(epsilon="drop"):
            value = torch.log(guard(torch.softmax(x, 1)))[0, 0]
        torch.testing.assert_close(value, F.log_softmax(x, 1)[0, 0])
        assert torch.autograd.grad(value, x)[0][0, 0] == pytest.approx(1.0)

    def test_drop_keeps_the_guard_of_a_true_zero(self):
        x = torch.tensor([[0.0, -math.inf, 5.0]], requires_grad=True)
        with nanguard.stabilize(epsilon="drop"):
            p = torch.softmax(x, 1)
            entropy = -(p * torch.log(p + 1e-8)).sum()
        (gradient,) = torch.autograd.grad(entropy, x)
        assert entropy.isfinite()
        assert gradient.isfinite().all()

    def test_literals_are_what_the_source_says(self):
        """In float16 1e-8 is 0."""
        x = torch.tensor([[0.0, 40.0]], dtype=torch.float16)
        with nanguard.stabilize():
            value = torch.log(torch.softmax(x, 1) + 1e-8)
        assert value[0, 0].item() == pytest.approx(math.log(1e-8), rel=1e-3)

    @pytest.mark.parametrize("epsilon", ["remove", None, 1e-8])
    def test_other_policies_are_refused(self, epsilon):
        with pytest.raises(ValueError, match=f"epsilon is {epsilon!r}; expected 'keep' or 'drop'"):
            nanguard.stabilize(epsilon=epsilon)
