"""What `saturated="repair"` makes of the bounds that torch itself puts on probabilities: the form that takes logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_stabilizer_advice import ROWS, Y, labels, logits, masked
from torch import nn
from torch.distributions import Bernoulli, Categorical, Geometric, OneHotCategorical

import nanguard

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def assert_same(code, reference, x, rule, **tolerances):
    """Value and gradient of code that is repaired, and of another."""
    with nanguard.stabilize(saturated="repair") as swaps:
        value = code(x)
    assert [swap.rule for swap in swaps] == [rule] * len(swaps)
    assert swaps.advice == []
    assert swaps
    expected = reference(x)
    assert value.dtype == code(x).dtype
    torch.testing.assert_close(value, expected, check_dtype=False, **tolerances)
    pair = [torch.autograd.grad(result.float().sum(), x)[0] for result in (value, expected)]
    torch.testing.assert_close(*pair, **tolerances)
    return swaps


class TestRepairedCrossEntropy:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("size", [1, 60, 1000])
    @pytest.mark.parametrize("soft", [False, True])
    def test_equals_the_logits_form(self, dtype, size, soft):
        x = logits(size, dtype)
        y = torch.rand(4, 4).to(dtype) if soft else labels(x)
        swaps = assert_same(
            lambda x: F.binary_cross_entropy(torch.sigmoid(x), y),
            lambda x: F.binary_cross_entropy_with_logits(x.float(), y.float()).to(dtype),
            x,
            "NG304",
        )
        assert swaps[0].replacement == "F.binary_cross_entropy_with_logits(x, y)"

    @pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
    @pytest.mark.parametrize("shape", [None, (4, 1), (4,), (4, 4)], ids=str)
    def test_weights_and_reductions(self, reduction, shape):
        x = logits(60)
        options = {"weight": None if shape is None else torch.rand(shape), "reduction": reduction}
        assert_same(
            lambda x: F.binary_cross_entropy(x.sigmoid(), labels(x), **options),
            lambda x: F.binary_cross_entropy_with_logits(x, labels(x), **options),
            x,
            "NG304",
        )
        assert_same(
            lambda x: nn.BCELoss(**options)(nn.Sigmoid()(x), labels(x)),
            lambda x: nn.BCEWithLogitsLoss(**options)(x, labels(x)),
            x,
            "NG304",
        )

    @pytest.mark.filterwarnings("ignore:size_average")
    def test_the_reductions_of_old(self):
        assert_same(
            lambda x: F.binary_cross_entropy(x.sigmoid(), labels(x), size_average=False),
            lambda x: F.binary_cross_entropy_with_logits(x, labels(x), reduction="sum"),
            logits(60),
            "NG304",
        )

    def test_a_softmax(self):
        y = labels(logits())[:, 0]
        assert_same(
            lambda x: F.binary_cross_entropy(torch.softmax(x[:, :2], 1)[:, 1], y),
            lambda x: F.cross_entropy(x[:, :2], y.long()),
            logits(60),
            "NG304",
        )

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
    @pytest.mark.parametrize("shape", [None, (4, 1), (4, 4)], ids=str)
    def test_compiled(self, reduction, shape, dtype):
        options = {"weight": None if shape is None else torch.rand(shape).to(dtype), "reduction": reduction}
        torch._dynamo.reset()
        assert_same(
            torch.compile(
                lambda x: F.binary_cross_entropy(torch.sigmoid(x), labels(x), **options), backend="aot_eager"
            ),
            lambda x: F.binary_cross_entropy_with_logits(x, labels(x), **options),
            logits(60, dtype),
            "NG304",
            rtol=max(1e-5, 4 * torch.finfo(dtype).eps),
            atol=4 * torch.finfo(dtype).eps,
        )

    @pytest.mark.filterwarnings("ignore::nanguard.NumericalAdvice")
    def test_compiled_code_keeps_its_bounds_unless_they_are_to_be_dropped(self):
        x = logits(60)
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: nn.BCELoss()(torch.sigmoid(x), labels(x)), backend="aot_eager")
        with nanguard.stabilize() as swaps:
            value = compiled(x)
        assert swaps == []
        assert torch.equal(value, F.binary_cross_entropy(torch.sigmoid(x), labels(x)))

    @pytest.mark.parametrize("extreme", [math.inf, -math.inf])
    def test_infinite_logits_bring_no_nan(self, extreme):
        x = torch.tensor([extreme, 1.0, -2.0], requires_grad=True)
        for y in (torch.zeros(3), torch.ones(3), torch.full((3,), 0.5)):
            with nanguard.stabilize(saturated="repair"):
                value = F.binary_cross_entropy(torch.sigmoid(x), y, weight=torch.tensor([0.0, 1.0, 1.0]))
            gradient = torch.autograd.grad(value, x)[0]
            assert value.isfinite()
            assert not gradient.isnan().any()

    def test_a_derivative_at_the_probability(self):
        x = logits()
        with nanguard.stabilize(saturated="repair"):
            p = torch.sigmoid(x)
            loss = F.binary_cross_entropy(p, labels(x))
        expected = F.binary_cross_entropy(p, labels(x))
        torch.testing.assert_close(torch.autograd.grad(loss, p, retain_graph=True), torch.autograd.grad(expected, p))
        loss.backward()
        assert x.grad is not None

    def test_a_bound_of_the_user_stays(self):
        x = logits(60)
        with nanguard.stabilize(saturated="repair"):
            value = F.binary_cross_entropy(torch.sigmoid(x).clamp(1e-6, 1 - 1e-6), labels(x))
        expected = F.binary_cross_entropy(torch.sigmoid(x.double()).clamp(1e-6, 1 - 1e-6), labels(x).double())
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)

    def test_a_bound_of_the_user_is_dropped_where_that_is_asked_for(self):
        x = logits(60)
        with nanguard.stabilize("drop", saturated="repair"):
            value = F.binary_cross_entropy(torch.sigmoid(x).clamp(1e-6, 1 - 1e-6), labels(x))
        torch.testing.assert_close(value, F.binary_cross_entropy_with_logits(x, labels(x)))

    @pytest.mark.filterwarnings("ignore::nanguard.NumericalAdvice")
    def test_what_cannot_be_repaired_stays(self):
        x = logits(60)
        weight = torch.ones(4, 4, requires_grad=True)
        with nanguard.stabilize(saturated="repair") as swaps, pytest.raises(RuntimeError):
            F.binary_cross_entropy(torch.sigmoid(x), labels(x), weight=weight).backward()
        assert swaps == []

    def test_checkpointed(self):
        def loss(x):
            return F.binary_cross_entropy(torch.sigmoid(x * 1), labels(x))

        x = logits(60)
        with nanguard.stabilize(saturated="repair"):
            value = torch.utils.checkpoint.checkpoint(loss, x, use_reentrant=False)
        value.backward()
        expected = torch.autograd.grad(F.binary_cross_entropy_with_logits(x, labels(x)), x)[0]
        torch.testing.assert_close(x.grad, expected)


# A distribution given probabilities, given logits, and what is asked of it.
PAIRS = {
    "categorical": (lambda x: Categorical(probs=torch.softmax(x, 1)), lambda x: Categorical(logits=x), Y),
    "one-hot": (
        lambda x: OneHotCategorical(probs=torch.softmax(x, 1)),
        lambda x: OneHotCategorical(logits=x),
        F.one_hot(Y, 4).float(),
    ),
    "bernoulli": (lambda x: Bernoulli(probs=torch.sigmoid(x)), lambda x: Bernoulli(logits=x), labels(torch.ones(4, 4))),
}


class TestRepairedDistributions:
    @pytest.mark.parametrize("epsilon", ["keep", "drop"])
    @pytest.mark.parametrize("size", [1, 60, 1000])
    @pytest.mark.parametrize("name", PAIRS)
    def test_equals_the_logits_form(self, name, size, epsilon):
        given, reference, sample = PAIRS[name]
        for ask in (lambda one: one.log_prob(sample), lambda one: one.entropy()):
            x = logits(size)
            with nanguard.stabilize(epsilon, saturated="repair") as swaps:
                value = ask(given(x))
            expected = ask(reference(x))
            assert {swap.rule for swap in swaps} == {"NG303"}
            assert swaps[0].replacement == "logits=x"
            assert swaps.advice == []
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
            pair = [torch.autograd.grad(result.sum(), x)[0] for result in (value, expected)]
            torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision(self, dtype):
        x = logits(30, dtype)
        with nanguard.stabilize(saturated="repair"):
            value = Categorical(probs=torch.softmax(x, 1), validate_args=False).log_prob(Y)
        torch.testing.assert_close(value, F.log_softmax(x.float(), 1)[ROWS, Y].to(dtype))

    def test_the_guard_stays_where_a_logit_is_masked(self):
        """0 log 0 has to stay 0."""
        x = logits()
        with nanguard.stabilize(saturated="repair"):
            policy = Categorical(probs=torch.softmax(masked(x), 1))
            value = (policy.probs * policy.logits).sum()
        assert value.isfinite()
        assert not torch.autograd.grad(value, x)[0].isnan().any()

    def test_bounds_of_the_user_stay(self):
        """Only what torch.distributions itself adds is left out: the same numbers, written by the user, are the user's."""
        x = logits(60)
        epsilon = torch.finfo(torch.float32).eps
        with nanguard.stabilize(saturated="repair") as swaps:
            value = torch.log(torch.softmax(x, 1).clamp(min=epsilon, max=1 - epsilon))
        assert value.min().item() == pytest.approx(math.log(epsilon))
        assert {swap.rule for swap in swaps} == {"NG101"}

    def test_a_geometric_has_no_such_bound(self):
        with nanguard.stabilize(saturated="repair") as swaps:
            Geometric(probs=torch.sigmoid(logits())).log_prob(torch.ones(4, 4))
        assert "NG303" not in {swap.rule for swap in swaps}

    @pytest.mark.filterwarnings("ignore::nanguard.NumericalAdvice")
    def test_dropping_epsilons_leaves_the_bounds_of_libraries(self):
        x = logits(60)
        with nanguard.stabilize("drop"):
            value = Categorical(probs=torch.softmax(x, 1)).logits
        torch.testing.assert_close(value.detach().min().item(), math.log(torch.finfo(torch.float32).eps))
