"""The algebra by itself: free of torch, with equations that hold by construction."""

import math
import subprocess
import sys

import pytest

from nanguard.algebra import (
    Apply,
    Call,
    Leaf,
    Operand,
    Unrecognised,
    build,
    laws,
    lookup,
    match,
    rules,
    sums,
    totals,
    untracked,
)
from nanguard.algebra import operators as ops
from nanguard.algebra.factors import common_factor, mixture
from nanguard.algebra.families.epsilon import drop_epsilons
from nanguard.algebra.linear import exponential
from nanguard.algebra.registry import law, rule
from nanguard.algebra.spelling import spellings

IMPORTS = (
    "import sys; import nanguard.algebra.registry as r; r.lookup('NG101'); {extra}; sys.exit('torch' in sys.modules)"
)
HEADINGS = ["What it does", "Why is this bad", "Example", "Use instead", "Fix safety"]


def leaf(*shape, value=None, **more):
    return Leaf(object() if value is None else value, shape, **more)


@pytest.mark.parametrize(("extra", "status"), [("pass", 0), ("import torch", 1)])
def test_the_algebra_imports_no_torch_and_this_test_would_notice(extra, status):
    assert subprocess.run([sys.executable, "-c", IMPORTS.format(extra=extra)], check=False).returncode == status


class TestRegistry:
    def test_codes_say_their_kind(self):
        for known in rules():
            assert known.code.startswith(
                {"logarithm": "NG1", "quotient": "NG2", "advice": "NG3", "branch": "NG4"}[known.kind]
            )
            assert len(known.code) == 5

    @pytest.mark.parametrize("known", rules(), ids=lambda known: known.code)
    def test_documentation_has_all_headings_in_order(self, known):
        places = [known.documentation.index(f"## {heading}\n") for heading in HEADINGS]
        assert places == sorted(places)
        assert "    ##" not in known.documentation

    def test_lookup(self):
        assert lookup("ng102").name == "cross-entropy"
        with pytest.raises(KeyError, match="no rule 'NG999'; there are NG101, NG102"):
            lookup("NG999")

    def test_nothing_is_declared_twice(self):
        with pytest.raises(ValueError, match=r"rule NG101 .* is declared twice"):
            rule("NG101", "fresh")(lambda term: False)
        with pytest.raises(ValueError, match=r"rule NG199 .log-softmax. is declared twice"):
            rule("NG199", "log-softmax")(lambda term: False)

        def exp(call):
            raise Unrecognised

        with pytest.raises(ValueError, match="law 'exp' is declared twice"):
            law("torch.exp(input)")(exp)

    def test_every_law_has_a_spelling(self):
        assert all(known.spellings for known in laws())


class TestSpelling:
    def bind(self, signature, *args, **kwargs):
        return spellings(signature)[0].bind(args, kwargs)

    def test_defaults_and_keywords(self):
        bound = self.bind("f(input, dim=None, keepdim=False, *, dtype=None)", "x", keepdim=True)
        assert bound == {"input": "x", "dim": None, "keepdim": True, "dtype": None}

    @pytest.mark.parametrize(
        ("alias", "name"), [("axis", "dim"), ("keepdims", "keepdim"), ("self", "input"), ("x", "input")]
    )
    def test_aliases_of_numpy(self, alias, name):
        bound = spellings("f(input=0, dim=0, keepdim=0)")[0].bind((), {alias: 7})
        assert bound[name] == 7

    @pytest.mark.parametrize(
        ("args", "kwargs"),
        [((1, 2, 3), {}), ((1,), {"unknown": 1}), ((1,), {"input": 2}), ((), {"dim": 1}), ((1, 2), {"axis": 3})],
    )
    def test_what_does_not_fit_is_not_bound(self, args, kwargs):
        assert self.bind("f(input, dim=None)", *args, **kwargs) is None

    def test_starred(self):
        assert self.bind("f(input, *size)", 1, 2, 3) == {"input": 1, "size": (2, 3)}
        assert self.bind("f(input, *size)", 1, size=(2, 3)) == {"input": 1, "size": ((2, 3),)}

    @pytest.mark.parametrize(
        ("path", "in_place"),
        [("a.exp_", True), ("a.__itruediv__", True), ("a.exp", False), ("a.__mul__", False), ("a.T.__get__", False)],
    )
    def test_in_place(self, path, in_place):
        assert spellings(f"{path}(input)")[0].in_place is in_place


