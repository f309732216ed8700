"""The algebra over compiled graphs: what `torch.compile` computes inside a block, and what `compile_backend` does without."""

import inspect
import math
import threading

import pytest
import torch
import torch.nn.functional as F
from test_stabilizer import (
    BATCH,
    LOGS,
    PICKS,
    POSITIVE,
    SHOWN_BY,
    SOFTMAXES,
    SPELLINGS,
    TARGET,
    P,
    Q,
    X,
    arguments,
    by_hand,
    shaped,
)
from test_stabilizer_soundness import EDITABLE, EDITS, MASKED, SAFE, TWINS, logits
from torch import nn

import nanguard
from nanguard.stabilizer.resolve import function


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, backend=backend, fullgraph=True, **options)


def value_and_gradient(function, x):
    value = function(x)
    total = value.double().sum()
    gradient = torch.autograd.grad(total, x, allow_unused=True)[0] if total.requires_grad else None
    return value.detach(), gradient


def guarded(loss, x=BATCH, epsilon="keep", **options):
    """Value, gradient and swaps of the compiled function inside a block."""
    x = x.detach().clone().requires_grad_()
    with nanguard.stabilize(epsilon) as swaps:
        value, gradient = value_and_gradient(compiled(loss, **options), x)
    return value, gradient, swaps


def expect_cross_entropy(loss):
    expected = value_and_gradient(lambda x: F.cross_entropy(x, TARGET), BATCH.clone().requires_grad_())
    value, gradient, swaps = guarded(loss)
    torch.testing.assert_close(value, expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-5, atol=1e-6)
    return [swap.rule for swap in swaps]


class TestTextbook:
    @pytest.mark.parametrize("softmax", SOFTMAXES)
    @pytest.mark.parametrize("log", LOGS[:2])
    def test_every_softmax(self, softmax, log):
        expect_cross_entropy(lambda x: -log(softmax(x)[torch.arange(3), TARGET]).mean())

    @pytest.mark.parametrize("pick", [*PICKS[:6], *PICKS[8:]])
    @pytest.mark.parametrize("softmax", [by_hand, nn.Softmax(1)])
    def test_every_pick(self, pick, softmax):
        rules = expect_cross_entropy(lambda x: -torch.log(pick(softmax(x), TARGET)).mean())
        assert "NG102" in rules or pick is PICKS[8]

    @pytest.mark.parametrize("log", LOGS)
    def test_every_log(self, log):
        expect_cross_entropy(lambda x: -log(torch.softmax(x, 1)[torch.arange(3), TARGET]).mean())


# Of these nothing is known but that they spoil a gradient, or bring that to light.
LAWS = [(law, spelling) for law, spelling in SPELLINGS if law.name not in ("nan_to_num", "arcsine")]


class TestEveryLaw:
    @pytest.mark.parametrize(("law", "spelling"), LAWS, ids=[spelling.path for _, spelling in LAWS])
    def test_fires_where_it_does_in_eager_code(self, law, spelling):
        call, template = function(spelling.path), arguments(law, spelling, {P: "p", Q: "q", X: "x"})
        is_source, is_query, in_place = (
            law.role == "source" and law.name != "pow",
            law.role == "query",
            spelling.in_place,
        )
        of_exponential, method = law.name in ("log1p", "xlog1py"), spelling.path.rpartition(".")[2]
        place = 0 if law.name in ("max", "min", "sort", "topk", "broadcast_tensors") else -1
        show = SHOWN_BY.get(law.name, lambda result, known: torch.log(result))
        torch.manual_seed(0)
        x, z = torch.randn(2, 3, 3)
        x = x.abs() if law.name in POSITIVE else x

        def run(x, z):
            p, q = torch.softmax(x, 1), torch.sigmoid(z)
            known = p
            p = x * 1.0 if is_source else p
            p = x.exp() if of_exponential else p
            first, second = shaped(method, p, q)
            first = first * 1.0 if in_place else first
            values = {"p": first, "q": second, "x": x * 1.0}
            given = []
            for entry in template:
                if isinstance(entry, list) and entry and isinstance(entry[0], str):
                    entry = [values[name] for name in entry]
                given.append(values[entry] if isinstance(entry, str) and entry in values else entry)
            result = call(*given)
            result = first if result is None else result
            result = result[place] if isinstance(result, tuple) else result
            return result if is_query else show(result, known)

        outcomes = []
        for execute in (run, torch.compile(run, backend="aot_eager")):
            inputs = x.clone().requires_grad_(), z.clone().requires_grad_()
            torch.manual_seed(0)
            with nanguard.stabilize() as swaps:
                value = execute(*inputs)
            gradient = (
                torch.autograd.grad(value.sum(), inputs[0], allow_unused=True)[0] if value.requires_grad else None
            )
            outcomes.append((value, gradient, {swap.rule for swap in swaps}))
        assert outcomes[0][2], "the law did not fire"
        torch.testing.assert_close(outcomes[1][:2], outcomes[0][:2], rtol=1e-5, atol=1e-5)
        if torch._dynamo.utils.counters["graph_break"]:
            pytest.skip("dynamo breaks the graph there")
        assert outcomes[1][2] == outcomes[0][2]


