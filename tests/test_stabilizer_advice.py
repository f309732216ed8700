"""What is told and left as it is: where, how often, never on innocents; and what `saturated="repair"` makes of it."""

import copy
import dataclasses
import json
import math
import pickle
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Bernoulli, Categorical, Multinomial, OneHotCategorical

import nanguard
from nanguard.algebra import lookup, rules
from nanguard.incident import Advice
from nanguard.stabilizer.functional import plus_constant

ROWS = torch.arange(4)
Y = torch.tensor([1, 3, 0, 2])
pytestmark = pytest.mark.filterwarnings("ignore::nanguard.NumericalAdvice")


def logits(size=1.0, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return (torch.randn(4, 4) * size).to(dtype).requires_grad_()


def labels(x):
    return (Y % 2)[:, None].expand(4, 4).to(x.dtype)


def advice_on(code, x, **options):
    """The codes of the advice that some code gets, its backward pass included."""
    with nanguard.stabilize(**options) as swaps:
        result = code(x)
    if isinstance(result, torch.Tensor) and result.requires_grad:
        result.float().sum().backward()
    return [advice.rule for advice in swaps.advice]


# Code, how large its logits are, and what is told.
MISUSES = {
    "cross entropy": (lambda x: F.cross_entropy(torch.softmax(x, 1), Y), 1, "NG301"),
    "cross entropy, by module": (lambda x: nn.CrossEntropyLoss()(nn.Softmax(1)(x), Y), 1, "NG301"),
    "cross entropy, by hand": (lambda x: F.cross_entropy(x.exp() / x.exp().sum(1, keepdim=True), Y), 1, "NG301"),
    "cross entropy, one row": (lambda x: F.cross_entropy(torch.softmax(x[0], 0), Y[0]), 1, "NG301"),
    "cross entropy, images": (
        lambda x: F.cross_entropy(torch.softmax(x.view(1, 4, 2, 2), 1), Y.view(1, 2, 2)),
        1,
        "NG301",
    ),
    "cross entropy, moved": (lambda x: F.cross_entropy(torch.softmax(x, 1)[:, :3].float(), Y % 3), 1, "NG301"),
    "cross entropy, smoothed": (lambda x: F.cross_entropy(x.softmax(1), Y, label_smoothing=0.1), 1, "NG301"),
    "with logits": (lambda x: F.binary_cross_entropy_with_logits(x.sigmoid(), labels(x)), 1, "NG307"),
    "with logits, by module": (
        lambda x: nn.BCEWithLogitsLoss()(nn.Sigmoid()(x).flatten(), labels(x).flatten()),
        1,
        "NG307",
    ),
    "with logits, softmax": (
        lambda x: F.binary_cross_entropy_with_logits(x.softmax(1)[:, 1], labels(x)[:, 0]),
        1,
        "NG307",
    ),
    "log-softmax": (lambda x: F.log_softmax(F.softmax(x, 1), 1), 1, "NG308"),
    "log-softmax, by module": (lambda x: nn.LogSoftmax(1)(nn.Softmax(1)(x)), 1, "NG308"),
    "log-softmax, by method": (lambda x: (x.exp() / x.exp().sum(1, keepdim=True)).log_softmax(-1), 1, "NG308"),
    "nll": (lambda x: F.nll_loss(torch.softmax(x, 1), Y), 1, "NG302"),
    "nll, by module": (lambda x: nn.NLLLoss()(torch.softmax(x, 1) + 1e-6, Y), 1, "NG302"),
    "kl": (lambda x: F.kl_div(torch.softmax(x, 1), torch.softmax(x, 0).detach(), reduction="sum"), 1, "NG302"),
    "kl, sigmoid": (lambda x: nn.KLDivLoss(reduction="sum")(x.sigmoid(), labels(x)), 1, "NG302"),
    "kl, marginal": (lambda x: F.kl_div(x.softmax(1).mean(0), torch.full((4,), 0.25), reduction="sum"), 1, "NG302"),
    "categorical": (lambda x: Categorical(probs=torch.softmax(x, 1)).log_prob(Y), 60, "NG303"),
    "categorical, entropy": (lambda x: Categorical(torch.softmax(x, 1)).entropy(), 60, "NG303"),
    "one-hot": (lambda x: OneHotCategorical(torch.softmax(x, 1)).log_prob(torch.eye(4)), 60, "NG303"),
    "multinomial": (lambda x: Multinomial(4, torch.softmax(x, 1)).log_prob(torch.ones(4, 4)), 60, "NG303"),
    "bernoulli": (lambda x: Bernoulli(probs=torch.sigmoid(x)).log_prob(labels(x)), 60, "NG303"),
    "bce": (lambda x: F.binary_cross_entropy(torch.sigmoid(x), labels(x)), 60, "NG304"),
    "bce, by module": (lambda x: nn.BCELoss()(nn.Sigmoid()(x), labels(x)), 60, "NG304"),
    "epsilon in half": (lambda x: torch.log(torch.softmax(x.half(), 1) + 1e-8), 0.1, "NG305"),
    "epsilon in half, clamped": (lambda x: torch.log(x.half().softmax(1).clamp(min=1e-8)), 0.1, "NG305"),
    "epsilon from above": (lambda x: torch.log(1 - torch.sigmoid(x).clamp(1e-7, 1 - 1e-8)), 0.1, "NG305"),
    "epsilon from above, log1p": (lambda x: torch.log1p(-x.sigmoid().clamp(max=1 - 1e-8)), 0.1, "NG305"),
    "epsilon beside 1": (lambda x: torch.log(1 + 1e-8 - torch.sigmoid(x)), 0.1, "NG305"),
    "epsilon beside 1, bfloat16": (lambda x: torch.log(1 - x.bfloat16().sigmoid().clamp(max=0.9999)), 0.1, "NG305"),
    "saturated": (lambda x: torch.log(torch.softmax(x, 1)[ROWS, Y] + 1e-8), 60, "NG306"),
    "saturated, clamped": (lambda x: torch.softmax(x, 1).clamp(min=1e-8).gather(1, Y[:, None]).log2(), 60, "NG306"),
    "saturated, one-hot": (lambda x: (F.one_hot(Y, 4) * torch.log(torch.softmax(x, 1) + 1e-8)).sum(), 60, "NG306"),
    "saturated, sum": (lambda x: torch.log((x - 200).exp().sum(1) + 1e-8), 10, "NG306"),
}
INNOCENTS = {
    "cross entropy of logits": lambda x: F.cross_entropy(x, Y),
    "cross entropy of log-probabilities": lambda x: F.cross_entropy(F.log_softmax(x, 1), Y),
    "cross entropy of a mixture": lambda x: F.cross_entropy(torch.log(0.9 * x.softmax(1) + 0.025), Y),
    "cross entropy of attention": lambda x: F.cross_entropy(torch.softmax(x @ x.T, 1) @ x, Y),
    "cross entropy over another dim": lambda x: F.cross_entropy(torch.softmax(x, 0), Y),
    "soft targets": lambda x: F.cross_entropy(x, torch.softmax(x.detach(), 1)),
    "smoothed targets": lambda x: F.cross_entropy(x, F.one_hot(Y, 4) * 0.9 + 0.025),
    "with logits of a softmax layer": lambda x: F.binary_cross_entropy_with_logits(x.softmax(1) @ x, labels(x)),
    "with logits of scaled probabilities": lambda x: F.binary_cross_entropy_with_logits(8 * x.sigmoid() - 4, labels(x)),
    "soft labels with logits": lambda x: F.binary_cross_entropy_with_logits(x, x.detach().sigmoid()),
    "log-softmax over another dim": lambda x: F.log_softmax(F.softmax(x, 1), 0),
    "log-softmax with a temperature": lambda x: F.log_softmax(F.softmax(x, 1) / 0.1, 1),
    "log-softmax of attention": lambda x: torch.log_softmax(F.softmax(x, 1) @ x, 1),
    "nll": lambda x: F.nll_loss(F.log_softmax(x, 1), Y),
    "nll of a log": lambda x: F.nll_loss(torch.log(torch.softmax(x, 1)), Y),
    "nll of a log in place": lambda x: F.nll_loss(torch.softmax(x, 1).clone().log_(), Y),
    "kl": lambda x: F.kl_div(F.log_softmax(x, 1), torch.softmax(x, 0).detach(), reduction="sum"),
    "kl of a log": lambda x: F.kl_div(x.softmax(1).log(), torch.softmax(x, 0).detach(), reduction="sum"),
    "kl of zeros": lambda x: F.kl_div(torch.zeros(4, 4), torch.softmax(x, 1), reduction="sum"),
    "bce with logits": lambda x: F.binary_cross_entropy_with_logits(x, labels(x)),
    "bce that is right": lambda x: F.binary_cross_entropy(torch.sigmoid(x), (x > 0).float()),
    "bce that is bounded": lambda x: F.binary_cross_entropy(torch.sigmoid(x).clamp(1e-6, 1 - 1e-6), labels(x)),
    "distributions of logits": lambda x: Categorical(logits=x).entropy() + Bernoulli(logits=x[0]).entropy(),
    "probabilities of nobody": lambda x: Categorical(probs=(x * 0 + 1e-9).abs() + torch.eye(4)).log_prob(Y),
    "a masked logit": lambda x: Categorical(probs=torch.softmax(masked(x / 60), 1)).entropy(),
    "confidence": lambda x: -(torch.softmax(x, 1) * torch.log(torch.softmax(x, 1) + 1e-8)).sum(),
    "no gradient": lambda x: torch.log(torch.softmax(x.detach(), 1)[ROWS, Y] + 1e-8),
    "an epsilon that exists": lambda x: torch.log(torch.softmax((x / 60).half(), 1) + 1e-6),
    "an upper bound that nobody needs": lambda x: torch.log(torch.softmax(x / 60, 1).clamp(1e-12, 1 - 1e-12)),
    "an epsilon on an impossible class": lambda x: torch.log(torch.softmax(masked(x / 60), 1)[:, 0] + 1e-8),
    "an epsilon on no probability": lambda x: torch.log((x.half().abs() + 1) + 1e-8),
}


def masked(x):
    return x.masked_fill(torch.eye(4, dtype=torch.bool), -math.inf)


class TestWhatIsTold:
    @pytest.mark.parametrize("epsilon", ["keep", "drop"])
    @pytest.mark.parametrize("name", MISUSES)
    def test_misuses(self, name, epsilon):
        code, size, rule = MISUSES[name]
        expected = [] if (rule, epsilon) == ("NG306", "drop") else [rule]
        assert advice_on(code, logits(size), epsilon=epsilon) == expected

    @pytest.mark.parametrize(
        "name", [name for name, (*_, rule) in MISUSES.items() if rule in ("NG303", "NG304", "NG306")]
    )
    def test_nothing_where_the_bound_changes_nothing(self, name):
        code, _, _ = MISUSES[name]
        if name == "saturated, sum":
            pytest.skip("always saturated")
        assert advice_on(code, logits(1.0)) == []

    @pytest.mark.parametrize("name", INNOCENTS)
    @pytest.mark.parametrize("options", [{}, {"epsilon": "drop"}, {"saturated": "repair"}], ids=str)
    def test_innocents(self, name, options):
        assert advice_on(INNOCENTS[name], logits(60), **options) == []

    @pytest.mark.parametrize(
        "known", [known for known in rules() if known.kind == "advice"], ids=lambda known: known.code
    )
    def test_the_documented_example(self, known):
        blocks = dict(re.findall(r"## (Example|Use instead)\n\n```python\n(.*?)```", known.documentation, re.DOTALL))
        for heading, expected in (("Example", known.code), ("Use instead", None)):
            space = {"torch": torch, "F": F, "target": Y, "logits": logits(100)}

            def run(x, code=blocks[heading], space=space):
                exec(compile(code, "<example>", "exec"), space)
                return space["result"]

            assert next(iter(advice_on(run, space["logits"])), None) == expected

    def test_other_threads_and_transforms_are_not_looked_into(self):
        def loss(x):
            return F.binary_cross_entropy(torch.sigmoid(x), labels(x))

        assert advice_on(torch.func.grad(loss), logits(60).detach()) == []
        assert advice_on(lambda x: torch.vmap(lambda row: F.nll_loss(row.softmax(0), Y[0]))(x), logits()) == ["NG302"]


class TestWhere:
    def test_once_per_line_with_a_count_and_the_users_own_line(self):
        x = logits()
        loss = nn.CrossEntropyLoss()
        with nanguard.stabilize() as swaps:
            p = torch.softmax(x, 1)
            for _ in range(3):
                loss(p, Y)
        (advice,) = swaps.advice
        line = TestWhere.test_once_per_line_with_a_count_and_the_users_own_line.__code__.co_firstlineno + 6
        assert (advice.rule, advice.file, advice.line, advice.count) == ("NG301", __file__, line, 3)
        assert advice.original == "loss(p, Y)"
        assert advice.advice.endswith("Write F.cross_entropy(x, target).")
        assert str(advice) == f"{__file__}:{line}: NG301 loss(p, Y): {advice.advice} (3 times)"

    def test_the_line_of_the_epsilon(self):
        x = logits()
        with nanguard.stabilize() as swaps:
            p = torch.softmax(x.half(), 1) + 1e-8
            q = torch.sigmoid(x).clamp(max=1 - 1e-9)
            torch.log(p)
            torch.log(1 - q)
        first, second = swaps.advice
        assert first.original == "torch.softmax(x.half(), 1) + 1e-8"
        assert first.advice.startswith("1e-08 is 0 in float16")
        assert second.original == "torch.sigmoid(x).clamp(max=1 - 1e-9)"
        assert second.advice == (
            "0.999999999 is 1 in float32, so it guards nothing. Take the logarithm in its stable form, F.logsigmoid(-x)."
        )

    def test_a_line_that_the_backward_pass_establishes(self):
        x = logits(60)
        with nanguard.stabilize() as swaps:
            loss = -torch.log(torch.softmax(x, 1)[ROWS, Y] + 1e-8).mean()
        assert swaps.advice == []
        loss.backward()
        (advice,) = swaps.advice
        assert advice.original in ("torch.log(torch.softmax(x, 1)[ROWS, Y] + 1e-8)",)
        assert "epsilon 1e-08" in advice.advice

    def test_what_is_recomputed_is_not_counted_again(self):
        x = logits()
        with nanguard.stabilize() as swaps:
            loss = torch.utils.checkpoint.checkpoint(
                lambda x: F.nll_loss(torch.softmax(x, 1), Y), x, use_reentrant=False
            )
            loss.backward()
        assert [advice.count for advice in swaps.advice] == [1]

    def test_json(self):
        fields = {"rule": "NG301", "file": "a.py", "line": 3, "original": "f(p)", "advice": "Write g(x).", "count": 1}
        advice = Advice(**fields)
        assert json.loads(json.dumps(dataclasses.asdict(advice))) == fields
        assert advice == dataclasses.replace(advice, count=7)


class TestLists:
    def test_the_list_is_a_list(self):
        with nanguard.stabilize() as swaps:
            assert swaps == []
            F.nll_loss(torch.softmax(logits(), 1), Y)
        assert swaps == []
        assert isinstance(swaps, list)
        for other in (pickle.loads(pickle.dumps(swaps)), copy.deepcopy(swaps)):
            assert other.advice == swaps.advice
            assert len(other.advice) == 1

    def test_lists_of_ones_own(self):
        swaps, advice = [], []
        stabilize = nanguard.stabilize(swaps=swaps, advice=advice)
        for _ in range(2):
            with stabilize as given:
                F.nll_loss(torch.log(torch.softmax(logits(), 1)), Y)
                F.nll_loss(torch.softmax(logits(), 1), Y)
            assert given is swaps
        assert [swap.count for swap in swaps] == [2]
        assert [entry.count for entry in advice] == [2]

    def test_a_plain_list_is_enough(self):
        swaps = []
        with pytest.warns(nanguard.NumericalAdvice, match="NG302"), nanguard.stabilize(swaps=swaps):
            F.nll_loss(torch.softmax(logits(), 1), Y)
        assert swaps == []

    def test_settings_survive_pickling(self):
        stabilize = pickle.loads(pickle.dumps(nanguard.stabilize("drop", saturated="repair", advice=[])))
        with stabilize as swaps:
            F.binary_cross_entropy(torch.sigmoid(logits()), labels(logits()))
        assert [swap.rule for swap in swaps] == ["NG304"]

    def test_refused(self):
        with pytest.raises(ValueError, match="saturated is 'raise'; expected 'report' or 'repair'"):
            nanguard.stabilize(saturated="raise")


class TestTelling:
    def told(self, action, times=2):
        with warnings.catch_warnings(record=True) as record:
            warnings.resetwarnings()
            warnings.simplefilter(action, nanguard.NumericalAdvice)
            globals().pop("__warningregistry__", None)
            for _ in range(times):
                with nanguard.stabilize():
                    for _ in range(3):
                        F.nll_loss(torch.softmax(logits(), 1), Y)
        return record

    def test_once_for_each_place(self):
        (warning,) = self.told("default")
        assert warning.category is nanguard.NumericalAdvice
        assert issubclass(warning.category, UserWarning)
        assert warning.filename == __file__
        assert "F.nll_loss(torch.softmax(logits(), 1), Y)" in str(warning.message)
        assert len(self.told("always")) == 2

    def test_an_error_is_raised_when_the_block_has_ended(self):
        done = []

        @nanguard.stabilize(swaps=done)
        def work():
            F.nll_loss(torch.softmax(logits(), 1), Y)
            done.append(True)

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(nanguard.NumericalAdvice, match="NG302"):
                work()
            assert torch._C._len_torch_function_stack() == 0
            work()  # told before
        assert done == [True, True]

    def test_it_hides_no_other_error(self):
        @nanguard.stabilize()
        def work():
            F.nll_loss(torch.softmax(logits(), 1), Y)
            1 / 0

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(ZeroDivisionError):
                work()

    def test_a_backward_pass_is_not_interrupted(self):
        x = logits(60)
        with nanguard.stabilize() as swaps:
            loss = -torch.log(torch.softmax(x, 1)[ROWS, Y] + 1e-8).mean()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loss.backward()
        assert x.grad is not None
        assert [advice.rule for advice in swaps.advice] == ["NG306"]


class TestReporting:
    """Advice changes nothing."""

    @pytest.mark.parametrize(
        "name", [name for name, (*_, rule) in MISUSES.items() if rule in ("NG301", "NG302", "NG304")]
    )
    @pytest.mark.parametrize("size", [1, 60])
    def test_bits(self, name, size):
        code, x = MISUSES[name][0], logits(size)
        if name in ("cross entropy, by hand", "kl, marginal"):
            pytest.skip("swapped on the way")
        expected = code(x)
        with nanguard.stabilize() as swaps:
            value = code(x)
        assert swaps == []
        assert torch.equal(value, expected)
        pair = [torch.autograd.grad(result.sum(), x)[0] for result in (value, expected)]
        assert torch.equal(*pair)

    def test_derivatives_at_the_epsilon(self):
        """Watching the backward pass changes no derivative, of any order."""
        x = logits(60)
        with nanguard.stabilize():
            value = torch.log(torch.softmax(x, 1)[ROWS, Y] + 1e-8).mean()
        expected = plus_constant(F.log_softmax(x, 1)[ROWS, Y], 1e-8).mean()
        first, other = (torch.autograd.grad(result, x, create_graph=True)[0] for result in (value, expected))
        torch.testing.assert_close(first, other)
        second, other = (torch.autograd.grad((result**2).sum(), x)[0] for result in (first, other))
        torch.testing.assert_close(second, other)

    def test_errors_are_those_of_torch(self):
        for options in ({}, {"saturated": "repair"}):
            with nanguard.stabilize(**options):
                with pytest.raises(ValueError, match="target size"):
                    F.binary_cross_entropy(torch.sigmoid(logits()), torch.ones(3))
                with pytest.raises(ValueError, match="not a valid value for reduction"):
                    F.binary_cross_entropy(torch.sigmoid(logits()), torch.ones(4, 4), reduction="median")
                with pytest.raises(RuntimeError, match="broadcast"):
                    F.binary_cross_entropy(torch.sigmoid(logits()), torch.ones(4, 4), torch.ones(3))


def test_every_rule_of_this_kind_has_something_to_say():
    found = [known for known in rules() if known.kind == "advice"]
    assert [known.code for known in found] == [f"NG30{number}" for number in range(1, 9)]
    assert all(known.advice for known in found)
    assert not any(known.advice for known in rules() if known.kind != "advice")
    assert lookup("ng301").name == "softmax-into-cross-entropy"