class TestSimplification:
    x = leaf(4, 4)
    y = leaf(4, 4)

    @pytest.mark.parametrize("dim", [0, 1])
    def test_softmax_by_hand(self, dim):
        total = totals.logsumexp(self.x, (dim,), True)
        assert build.subtract(self.x, total) == build.log_softmax(self.x, dim)
        assert build.add(self.x, build.negate(total)) == build.log_softmax(self.x, dim)

    def test_what_is_normalised_stays(self):
        p = build.log_softmax(self.x, 1)
        assert build.subtract(p, totals.logsumexp(p, (1,), True)) == p
        assert build.subtract(p, totals.logsumexp(p, (0,), True)) == build.log_softmax(p, 0) != p

    def test_a_total_that_was_unsqueezed(self):
        total = build.reshape(totals.logsumexp(self.x, (1,), False), (4, 1))
        assert build.subtract(self.x, total) == build.log_softmax(self.x, 1)

    def test_a_total_that_was_expanded(self):
        total = build.expand(totals.logsumexp(self.x, (1,), True), (4, 4))
        assert build.subtract(self.x, total) == build.log_softmax(self.x, 1)

    def test_a_total_that_broadcasts_elsewhere_is_none(self):
        """On a square, exp(x) / exp(x).sum(1) divides columns by the totals of rows."""
        bare = totals.logsumexp(self.x, (1,), False)
        assert build.subtract(self.x, bare).operator is ops.SUBTRACT
        assert build.subtract(self.x, build.reshape(bare, (1, 4))).operator is ops.SUBTRACT
        rows = build.reshape(totals.logsumexp(self.x, (0,), False), (4, 1))
        assert build.subtract(self.x, rows).operator is ops.SUBTRACT

    @pytest.mark.parametrize(
        "other",
        [leaf(4, 4), leaf(4, 4, value=x.value, version=1), leaf(4, 4, value=x.value, tracked=False)],
        ids=["another tensor", "edited since", "detached"],
    )
    def test_a_total_of_something_else_is_none(self, other):
        assert build.subtract(self.x, totals.logsumexp(other, (1,), True)).operator is ops.SUBTRACT

    def test_sigmoids_by_hand(self):
        one_plus = sums.plus_constant(self.x, 1.0)
        assert build.subtract(self.x, one_plus) == build.logsigmoid(self.x)
        assert build.negate(sums.plus_constant(build.negate(self.x), 1.0)) == build.logsigmoid(self.x)
        assert build.subtract(self.x, sums.plus_constant(leaf(4, 4), 1.0)).operator is ops.SUBTRACT
        both = sums.logaddexp(self.x, self.y)
        assert build.subtract(self.x, both) == build.logsigmoid(build.subtract(self.x, self.y))
        assert build.subtract(self.y, both) == build.logsigmoid(build.subtract(self.y, self.x))

    def test_exponentials(self):
        assert exponential(build.log_softmax(self.x, 1)).operator is ops.SOFTMAX
        assert exponential(build.logsigmoid(self.x)).operator is ops.SIGMOID
        assert exponential(self.x) is None

    def test_empty_sums_and_misfitting_shapes_are_unrecognised(self):
        with pytest.raises(Unrecognised):
            totals.logsumexp(leaf(0, 3), (0,), False)
        with pytest.raises(Unrecognised):
            build.add(leaf(2), leaf(3))

    def test_detaching_reaches_every_leaf(self):
        term = untracked(build.add(self.x, build.log_softmax(leaf(4, 4), 1)))
        assert isinstance(term, Apply)
        assert not any(part.tracked for part in (term.args[0], term.args[1].args[0]))


class TestCancellation:
    x, p, q = leaf(4, 4), build.logsigmoid(leaf(4, 4)), build.logsigmoid(leaf(4, 4))

    def test_what_two_numbers_have_in_common(self):
        found = common_factor(build.shift(build.scale(self.p, 2.0), 0.5), build.shift(build.add(self.p, self.q), 0.5))
        assert found.factor == self.p
        assert found.constant == 0.5
        assert found.rests == ((self.p, 0.0), (self.q, 0.0))
        found = common_factor(build.subtract(self.x, self.p), build.negate(self.p))
        assert found.rests == ((self.x, 0.0), (None, 0.0))
        assert common_factor(self.p, self.q) is None
        assert common_factor(build.shift(self.p, 0.5), build.shift(self.q, 0.6)) is None

    def test_a_mixture(self):
        parts, added = mixture(sums.plus_constant(sums.logaddexp(build.shift(self.p, 0.0), self.q), 0.25))
        assert parts == [(1.0, self.p), (1.0, self.q)]
        assert added == 0.25

    def test_a_factor_in_common_is_taken_out(self):
        assert sums.difference(self.p, build.scale(self.p, 2.0)).args[0] == self.p
        assert sums.difference(build.shift(self.x, 0.5), build.shift(self.q, 0.5)).operator is ops.SHIFT
        # Nothing cancels in 2 p - p^2.
        assert sums.difference(build.shift(self.p, 0.7), build.scale(self.p, 2.0)).operator is ops.DIFFERENCE

    def test_a_difference_of_totals(self):
        one, other = (totals.logsumexp(build.add(self.q, part), (1,), False) for part in (self.p, self.x))
        found = sums.difference(one, other)
        assert found.operator is ops.LOGSUMEXP
        assert found.args[0] == build.add(self.q, sums.difference(self.p, self.x))
        assert sums.difference(totals.logsumexp(self.x, (1,), False), one).operator is ops.DIFFERENCE

    def test_what_is_left_of_one(self):
        rest = build.logsigmoid(build.negate(self.p.args[0]))
        assert sums.complement(build.shift(self.p, math.log(0.8)), 0.8) == build.shift(rest, math.log(0.8))
        assert sums.plus_constant(self.p, -1.0) == build.minus(rest)
        squared = sums.complement(build.scale(self.p, 2.0), 1.0)
        assert squared.operator is ops.COMPLEMENT
        assert sums.complement(squared, 1.0) == build.scale(self.p, 2.0)
        assert sums.plus_constant(sums.plus_constant(self.x, 0.5), -0.5) == self.x