def assert_untouched(run, backend="aot_eager"):
    """The same bits inside and outside of a block, in value and gradient, and no swap."""
    function = torch.compile(run, backend=backend)
    torch.manual_seed(0)
    value, gradient = value_and_gradient(function, logits())
    torch.manual_seed(0)
    with nanguard.stabilize() as swaps:
        guarded_value, guarded_gradient = value_and_gradient(function, logits())
    assert swaps == []
    torch.testing.assert_close(guarded_value, value, rtol=0, atol=0, equal_nan=True)
    assert (gradient is None) == (guarded_gradient is None)
    if gradient is not None:
        torch.testing.assert_close(guarded_gradient, gradient, rtol=0, atol=0, equal_nan=True)


class TestSoundness:
    @pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
    def test_edits_end_what_is_known(self, edit):
        def run(x):
            x = x * 1
            p = torch.softmax(x, 1)
            with torch.no_grad():
                edit(x, p)
            return torch.log(p.detach())

        assert_untouched(run)

    @pytest.mark.parametrize("twin", TWINS.values(), ids=TWINS.keys())
    def test_twins_stay_as_they_are(self, twin):
        def run(x):
            torch.manual_seed(0)
            return twin(x)

        assert_untouched(run)

    @pytest.mark.parametrize("bare", [False, True])
    def test_subclasses_of_tensors_stay_as_they_are(self, bare):
        class Labelled(torch.Tensor):
            pass

        class Bare(torch.Tensor):
            @classmethod
            def __torch_function__(cls, func, types, args=(), kwargs=None):
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **(kwargs or {}))

        kind = Bare if bare else Labelled
        assert_untouched(lambda x: torch.log(torch.softmax(x, 1).as_subclass(kind) + 0.1).as_subclass(torch.Tensor))

    def test_a_mode_of_the_users_own_is_no_subclass(self):
        class Passing(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                return func(*args, **(kwargs or {}))

        def run(x):
            with Passing():
                return torch.log(torch.softmax(x, 1))

        assert len(guarded(run)[2]) == 1

    @pytest.mark.parametrize(
        "edit", [lambda one: one.fill_(2.0), lambda one: one.add_(1.0), lambda one: one.float().mul_(2.0)]
    )
    def test_a_constant_that_is_edited_is_no_constant(self, edit):
        def run(x):
            one = torch.tensor(1.0)
            edit(one)
            return torch.log(one - torch.sigmoid(x))

        assert_untouched(run)


class TestConstants:
    """Tensors that are written down as numbers."""

    @pytest.mark.parametrize(
        "one",
        [
            lambda x: torch.tensor(1.0),
            lambda x: torch.tensor(1, dtype=torch.float32),
            lambda x: torch.as_tensor(1.0),
            lambda x: torch.scalar_tensor(1.0),
            lambda x: torch.full((), 1.0),
            lambda x: x.new_tensor(1.0),
            lambda x: x.new_full((), 1.0),
            lambda x: torch.tensor(1.0).to(x),
            lambda x: torch.tensor(1.0).type_as(x),
        ],
    )
    def test_a_tensor_of_one_number(self, one):
        x = torch.tensor([-200.0, 0.0, 200.0])
        value, gradient, swaps = guarded(lambda x: torch.log(one(x) - torch.sigmoid(x)), x)
        torch.testing.assert_close(value, F.logsigmoid(-x))
        torch.testing.assert_close(gradient, -torch.sigmoid(x))
        assert [swap.rule for swap in swaps] == ["NG104"]

    def test_it_is_rounded_as_the_tensor_is(self):
        x = torch.tensor([-200.0, 0.0, 200.0])

        def run(x):
            return torch.log(torch.sigmoid(x) + torch.tensor(0.1, dtype=torch.bfloat16))

        value, _, swaps = guarded(run, x)
        assert len(swaps) == 1
        torch.testing.assert_close(value, run(x))

    def test_a_total_that_starts_at_zero(self):
        def by_columns(x):
            total = torch.zeros(x.shape[0])
            for column in x.unbind(1):
                total += column.exp()
            return total.log()

        def by_segments(x):
            return torch.log(torch.zeros(1, x.shape[1]).index_add_(0, torch.tensor([0, 0, 0]), x.exp()))

        for run, dim in ((by_columns, 1), (by_segments, 0)):
            value, gradient, swaps = guarded(run)
            exact = BATCH.clone().requires_grad_()
            expected = torch.logsumexp(exact, dim)
            torch.testing.assert_close(value.flatten(), expected.detach())
            torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), exact)[0])
            assert len(swaps) == 1


