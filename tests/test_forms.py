"""The zoo of forms: its references are exact, its inputs break what they should, and `stabilize` gets every form right."""

import sys
from pathlib import Path

import mpmath
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from forms import FORMS, INNOCENTS, TWINS, Innocent
from forms.defects import defects, fails
from forms.judge import Outcome, broken, judge, reference, weights
from forms.table import changed, judged, untouched

ALL = {**FORMS, **TWINS}


class TestZoo:
    def test_is_large(self):
        plain = {form.naive for form in FORMS.values()}
        assert len(plain) >= 250
        assert len(INNOCENTS) >= 110
        assert sum(not name.endswith("__keep") for name in TWINS) >= 50

    def test_every_twin_names_its_form(self):
        assert [twin.name for twin in TWINS.values() if twin.of not in FORMS] == []

    @pytest.mark.parametrize("name", ALL)
    def test_forms_are_what_they_say(self, name):
        assert defects(ALL[name]) == []

    def test_innocents_run(self):
        assert [note for innocent in INNOCENTS.values() for note in fails(innocent)] == []


PROBABILITIES = ["textbook", "unlikelihood", "log_odds", "batch_marginal", "bce_by_hand"]
ELEMENTARY = [
    *("logistic_bin", "sac_log_one_minus_tanh_squared", "log_of_one_minus_exp", "inverse_softplus", "log_cosh"),
    *("complementary_log_log", "tanh_by_hand", "log_of_a_difference", "noisy_or", "log_sinh"),
]


class TestReferences:
    @pytest.mark.parametrize("name", PROBABILITIES)
    def test_probabilities_with_a_thousand_digits(self, name):
        form = FORMS[name]
        inputs = form.inputs["extreme"]()
        expected = torch.tensor(WIDE[name](*(entry.tolist() for entry in inputs)), dtype=torch.float64)
        torch.testing.assert_close(
            reference(form, "extreme").value.flatten(), expected.flatten(), rtol=1e-9, atol=1e-12
        )

    @pytest.mark.parametrize("name", ELEMENTARY)
    def test_elementary_functions_with_a_thousand_digits(self, name):
        """Value and gradient: `weights` stands for what the result is contracted with."""
        form = FORMS[name]
        inputs = [entry.tolist() for entry in form.inputs["extreme"]()]
        exact = reference(form, "extreme")
        factors = weights(exact.value).flatten().tolist()
        with mpmath.workdps(1000):
            values = WIDE[name](*inputs)
            torch.testing.assert_close(exact.value.flatten(), to_tensor(values), rtol=1e-9, atol=1e-12)
            for which, gradient in enumerate(exact.gradients):
                found = [
                    mpmath.diff(lambda step, i=i, w=which: contracted(WIDE[name], inputs, factors, w, i, step), 0)
                    for i in range(len(inputs[which]))
                ]
                torch.testing.assert_close(gradient, to_tensor(found), rtol=1e-9, atol=1e-12)


def to_tensor(numbers):
    return torch.tensor([float(number) for number in numbers], dtype=torch.float64)


def contracted(function, inputs, factors, which, position, step):
    moved = [list(entry) for entry in inputs]
    moved[which][position] += step
    return sum(factor * value for factor, value in zip(factors, function(*moved), strict=True))


def wide(row):
    """A softmax with a thousand digits."""
    found = [mpmath.exp(number) for number in row]
    return [number / sum(found) for number in found]


def exactly(function):
    def of(*inputs):
        with mpmath.workdps(1000):
            return [float(number) for number in function(*inputs)]

    return of


def elementwise(function):
    return lambda *inputs: [function(*map(mpmath.mpf, numbers)) for numbers in zip(*inputs, strict=True)]


def logistic(x):
    return 1 / (1 + mpmath.exp(-x))


def binary_cross_entropy(x, y):
    return -mpmath.log(logistic(mpmath.mpf(x)) if y else 1 - logistic(mpmath.mpf(x)))