class TestDroppedEpsilons:
    p = build.log_softmax(leaf(2, 3), 1)

    def is_dropped(self, term):
        return drop_epsilons(term).operator is ops.FLOOR_ZERO

    @pytest.mark.parametrize("constant", [1e-3, 1e-12])
    def test_small_ones_on_probabilities_and_totals(self, constant):
        for guarded in (self.p, build.reshape(self.p, (6,)), totals.logsumexp(leaf(2, 3), (1,), True)):
            assert self.is_dropped(sums.plus_constant(guarded, constant))
            assert self.is_dropped(totals.clamp(guarded, constant, None))

    def test_in_a_denominator_inside_the_logarithm(self):
        x = leaf(2, 3)
        total = sums.plus_constant(totals.logsumexp(x, (1,), True), 1e-8)
        assert "plus_constant" not in repr(drop_epsilons(build.subtract(x, total)))

    @pytest.mark.parametrize(
        "term",
        [
            sums.plus_constant(p, 2e-3),
            sums.plus_constant(build.shift(p, -0.01), 1e-4),
            sums.plus_constant(build.subtract(p, build.log_softmax(leaf(2, 3), 1)), 1e-8),
            totals.clamp(p, None, 1 - 1e-2),
        ],
        ids=["large", "mixture", "ratio", "upper bound"],
    )
    def test_others_stay(self, term):
        assert drop_epsilons(term) == term


class TestCall:
    def call(self, **arguments):
        return Call(arguments, (2, 3))

    @pytest.mark.parametrize("value", [True, "1", None, float("inf"), float("nan"), Operand(leaf())])
    def test_what_is_no_number(self, value):
        with pytest.raises(Unrecognised):
            self.call(other=value).number("other")

    @pytest.mark.parametrize("value", [0, -1.0])
    def test_what_is_not_positive(self, value):
        with pytest.raises(Unrecognised):
            self.call(other=value).positive("other")

    @pytest.mark.parametrize("value", [None, True, 2, -3, 1.0, "batch", 2**70])
    def test_what_is_no_dim(self, value):
        with pytest.raises(Unrecognised):
            self.call(dim=value).dim((2, 3))

    def test_dims(self):
        assert self.call(dim=-1).dims((2, 3)) == (1,)
        assert self.call(dim=(1, 0)).dims((2, 3)) == (0, 1)
        assert self.call(dim=None).dims((2, 3)) == (0, 1)

    def test_untrusted_and_integer_tensors_are_no_leaves(self):
        for operand in (Operand(leaf(), trusted=False), Operand(leaf(), real=False)):
            with pytest.raises(Unrecognised):
                self.call(input=operand).leaf()


def test_rules_exclude_each_other():
    x = leaf(4, 4)
    terms = [
        x,
        build.log_softmax(x, 1),
        build.logsigmoid(x),
        sums.plus_constant(x, 1.0),
        totals.logsumexp(x, (1,), False),
        totals.logmeanexp(build.log_softmax(x, 1), (0,), False),
        build.subtract(x, leaf(4, 4)),
        build.add(x, leaf(4, 4)),
    ]
    for term in terms:
        for wrapped in (term, sums.plus_constant(term, 1e-6), build.scale(term, 2.0), totals.clamp(term, 1e-6, None)):
            matching = [known for known in rules() if known.kind == "logarithm" and known.matches(wrapped)]
            assert [match(wrapped, "logarithm")] == matching