class TestResults:
    @pytest.mark.parametrize("make", EDITABLE.values(), ids=EDITABLE.keys())
    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_are_tensors_like_the_originals(self, make, backend):
        original = make(logits())
        with nanguard.stabilize() as swaps:
            result = torch.compile(make, backend=backend)(logits())
        assert len(swaps) == 1
        assert type(result) is torch.Tensor
        assert result.stride() == original.stride()
        assert (result.dtype, result.requires_grad) == (original.dtype, original.requires_grad)
        torch.testing.assert_close(result, original)

    @pytest.mark.parametrize("make", EDITABLE.values(), ids=EDITABLE.keys())
    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_may_be_edited_in_place(self, make, backend):
        def run(x):
            result = make(x * 1)
            result[:1] = 0
            return result.mul_(3) if make is not EDITABLE["quotient"] else result

        gradients = []
        for call in (run, torch.compile(run, backend=backend)):
            with nanguard.stabilize():
                x = logits()
                result = call(x)
                if make is not EDITABLE["quotient"]:
                    result.mul_(2)
            result.sum().backward()
            gradients.append(x.grad)
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("make", EDITABLE.values(), ids=EDITABLE.keys())
    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_the_logits_may_be_edited_afterwards(self, make, backend):
        def run(x):
            z = x * 1
            result = make(z)
            z.detach().mul_(5)
            return result, z

        x = logits()
        with nanguard.stabilize() as swaps:
            result, _ = torch.compile(run, backend=backend)(x)
        assert swaps
        torch.testing.assert_close(result, make(logits()))
        result.sum().backward()
        y = logits()
        make(y * 1).sum().backward()
        torch.testing.assert_close(x.grad, y.grad)

    @pytest.mark.parametrize("epsilon", ["keep", "drop"])
    @pytest.mark.parametrize("loss", SAFE.values(), ids=SAFE.keys())
    def test_no_nan_where_the_original_has_none(self, loss, epsilon):
        value, gradient = value_and_gradient(loss, MASKED.clone().requires_grad_())
        guarded_value, guarded_gradient, swaps = guarded(loss, MASKED, epsilon)
        assert swaps
        assert not (guarded_value.isnan() & ~value.isnan()).any()
        assert not (guarded_gradient.isnan() & ~gradient.isnan()).any()