WIDE = {
    "textbook": exactly(lambda x, y: [-sum(mpmath.log(wide(row)[i]) for row, i in zip(x, y, strict=True)) / len(x)]),
    "unlikelihood": exactly(lambda x: [mpmath.log(1 - p) for row in x for p in wide(row)]),
    "log_odds": exactly(lambda x: [mpmath.log(p / (1 - p)) for row in x for p in wide(row)]),
    "batch_marginal": exactly(lambda x: [mpmath.log(sum(c) / len(c)) for c in zip(*map(wide, x), strict=True)]),
    "bce_by_hand": exactly(lambda x, y: [binary_cross_entropy(*pair) for pair in zip(x, y, strict=True)]),
    "logistic_bin": elementwise(lambda a, b: mpmath.log(logistic(a) - logistic(b))),
    "sac_log_one_minus_tanh_squared": elementwise(lambda x: mpmath.log(1 - mpmath.tanh(x) ** 2)),
    "log_of_one_minus_exp": elementwise(lambda x: mpmath.log(1 - mpmath.exp(x))),
    "inverse_softplus": elementwise(lambda x: mpmath.log(mpmath.exp(x) - 1)),
    "log_cosh": elementwise(lambda x: mpmath.log(mpmath.cosh(x))),
    "complementary_log_log": elementwise(lambda x: mpmath.log(1 - mpmath.exp(-mpmath.exp(x)))),
    "tanh_by_hand": elementwise(mpmath.tanh),
    "log_of_a_difference": elementwise(lambda a, b: mpmath.log(mpmath.exp(a) - mpmath.exp(b))),
    "noisy_or": lambda x: [mpmath.log(1 - mpmath.fprod(1 - logistic(number) for number in x))],
    "log_sinh": elementwise(lambda x: mpmath.log(mpmath.sinh(x))),
}


# What is not healed yet; whatever is healed has to leave this list.
GAPS = {
    "functional_kl": "the gradient of the target of F.kl_div",
    "r_drop": "the gradient of the target of F.kl_div",
    "jensen_shannon_functional": "the gradient of the target of F.kl_div",
    "clamped_torch_max__drop": "a floor of torch.full_like",
    "focal_with_a_fractional_gamma": "a root of a difference",
    "renormalised_with_a_mask": "a softmax that is masked and renormalised counts as edited",
    "product_of_two_exponentials": "products without a logarithm stay as they are",
    "root_of_a_total": "roots of totals stay as they are",
    "padded_sequence": "pad_sequence",
    "complement_of_ratio_of_two_exponentials": "x / 2 that is computed twice is two tensors",
    "noisy_or": "the product of complements is 1 in float32",
    "complementary_log_log": "an exponential in an exponential",
    "cumulative_link_with_diff": "a difference to a constant inside cat",
}


class TestStabilize:
    @pytest.mark.parametrize("name", FORMS)
    def test_forms_are_right(self, name):
        verdict = judged(name, ("nanguard eager",), "eager")[1]["nanguard eager"]
        assert bool(verdict) == (name not in GAPS), verdict.note or "it is healed: take it off the list"

    @pytest.mark.parametrize("name", TWINS)
    def test_twins_keep_their_meaning(self, name):
        verdict = judged(name, ("nanguard eager",), "eager")[1]["nanguard eager"]
        assert verdict, verdict.note

    @pytest.mark.parametrize("name", INNOCENTS)
    def test_innocents_keep_every_bit(self, name):
        verdict = untouched(name, ("nanguard eager",), "eager")[1]["nanguard eager"]
        assert verdict, verdict.note


class TestJudge:
    @pytest.mark.parametrize("name", ["textbook", "info_nce", "bce_by_hand"])
    def test_what_torch_computes_is_wrong_where_it_is(self, name):
        assert not judge(FORMS[name], "torch eager", "extreme")
        assert judge(FORMS[name], "torch eager", "mild")

    @pytest.mark.parametrize("spoil", [lambda v: v * 0, lambda v: v * 1.01, lambda v: v + 1, lambda v: v / 0])
    def test_lost_digits_are_noticed(self, spoil):
        form = FORMS["textbook"]
        exact = reference(form, "extreme")
        assert broken(form, "extreme", Outcome(exact.value.float(), (exact.gradients[0].float(),)))
        value = broken(form, "extreme", Outcome(spoil(exact.value).float(), exact.gradients))
        gradient = broken(form, "extreme", Outcome(exact.value, (spoil(exact.gradients[0]).float(),)))
        assert (value.value, value.gradient) == (False, True)
        assert (gradient.value, gradient.gradient) == (True, False)

    def test_changed_innocents_are_noticed(self):
        entry = Innocent("loss", "", FORMS["textbook"].naive, FORMS["textbook"].inputs)
        assert "swapped by" in changed(entry, "mild")
        assert "has changed" in changed(entry, "extreme")