def cross_entropy(x, y):
    p = torch.softmax(x, dim=1)
    return -torch.log(p[torch.arange(x.shape[0]), y]).mean()


def batch(n=4, classes=6, scale=300.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, classes, generator=generator) * scale
    return x.requires_grad_(), torch.randint(0, classes, (n,), generator=generator)


def unique_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


class TestBlocks:
    def test_outside_it_is_itself_again(self):
        function, (x, y) = compiled(cross_entropy), batch()
        before = function(x, y)
        with nanguard.stabilize():
            inside = function(x, y)
        assert torch.equal(before, function(x, y))
        assert before.isinf()
        torch.testing.assert_close(inside, F.cross_entropy(x, y))

    def test_nothing_is_compiled_twice(self):
        function, (x, y) = compiled(cross_entropy), batch()
        optimizer = torch.optim.SGD([x], lr=1.0)
        for _ in range(3):
            for _ in range(2):
                with nanguard.stabilize() as swaps:
                    for _ in range(2):
                        optimizer.zero_grad()
                        function(x, y).backward()
                        optimizer.step()
                assert [(swap.rule, swap.count) for swap in swaps] == [("NG102", 2)]
            function(x, y)
        assert unique_graphs() == 2

    def test_keep_and_drop_are_told_apart(self):
        function, (x, y) = compiled(lambda x, y: -torch.log(x.softmax(1).gather(1, y[:, None]) + 1e-8).mean()), batch()
        for _ in range(2):
            with nanguard.stabilize():
                assert function(x, y) <= -math.log(1e-8)
                with nanguard.stabilize(epsilon="drop"):
                    torch.testing.assert_close(function(x, y), F.cross_entropy(x, y))
            with nanguard.stabilize(epsilon="drop"):
                torch.testing.assert_close(function(x, y), F.cross_entropy(x, y))
                with nanguard.stabilize():
                    assert function(x, y) <= -math.log(1e-8)
        assert unique_graphs() == 4

    def test_other_threads_are_not_affected(self):
        function, (x, y) = compiled(cross_entropy), batch()
        values = []
        with nanguard.stabilize():
            thread = threading.Thread(target=lambda: values.append(function(x, y)))
            thread.start()
            thread.join()
            values.append(function(x, y))
        assert [value.isinf().item() for value in values] == [True, False]

    def test_torch_is_as_it_was(self):
        graph = torch._dynamo.output_graph.OutputGraph
        before = {name: id(value) for owner in (graph, torch._dynamo, torch) for name, value in vars(owner).items()}
        with nanguard.stabilize():
            compiled(cross_entropy)(*batch())
        after = {name: id(value) for owner in (graph, torch._dynamo, torch) for name, value in vars(owner).items()}
        assert after == before

    def test_a_block_inside_of_the_function(self):
        def run(x, y):
            naive = torch.log(torch.softmax(x, 1))
            with nanguard.stabilize(epsilon="drop"):
                loss = -torch.log(torch.softmax(x, 1)[torch.arange(4), y] + 1e-8).mean()
            return naive, loss, torch.log(torch.softmax(x, 1))

        x, y = batch()
        naive, loss, again = compiled(run)(x, y)
        torch.testing.assert_close(loss, F.cross_entropy(x, y))
        assert naive.isinf().any()
        assert torch.equal(naive, again)

    def test_a_decorated_function(self):
        x, y = batch()
        for _ in range(2):
            loss = compiled(nanguard.stabilize()(cross_entropy))(x, y)
            torch.testing.assert_close(loss, F.cross_entropy(x, y))

    def test_a_graph_that_breaks(self):
        def run(x, y):
            loss = cross_entropy(x, y)
            torch._dynamo.graph_break()
            p = torch.softmax(x, 1)
            return loss - torch.log(p).sum() / 4

        x, y = batch()
        with nanguard.stabilize() as swaps:
            loss = torch.compile(run, backend="aot_eager")(x, y)
        torch.testing.assert_close(loss, F.cross_entropy(x, y) - F.log_softmax(x, 1).sum() / 4)
        assert [swap.rule for swap in swaps] == ["NG102", "NG101"]

    def test_a_block_around_a_break(self):
        def run(x, y):
            with nanguard.stabilize():
                p = torch.softmax(x, 1)
                print(end="")
                torch._dynamo.graph_break()
                return F.nll_loss(torch.log(p), y)

        x, y = batch()
        torch.testing.assert_close(torch.compile(run, backend="aot_eager")(x, y), F.cross_entropy(x, y))

    def test_a_mode_of_the_users_own_is_still_traced(self):
        class Doubling(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                result = func(*args, **(kwargs or {}))
                return result * 2 if func is torch.exp else result

        def run(x):
            y = x * 1
            with Doubling():
                return torch.exp(y)

        x = torch.zeros(3)
        with nanguard.stabilize():
            assert torch.equal(torch.compile(run, backend="eager")(x), torch.full((3,), 2.0))


def aten_graphs(function, *args):
    """The operations of the forward and the backward graph that the inner backend gets."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    seen = []

    def look(module, inputs):
        seen.append({str(node.target) for node in module.graph.nodes if node.op == "call_function"})
        return make_boxed_func(module.forward)

    with nanguard.stabilize():
        torch.compile(function, backend=aot_autograd(fw_compiler=look, bw_compiler=look))(*args).sum().backward()
    return seen


class TestWhatIsComputed:
    @pytest.mark.parametrize(
        "function",
        [
            cross_entropy,
            lambda x, y: torch.log((x.exp() / x.exp().sum(1, keepdim=True)).gather(1, y[:, None])),
            lambda x, y: torch.log(x.exp().sum(1)),
            lambda x, y: torch.log(torch.sigmoid(x)),
        ],
    )
    def test_the_naive_code_is_gone(self, function):
        forward, _ = aten_graphs(function, *batch())
        assert not forward & {"aten.log.default", "aten._softmax.default", "aten.exp.default", "aten.div.Tensor"}

    def test_a_pick_needs_no_scatter(self):
        for operations in aten_graphs(cross_entropy, *batch()):
            assert not {name for name in operations if "scatter" in name or "index_put" in name}

    def test_what_is_unstable_no_more_is_as_good_as_the_cross_entropy(self):
        x, y = batch(scale=3.0)
        z = x.detach().clone().requires_grad_()
        step = compiled(cross_entropy)
        ours, theirs = torch.optim.Adam([x], lr=0.1), torch.optim.Adam([z], lr=0.1)
        for _ in range(5):
            ours.zero_grad()
            theirs.zero_grad()
            with nanguard.stabilize():
                step(x, y).backward()
            F.cross_entropy(z, y).backward()
            ours.step()
            theirs.step()
        torch.testing.assert_close(x, z)


class TestSwaps:
    def test_are_those_of_eager_code(self):
        def helper(p):
            return torch.log(
                p + 1e-8,
            )

        def run(x, y):
            p = F.softmax(x, dim=-1)
            q = p[torch.arange(4), y]
            a = -torch.log(q + 1e-8).mean()
            b = -q.log().mean() - torch.log(q).sum()
            e = torch.exp(x)
            return a + b + helper(p).sum() + (e / e.sum(1, keepdim=True)).sum()

        x, y = batch()
        with nanguard.stabilize() as eager:
            run(x, y)
        with nanguard.stabilize() as swaps:
            compiled(run)(x, y)
        assert swaps == eager
        assert [swap.count for swap in swaps] == [swap.count for swap in eager]

    def test_name_the_line(self):
        line = inspect.getsourcelines(cross_entropy)[1] + 2
        with nanguard.stabilize() as swaps:
            compiled(cross_entropy)(*batch())
        (swap,) = swaps
        assert (swap.rule, swap.file, swap.line) == ("NG102", __file__, line)
        assert swap.original == "torch.log(p[torch.arange(x.shape[0]), y])"
        assert swap.replacement == '-F.cross_entropy(x, y, reduction="none")'

    def test_of_modules_name_their_attributes(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.scores = nn.Parameter(torch.randn(4, 4))
                self.soft = nn.Softmax(dim=1)

            def forward(self, x):
                return torch.log(self.soft(self.scores)) + x

        with nanguard.stabilize() as swaps:
            compiled(Net())(torch.zeros(4))
        assert [swap.replacement for swap in swaps] == ["F.log_softmax(self.scores, dim=1)"]


class TestSituations:
    def test_gradient_modes(self):
        def run(x):
            with torch.no_grad():
                inside = torch.softmax(x, 1).log()
                p = torch.softmax(x, 1)
            q = torch.softmax(x, 1)
            values = [inside, p.log(), q.detach().log()]
            with torch.no_grad():
                values.append(q.log())
            return values

        with nanguard.stabilize() as swaps:
            values = compiled(run)(batch()[0])
        assert sum(swap.count for swap in swaps) == 4
        assert not any(value.requires_grad for value in values)

    def test_a_detached_factor_stays_detached(self):
        def run(x, z):
            p = torch.softmax(z, 1).detach()
            ratio = torch.log(torch.softmax(x, 1) / p)
            p.mul_(2)
            return ratio

        x, z = logits(), logits(seed=1)
        with nanguard.stabilize() as swaps:
            ratio = compiled(run)(x, z)
        assert swaps
        assert torch.autograd.grad(ratio.sum(), z, allow_unused=True, retain_graph=True)[0] in (None,)
        assert torch.autograd.grad(ratio[:, 0].sum(), x)[0].abs().sum() > 0

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast_keeps_its_dtypes(self, dtype):
        def run(x, weight):
            with torch.autocast("cpu", dtype=dtype):
                p = torch.softmax(x @ weight, 1)
                return p, torch.log(p)

        x = BATCH.clamp(-40, 40)
        plain, naive = run(x, torch.eye(3))
        weight = torch.eye(3, requires_grad=True)
        for around in (False, True):
            with nanguard.stabilize() as swaps, torch.autocast("cpu", dtype=dtype, enabled=around):
                p, stable = compiled(run)(x, weight)
            assert swaps
            assert (p.dtype, stable.dtype) == (plain.dtype, naive.dtype)
            (gradient,) = torch.autograd.grad(stable.sum(), weight)
            assert gradient.isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_dtypes(self, dtype):
        x = BATCH.clone().to(dtype).requires_grad_()
        with nanguard.stabilize():
            loss = compiled(lambda x: -torch.log(torch.softmax(x, 1)[torch.arange(3), TARGET]).mean())(x)
        loss.backward()
        assert loss.dtype == x.grad.dtype == dtype
        reference = x.detach().double().requires_grad_()
        expected = F.cross_entropy(reference, TARGET)
        expected.backward()
        tolerance = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
        torch.testing.assert_close(x.grad.double(), reference.grad, rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize(
        ("function", "reference"),
        [
            (cross_entropy, F.cross_entropy),
            (
                lambda x, y: -torch.log((x.exp() / x.exp().sum(1)[:, None]).gather(1, y[:, None])).mean(),
                F.cross_entropy,
            ),
            (
                lambda x, y: torch.log(torch.softmax(x, 1).mean(0)).sum(),
                lambda x, y: (torch.logsumexp(F.log_softmax(x, 1), 0) - math.log(len(x))).sum(),
            ),
            (
                lambda x, y: torch.log(torch.softmax(x, 1)[: x.shape[0] - 1]).sum(),
                lambda x, y: F.log_softmax(x, 1)[:-1].sum(),
            ),
            (
                lambda x, y: torch.log(torch.softmax(x, 1).view(-1)).sum(),
                lambda x, y: F.log_softmax(x, 1).sum(),
            ),
        ],
    )
    @pytest.mark.parametrize("how", ["mark", "all"])
    def test_sizes_that_change_compile_nothing_anew(self, function, reference, how):
        call = compiled(function, dynamic=True if how == "all" else None)
        for size in (4, 7, 5, 9):
            x, y = batch(size, seed=size)
            if how == "mark":
                torch._dynamo.mark_dynamic(x, 0)
                torch._dynamo.mark_dynamic(y, 0)
            with nanguard.stabilize() as swaps:
                loss = call(x, y)
            assert swaps
            expected = reference(x, y)
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(
                torch.autograd.grad(loss, x)[0], torch.autograd.grad(expected, x)[0], rtol=1e-5, atol=1e-5
            )
        assert unique_graphs() == 1

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_regions_under_a_checkpoint(self, backend):
        def run(x, y):
            loss = torch.utils.checkpoint.checkpoint(cross_entropy, x, y, use_reentrant=False)
            return loss * 2

        x, y = batch()
        with nanguard.stabilize() as swaps:
            loss = compiled(run, backend=backend)(x, y)
        assert [swap.rule for swap in swaps] == ["NG102"]
        (gradient,) = torch.autograd.grad(loss, x)
        expected = F.cross_entropy(x, y) * 2
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, x)[0])

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_compiled_code_under_a_checkpoint(self, reentrant):
        function, (x, y) = compiled(cross_entropy), batch()
        with nanguard.stabilize():
            loss = torch.utils.checkpoint.checkpoint(function, x, y, use_reentrant=reentrant)
        (gradient,) = torch.autograd.grad(loss, x) if not reentrant else (None,)
        if reentrant:
            loss.backward()
            gradient = x.grad
        expected = F.cross_entropy(x, y)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, x)[0])

    @pytest.mark.parametrize("watch", [lambda p: p.register_hook(lambda g: g * 2), lambda p: p.retain_grad()])
    def test_watching_an_intermediate_prevents_the_swap(self, watch):
        def run(x):
            p = torch.softmax(x, 1)
            watch(p)
            return torch.log(p)

        assert_untouched(run)

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_in_place_logarithm_and_exponential(self, backend):
        def run(x):
            z = x * 1
            z.exp_()
            total = z.sum(1)
            return total.log_(), total

        x = (logits() * 300).detach().requires_grad_()
        with nanguard.stabilize() as swaps:
            result, total = compiled(run, backend=backend)(x)
        assert [swap.rule for swap in swaps] == ["NG103"]
        torch.testing.assert_close(result, torch.logsumexp(x, 1))
        assert torch.equal(result, total)
        torch.testing.assert_close(
            torch.autograd.grad(result.sum(), x)[0], torch.autograd.grad(torch.logsumexp(x, 1).sum(), x)[0]
        )

    def test_inputs_that_share_memory(self):
        def run(x, alias):
            p = torch.softmax(x, 1)
            alias.mul_(2)
            return p.log(), torch.softmax(x, 1).log()

        x = logits().detach()
        base = x.clone()
        with nanguard.stabilize() as swaps:
            before, after = torch.compile(run, backend="aot_eager")(base, base[0])
        torch.testing.assert_close(before, torch.softmax(x, 1).log())
        torch.testing.assert_close(after, torch.softmax(base, 1).log())
        assert sum(swap.count for swap in swaps) == 1

    def test_transforms_are_left_alone(self):
        def run(x):
            return torch.func.grad(lambda z: torch.log(torch.softmax(z, 1)).sum())(x)

        x = logits().detach()
        with nanguard.stabilize():
            torch.testing.assert_close(torch.compile(run, backend="aot_eager")(x), run(x))

    def test_buffers_and_running_statistics(self):
        model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Softmax(dim=1))

        def run(x, y):
            return F.nll_loss(torch.log(model(x)), y)

        x, y = batch(scale=1.0)
        with nanguard.stabilize() as swaps:
            loss = compiled(run)(x, y)
        assert [swap.rule for swap in swaps] == ["NG101"]
        model.train()
        torch.testing.assert_close(loss, run(x, y))

    def test_a_graph_that_cannot_be_read_is_left_alone(self, monkeypatch):
        from nanguard.stabilizer.compiled import transform

        monkeypatch.setattr(transform, "Plan", lambda *args: 1 / 0)
        x, y = batch()
        with nanguard.stabilize() as swaps, pytest.warns(nanguard.NanGuardWarning, match="ZeroDivisionError"):
            assert compiled(cross_entropy)(x, y).isinf()
        assert swaps == []


class TestBackend:
    def test_needs_no_block(self):
        backend = nanguard.compile_backend("aot_eager")
        x, y = batch()
        function = compiled(cross_entropy, backend=backend)
        for _ in range(3):
            torch.testing.assert_close(function(x, y), F.cross_entropy(x, y))
        assert [(swap.rule, swap.count) for swap in backend.swaps] == [("NG102", 3)]

    def test_inside_of_a_block_the_block_comes_first(self):
        backend = nanguard.compile_backend("aot_eager", epsilon="keep")
        x, y = batch()
        function = compiled(lambda x, y: -torch.log(x.softmax(1).gather(1, y[:, None]) + 1e-8).mean(), backend=backend)
        with nanguard.stabilize(epsilon="drop") as swaps:
            torch.testing.assert_close(function(x, y), F.cross_entropy(x, y))
        assert len(swaps) == 1
        assert function(x, y) <= -math.log(1e-8)
        assert len(backend.swaps) == 1

    def test_takes_a_function(self):
        graphs = []

        def inner(module, inputs):
            graphs.append(module)
            return module

        x, y = batch()
        function = compiled(cross_entropy, backend=nanguard.compile_backend(inner, epsilon="drop"))
        torch.testing.assert_close(function(x, y), F.cross_entropy(x, y))
        assert len(graphs) == 1

    def test_refuses_other_arguments(self):
        with pytest.raises(ValueError, match="compile_backend: epsilon is 'none'; expected 'keep' or 'drop'"):
            nanguard.compile_backend(epsilon="none")
        with pytest.raises(TypeError, match="compile_backend: inner is 3"):
            nanguard.compile_backend(3)


class TestInductor:
    @pytest.mark.parametrize("how", ["block", "backend"])
    def test_cross_entropy(self, how):
        x, y = batch(8, 32)
        if how == "block":
            function = compiled(cross_entropy, backend="inductor")
            with nanguard.stabilize():
                loss = function(x, y)
        else:
            loss = compiled(cross_entropy, backend=nanguard.compile_backend())(x, y)
        expected = F.cross_entropy(x, y)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, x)[0], torch.autograd.grad(expected, x)[0])

    def test_many_forms_at_once(self):
        def run(x, y):
            e = x.exp()
            p = e / e.sum(1, keepdim=True)
            guarded = torch.log(torch.sigmoid(x) + 1e-12).sum()
            return torch.log(p.gather(1, y[:, None])).sum() + torch.log(e.mean()) + torch.log(1 + e).sum() + guarded

        x, y = batch(8, 32)
        with nanguard.stabilize() as swaps:
            loss = compiled(run, backend="inductor")(x, y)
        assert len(swaps) == 5
        z = x.detach().double().requires_grad_()
        expected = F.log_softmax(z, 1).gather(1, y[:, None]).sum() + torch.logsumexp(z.flatten(), 0) - math.log(256)
        expected = expected + F.softplus(z).sum() + torch.logaddexp(F.logsigmoid(z), z.new_tensor(1e-12).log()).sum()
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(
            torch.autograd.grad(loss, x)[0].double(), torch.autograd.grad(expected, z)[0], rtol=1e-4, atol=1e-5
        )

    def test_sizes_that_change(self):
        function = compiled(cross_entropy, backend="inductor", dynamic=True)
        for size in (4, 7):
            x, y = batch(size)
            with nanguard.stabilize():
                torch.testing.assert_close(function(x, y), F.cross_entropy(x, y))
        assert unique_graphs() == 1
