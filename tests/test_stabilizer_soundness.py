"""Where `stabilize` must keep its hands off, and what must stay as it is where it does not."""

import copy
import gc
import inspect
import math
import pickle
import threading
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

import nanguard
from nanguard.stabilizer.knowledge import LARGEST_TERM


def logits(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (4, 4)), generator=generator, requires_grad=True)


def assert_untouched(run):
    """The same bits with and without the guard, in value and gradient, and no swap."""
    outcomes = []
    for guarded in (False, True):
        x = logits()
        if guarded:
            with nanguard.stabilize() as swaps:
                value = run(x)
            assert swaps == []
        else:
            value = run(x)
        gradient = torch.autograd.grad(value.sum(), x, allow_unused=True)[0] if value.requires_grad else None
        outcomes.append((value.detach(), gradient))
    (value, gradient), (guarded_value, guarded_gradient) = outcomes
    torch.testing.assert_close(guarded_value, value, rtol=0, atol=0, equal_nan=True)
    assert (gradient is None) == (guarded_gradient is None)
    if gradient is not None:
        torch.testing.assert_close(guarded_gradient, gradient, rtol=0, atol=0, equal_nan=True)


EDITS = {
    "p": lambda x, p: p.sub_(torch.full_like(p, 0.001)),
    "leaf": lambda x, p: x.mul_(2),
    "view": lambda x, p: p[0].fill_(0.5),
    "data": lambda x, p: p.data.mul_(2),
    "data of the leaf": lambda x, p: x.data.mul_(2),
    "view of data": lambda x, p: x.data[0].mul_(2),
    "detached": lambda x, p: p.detach().mul_(2),
    "numpy": lambda x, p: p.detach().numpy().fill(0.5),
    "storage": lambda x, p: p.untyped_storage().copy_(torch.rand(4, 4).untyped_storage()),
    "out": lambda x, p: torch.mul(p.data, 2, out=p.data),
    "setitem": lambda x, p: p.__setitem__(0, 0.5),
    "set data": lambda x, p: setattr(p, "data", torch.rand(4, 4)),
    "set data of the leaf": lambda x, p: setattr(x, "data", torch.rand(4, 4)),
    "foreach": lambda x, p: torch._foreach_add_([x.data, p.data], 1),
    "dispatcher": lambda x, p: torch.ops.aten.add_(p.data, 1),
    "augmented": lambda x, p: p.data.__iadd__(1),
    "copy": lambda x, p: p.data.copy_(x),
    "relu": lambda x, p: F.relu(p.data.sub_(0.2), inplace=True),
    "detach in place": lambda x, p: p.detach_(),
}


class TestEdits:
    @pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
    def test_end_what_is_known(self, edit):
        def run(x):
            x = x * 1
            p = torch.softmax(x, 1)
            with torch.no_grad():
                edit(x, p)
            return torch.log(p.detach())

        torch.manual_seed(0)
        with nanguard.stabilize() as swaps:
            run(logits())
        assert swaps == []

    def test_an_alias_that_was_taken_before(self):
        def run(x):
            x = x.detach()
            alias = x.data
            p = torch.softmax(x, 1)
            alias[1].mul_(2)
            return p.log()

        assert_untouched(run)

    def test_memory_that_was_handed_out_before(self):
        def run(x):
            x = x.detach().clone()
            array = x.numpy()
            p = torch.softmax(x, 1)
            array[0] = 3
            return p.log()

        assert_untouched(run)

    def test_of_an_index(self):
        def run(x):
            rows = torch.tensor([0, 1])
            q = torch.softmax(x.detach(), 1)[rows]
            rows += 1
            return q.log()

        assert_untouched(run)

    def test_to_a_leaf_of_its_own(self):
        assert_untouched(lambda x: torch.softmax(x.detach(), 1).requires_grad_().log())

    @pytest.mark.parametrize("which", ["leaf", "result", "index"])
    def test_that_no_function_mode_sees(self, which):
        """Compiled code, other threads and extensions edit without asking; the version counter tells."""

        def run(x):
            x, rows = x.detach().clone(), torch.tensor([0, 1])
            q = torch.softmax(x, 1)[rows]
            with torch._C.DisableTorchFunction():
                {"leaf": x, "result": q, "index": rows}[which].add_(1)
            return q.log()

        assert_untouched(run)

    def test_of_something_else_change_nothing(self):
        with nanguard.stabilize() as swaps:
            p = torch.softmax(logits(), 1)
            torch.zeros(3).add_(1)
            p.log()
        assert len(swaps) == 1


def seeded():
    torch.manual_seed(0)
    return True


TWINS = {
    "columns by the totals of rows": lambda x: x.exp() / x.exp().sum(1),
    "totals over another dim": lambda x: x.exp() / x.exp().sum(0, keepdim=True).T,
    "log of columns by the totals of rows": lambda x: torch.log(x.exp() / x.exp().sum(1)),
    "positives that are no exponentials": lambda x: x.abs() / x.abs().sum(1, keepdim=True),
    "log of positives": lambda x: torch.log(x.abs() + 1),
    "dropout": lambda x: torch.log(F.dropout(torch.softmax(x, 1), 0.5, seeded())),
    "masked with zero": lambda x: torch.log(torch.softmax(x, 1).masked_fill(torch.eye(4).bool(), 0)),
    "times an unknown tensor": lambda x: torch.log(
        torch.softmax(x, 1) * torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
    ),
    "renormalised by an unknown": lambda x: torch.log(torch.softmax(x, 1) / torch.full((4, 1), 2.0)),
    "together with an unknown": lambda x: torch.log(torch.cat([torch.softmax(x, 1), x.abs()])),
    "times zero": lambda x: torch.log(torch.softmax(x, 1) * 0),
    "times a bool": lambda x: torch.log(torch.softmax(x, 1) * True),
    "scaled addition": lambda x: torch.log(torch.add(torch.softmax(x, 1), 1e-8, alpha=2)),
    "floored division": lambda x: torch.log(torch.div(x.exp(), 0.1, rounding_mode="floor")),
    "clamped by a tensor": lambda x: torch.log(torch.softmax(x, 1).clamp(min=torch.tensor([0.1]))),
    "read as other bits": lambda x: torch.log(torch.softmax(x, 1).detach().view(torch.int32).view(torch.float32)),
    "rounded to integers": lambda x: torch.log(x.exp().detach().long().float()),
    "written elsewhere": lambda x: torch.log(torch.softmax(x.detach(), 1), out=torch.empty(4, 4)),
    "gumbel": lambda x: torch.log(F.gumbel_softmax(x * 0, tau=1e9) + 0),
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
    "attention by hand": lambda x: torch.softmax(x @ x.T, -1) @ x,
    "double softmax": lambda x: F.cross_entropy(torch.softmax(x, 1), torch.arange(4)),
    "log_softmax itself": lambda x: F.log_softmax(x, 1),
    "integers": lambda x: torch.log(torch.exp(torch.arange(3))),
    "complex": lambda x: torch.log(torch.exp(x.detach() * 1j)),
    "empty": lambda x: torch.log(x[:0].exp().sum(0)),
}


class TestTwins:
    """Code that looks like an instance of a rule, and is none."""

    @pytest.mark.parametrize("twin", TWINS.values(), ids=TWINS.keys())
    def test_stays_as_it_is(self, twin):
        def run(x):
            torch.manual_seed(0)
            return twin(x)

        assert_untouched(run)

    def test_a_detached_total_has_another_gradient(self):
        results = []
        for context in (nanguard.stabilize(), torch.enable_grad()):
            x = logits()
            with context:
                e = x.exp()
                value = torch.log(e / e.sum(1, keepdim=True).detach())
            results.append((value, torch.autograd.grad((value * value.detach()).sum(), x)[0]))
        torch.testing.assert_close(results[0], results[1])

    def test_the_implicit_dim_warns_as_ever(self):
        with nanguard.stabilize() as swaps, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            line = inspect.currentframe().f_lineno + 1
            torch.log(F.softmax(logits()))
            F.log_softmax(logits())
        assert swaps == []
        assert all("Implicit dimension choice" in str(entry.message) for entry in caught)
        assert [(entry.filename, entry.lineno) for entry in caught] == [(__file__, line), (__file__, line + 1)]


class TestDerivatives:
    @pytest.mark.parametrize(
        "watch",
        [lambda p: p.register_hook(lambda g: g), lambda p: p.retain_grad(), lambda p: p.grad_fn],
        ids=["hook", "retain_grad", "grad_fn"],
    )
    @pytest.mark.parametrize("intermediate", [False, True])
    def test_watching_an_intermediate_prevents_the_swap(self, watch, intermediate):
        def run(x):
            p = torch.softmax(x, 1)
            q = p[:, 0] * 2
            watch(p if intermediate else q)
            return torch.log(q)

        assert_untouched(run)

    def test_a_hook_on_the_logits_fires_once(self):
        x, calls = logits(), []
        z = x * 1
        z.register_hook(calls.append)
        with nanguard.stabilize() as swaps:
            loss = torch.softmax(z, 1).log().sum()
        loss.backward()
        assert len(swaps) == len(calls) == 1
        torch.testing.assert_close(calls[0], x.grad)

    @pytest.mark.parametrize("inside", [True, False])
    @pytest.mark.parametrize("scale", [1.0, 1 / math.log(2), 1 / math.log(10)])
    def test_at_the_intermediate(self, inside, scale):
        log = {1.0: torch.log, 1 / math.log(2): torch.log2}.get(scale, torch.log10)
        x = logits()
        with nanguard.stabilize() as swaps:
            p = torch.softmax(x, 1)
            loss = log(p).sum()
            if inside:
                (gradient,) = torch.autograd.grad(loss, p, retain_graph=True)
        if not inside:
            (gradient,) = torch.autograd.grad(loss, p, retain_graph=True)
        assert len(swaps) == 1
        torch.testing.assert_close(gradient, scale / p.detach())

    def test_at_an_earlier_intermediate_and_of_higher_order(self):
        x = logits()
        with nanguard.stabilize():
            e = x.exp()
            loss = torch.log(e / e.sum(1, keepdim=True))[:, 0].sum()
        (gradient,) = torch.autograd.grad(loss, e, create_graph=True)
        e2 = e.detach().requires_grad_()
        expected = torch.autograd.grad(torch.log(e2 / e2.sum(1, keepdim=True))[:, 0].sum(), e2)[0]
        torch.testing.assert_close(gradient, expected)
        assert torch.autograd.grad(gradient.sum(), e)[0].isfinite().all()

    def test_double_backward(self):
        x = logits().detach().double().requires_grad_()
        with nanguard.stabilize() as swaps:
            assert torch.autograd.gradcheck(lambda x: torch.log(torch.softmax(x, 1) + 1e-3), x)
            assert torch.autograd.gradgradcheck(lambda x: torch.log(torch.softmax(x, 1) + 1e-3), x)
            assert torch.autograd.gradgradcheck(lambda x: torch.log(1 + x.exp().sum(1)), x)
        assert swaps

    def test_twice(self):
        x = logits()
        with nanguard.stabilize():
            loss = torch.softmax(x, 1).log().sum()
        first = torch.autograd.grad(loss, x, retain_graph=True)[0]
        assert torch.equal(first, torch.autograd.grad(loss, x)[0])

    def test_none_where_the_original_has_none(self):
        x = logits()
        with nanguard.stabilize() as swaps:
            with torch.no_grad():
                inside = torch.softmax(x, 1).log()
                p = torch.softmax(x, 1)
            q = torch.softmax(x, 1)
            values = [inside, p.log(), q.detach().log()]
            with torch.no_grad():
                values.append(q.log())
        assert sum(swap.count for swap in swaps) == 4
        assert not any(value.requires_grad for value in values)

    def test_a_detached_factor_stays_detached(self):
        x, z = logits(), logits(seed=1)
        with nanguard.stabilize() as swaps:
            ratio = torch.log(torch.softmax(x, 1) / torch.softmax(z, 1).detach())
        assert [swap.rule for swap in swaps] == ["NG203", "NG108"]
        assert torch.autograd.grad(ratio.sum(), z, allow_unused=True, retain_graph=True) == (None,)
        assert torch.autograd.grad(ratio[:, 0].sum(), x)[0].abs().sum() > 0


EDITABLE = {
    "exp": lambda x: x.exp().log(),
    "picked exp": lambda x: x.exp()[:, 0].log(),
    "softmax": lambda x: torch.softmax(x, 1).log(),
    "transposed": lambda x: torch.softmax(x, 1).T.log(),
    "made contiguous": lambda x: torch.softmax(x, 1).T.contiguous().log2(),
    "sigmoid": lambda x: x.sigmoid().log(),
    "total": lambda x: x.exp().sum(1).log(),
    "expanded total": lambda x: x.exp().sum(1, keepdim=True).expand(4, 4).log(),
    "epsilon": lambda x: (torch.softmax(x, 1) + 1e-6).log(),
    "clamped": lambda x: x.exp().clamp(0.1, 5).log(),
    "quotient": lambda x: x.exp() / x.exp().sum(1, keepdim=True),
    "sigmoid by hand": lambda x: 1 / (1 + (-x).exp()),
    "flat": lambda x: torch.softmax(x, 1).view(-1).log(),
    "picked": lambda x: torch.softmax(x, 1)[torch.arange(4), torch.zeros(4, dtype=torch.long)].log(),
    "every other": lambda x: torch.softmax(x, 1)[::2].log(),
    "softplus": lambda x: (1 + x.exp()).log(),
    "sum of two": lambda x: (x.exp() + x.softmax(0)).log(),
    "channels last": lambda x: torch.softmax(x.view(1, 2, 2, 4).to(memory_format=torch.channels_last), 1).log(),
}


class TestResults:
    @pytest.mark.parametrize("make", EDITABLE.values(), ids=EDITABLE.keys())
    @pytest.mark.parametrize("grad", [True, False])
    def test_are_tensors_like_the_originals(self, make, grad):
        with torch.set_grad_enabled(grad):
            original = make(logits())
            with nanguard.stabilize() as swaps:
                result = make(logits())
        assert len(swaps) == 1
        assert type(result) is torch.Tensor
        assert result.stride() == original.stride()
        assert (result.dtype, result.device, result.requires_grad) == (
            original.dtype,
            original.device,
            original.requires_grad,
        )
        torch.testing.assert_close(result, original)

    @pytest.mark.parametrize("make", EDITABLE.values(), ids=EDITABLE.keys())
    def test_may_be_edited_in_place(self, make):
        gradients = []
        for context in (nanguard.stabilize(), torch.enable_grad()):
            x = logits()
            with context:
                result = make(x * 1)
                if make is not EDITABLE["quotient"]:
                    result.mul_(3)
                result[:1] = 0
            result.sum().backward()
            gradients.append(x.grad)
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("make", EDITABLE.values(), ids=EDITABLE.keys())
    def test_the_logits_may_be_edited_afterwards(self, make):
        x = logits()
        z = x * 1
        with nanguard.stabilize():
            result = make(z)
        before = result.detach().clone()
        with torch.no_grad():
            z.mul_(5)
        assert torch.equal(result, before)
        result.sum().backward()
        assert x.grad.isfinite().all()

    def test_in_place_logarithm_and_exponential(self):
        x = (logits() * 300).detach().requires_grad_()
        with nanguard.stabilize() as swaps:
            z = x * 1
            z.exp_()
            total = z.sum(1)
            result = total.log_()
        assert result is total
        assert [swap.rule for swap in swaps] == ["NG103"]
        torch.testing.assert_close(result, torch.logsumexp(x, 1))
        torch.testing.assert_close(
            torch.autograd.grad(result.sum(), x)[0], torch.autograd.grad(torch.logsumexp(x, 1).sum(), x)[0]
        )

    def test_probabilities_stay_ordinary_tensors(self):
        with nanguard.stabilize():
            p = torch.softmax(logits().detach(), 1)
            assert type(p) is torch.Tensor
            assert vars(p) == {}
            assert torch.equal(pickle.loads(pickle.dumps(p)), p)
            assert torch.equal(copy.deepcopy(p), p)


INF = math.inf
MASKED = torch.tensor([[0.0, -INF, 3.0], [-INF, -INF, 200.0], [-INF, -INF, -INF], [500.0, -500.0, 0.0]])
SAFE = {
    "entropy": lambda x: x[[0, 1, 3]].softmax(1) * torch.log(x[[0, 1, 3]].softmax(1) + 1e-8),
    "clamped entropy": lambda x: x[[0, 1, 3]].softmax(1) * torch.log(x[[0, 1, 3]].softmax(1).clamp_min(1e-8)),
    "total plus epsilon": lambda x: torch.log(x.clamp(max=80).exp().sum(1) + 1e-8),
    "clamped total": lambda x: torch.log(x.clamp(max=80).exp().sum(1).clamp(min=1e-8)),
    "mean plus epsilon": lambda x: torch.log(x.clamp(max=80).exp().mean(1) + 1e-8),
    "share plus epsilon": lambda x: torch.log(
        x.clamp(max=80).exp() / (x.clamp(max=80).exp().sum(1, keepdim=True) + 1e-8) + 1e-8
    ),
    "two exponentials": lambda x: torch.log(x.clamp(max=80).exp() + (2 * x.clamp(max=40)).exp() + 1e-8),
    "softplus": lambda x: torch.log(1 + x.clamp(max=80).exp()),
    "powers": lambda x: torch.log(x.softmax(1)[:2] ** 2 + 1e-8),
    "sigmoid": lambda x: torch.log(x.sigmoid() + 1e-8),
    "sigmoid by hand": lambda x: 1 / (1 + (-x.clamp(min=-80)).exp()),
}


class TestInfinities:
    @pytest.mark.parametrize("epsilon", ["keep", "drop"])
    @pytest.mark.parametrize("loss", SAFE.values(), ids=SAFE.keys())
    def test_no_nan_where_the_original_has_none(self, loss, epsilon):
        outcomes = []
        for context in (torch.enable_grad(), nanguard.stabilize(epsilon=epsilon)):
            x = MASKED.clone().requires_grad_()
            with context as swaps:
                value = loss(x)
            (gradient,) = torch.autograd.grad(value.sum(), x)
            outcomes.append((value, gradient))
        assert swaps
        (value, gradient), (guarded_value, guarded_gradient) = outcomes
        assert not (guarded_value.isnan() & ~value.isnan()).any()
        assert not (guarded_gradient.isnan() & ~gradient.isnan()).any()

    def test_masked_branch(self):
        x = torch.tensor([[0.0, -INF, 200.0]], requires_grad=True)
        with nanguard.stabilize():
            p = torch.softmax(x, 1)
            value = torch.where(p > 0, torch.log(p), torch.zeros(()))
        assert value.isfinite().all()
        assert torch.autograd.grad(value.sum(), x)[0].isfinite().all()

    def test_true_infinities_stay(self):
        x = torch.tensor([[-INF, 0.0], [-INF, -INF]])
        with nanguard.stabilize() as swaps:
            assert torch.log(x.exp().sum(1)).tolist() == [0.0, -INF]
            assert torch.log(torch.softmax(x[:1], 1)).tolist() == [[-INF, 0.0]]
            assert torch.log(x.exp()).tolist() == x.tolist()
            assert torch.log(torch.tensor([INF]).exp()).tolist() == [INF]
        assert len(swaps) == 4

    def test_a_dead_row_has_no_nan_gradient(self):
        x = torch.full((2, 3), -INF, requires_grad=True)
        with nanguard.stabilize():
            total = torch.log(x.exp().sum(1))
        assert torch.autograd.grad(total.sum(), x)[0].tolist() == [[0.0] * 3] * 2


def loss_of(x):
    return torch.log(torch.softmax(x, 1)[:, 0]).sum()


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(lambda row: f(row[None])))(x),
    "grad of vmap": lambda f, x: torch.func.grad(lambda x: torch.func.vmap(lambda row: f(row[None]))(x).sum())(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x).sum(),
}


FUNCTIONS = {
    "plain": loss_of,
    "detached": lambda x: (torch.log(torch.softmax(x, 1).detach()) * x).sum(),
    "partly detached": lambda x: (torch.log(x.exp() / x.exp().sum(1, keepdim=True).detach()) * x).sum(),
}


class TestSurroundings:
    @pytest.mark.parametrize("reentrant", [True, False])
    @pytest.mark.parametrize("where", ["forward", "backward", "both"])
    def test_checkpoints_are_recomputed_as_they_were_run(self, reentrant, where):
        expected = logits()
        checkpoint(loss_of, expected, use_reentrant=reentrant).backward()
        x, guard = logits(), nanguard.stabilize()
        if where == "backward":
            loss = checkpoint(loss_of, x, use_reentrant=reentrant)
            with guard as swaps:
                loss.backward()
        else:
            with guard as swaps:
                loss = checkpoint(loss_of, x, use_reentrant=reentrant)
                if where == "both":
                    loss.backward()
            if where == "forward":
                loss.backward()
        assert [swap.count for swap in swaps] == ([] if where == "backward" else [1])
        torch.testing.assert_close(x.grad, expected.grad)

    def test_checkpoints_under_other_hooks(self):
        def offloaded(x):
            with torch.autograd.graph.save_on_cpu():
                return loss_of(x)

        expected, x = logits(), logits()
        loss_of(expected).backward()
        with nanguard.stabilize() as swaps:
            loss = checkpoint(offloaded, x, use_reentrant=False)
        loss.backward()
        assert len(swaps) == 1
        torch.testing.assert_close(x.grad, expected.grad)
        with nanguard.stabilize() as swaps:
            offloaded(x)
        assert len(swaps) == 1

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_compiled_functions_work_inside_and_outside(self, backend):
        compiled = torch.compile(loss_of, backend=backend, fullgraph=True)
        before = compiled(logits())
        with nanguard.stabilize():
            inside = [compiled(logits()) for _ in range(3)]
        after = compiled(logits())
        assert torch.equal(before, after)
        for value in inside:
            torch.testing.assert_close(value, before)

    def test_compiled_functions_are_not_compiled_for_every_block(self):
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph

        compiled = torch.compile(lambda x: (x.exp() + 1).sum(), backend=backend, fullgraph=True)
        for _ in range(12):
            compiled(logits())
            with nanguard.stabilize():
                compiled(logits())
        assert len(graphs) <= 2

    def test_traced_graphs_are_the_original(self):
        from torch.fx.experimental.proxy_tensor import make_fx

        def names(traced):
            return [node.target for node in traced.graph.nodes]

        plain = make_fx(loss_of)(logits().detach())
        with nanguard.stabilize() as swaps:
            guarded = make_fx(loss_of)(logits().detach())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.jit.trace(loss_of, logits().detach(), check_trace=False)
        assert swaps == []
        assert names(guarded) == names(plain)

    @pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
    @pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
    def test_transforms(self, transform, function):
        x = logits().detach()
        expected = transform(function, x)
        with nanguard.stabilize():
            result = transform(function, x)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)

    def test_transforms_are_stabilised(self):
        x = torch.tensor([[1000.0, 1, -1000]])
        with nanguard.stabilize() as swaps:
            gradient = torch.func.grad(lambda x: torch.log(torch.softmax(x, 1))[0, 2])(x)
        assert swaps
        assert gradient.tolist() == [[-1.0, 0.0, 1.0]]

    def test_forward_mode(self):
        from torch.autograd import forward_ad

        with forward_ad.dual_level(), nanguard.stabilize() as swaps:
            x = forward_ad.make_dual(logits().detach(), torch.eye(4))
            tangent = forward_ad.unpack_dual(torch.log(torch.softmax(x, 1))).tangent
        assert swaps
        torch.testing.assert_close(tangent, torch.eye(4) - torch.softmax(logits().detach(), 1).diagonal()[:, None])

    def test_inference_mode(self):
        x = logits()
        with nanguard.stabilize() as swaps, torch.inference_mode():
            torch.log(torch.softmax(x, 1)[0])
            torch.log(torch.softmax(torch.ones(2, 2), 1))
        assert swaps == []

    def test_other_threads(self):
        found = []

        def work():
            found.append(
                (len(_get_current_function_mode_stack()), torch.log(torch.softmax(torch.tensor([0.0, 200]), 0)))
            )

        with nanguard.stabilize() as swaps:
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        assert swaps == []
        assert found[0][0] == 0
        assert found[0][1][0] == -INF

    def test_nothing_is_kept_alive(self):
        x = logits()
        with nanguard.stabilize() as swaps:
            z = x * 2
            p = torch.softmax(z, 1)
            q = p[:, 0]
            value = torch.log(q).detach()
            references = [weakref.ref(tensor) for tensor in (z, p, q)]
            del z, p, q
        assert swaps
        gc.collect()
        assert [reference() for reference in references] == [None] * 3
        assert value.isfinite().all()

    def test_nothing_is_kept_alive_inside_either(self):
        with nanguard.stabilize():
            z = logits() * 2
            p = torch.softmax(z, 1)
            torch.log(p)
            references = [weakref.ref(z), weakref.ref(p)]
            del z, p
            gc.collect()
            assert [reference() for reference in references] == [None] * 2

    def test_a_moving_average_does_not_collect_its_history(self):
        references = []
        with nanguard.stabilize():
            average = torch.softmax(torch.zeros(4), 0)
            for step in range(2 * LARGEST_TERM):
                z = logits(seed=step).detach() * 1
                references.append(weakref.ref(z))
                average = 0.9 * average + 0.1 * torch.softmax(z, 1).mean(0)
            del z
            gc.collect()
            assert sum(reference() is not None for reference in references) < LARGEST_TERM


class TestContext:
    def test_is_reentrant_and_reusable(self):
        guard = nanguard.stabilize()
        with guard as outer:
            with guard as inner:
                torch.softmax(logits(), 1).log()
            assert len(_get_current_function_mode_stack()) == 1
            torch.sigmoid(logits()).log()
        with guard as again:
            pass
        assert _get_current_function_mode_stack() == []
        assert [swap.rule for swap in inner] == ["NG101"]
        assert [swap.rule for swap in outer] == ["NG104"]
        assert again == []

    def test_exceptions_pass(self):
        class Other(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                return func(*args, **(kwargs or {}))

        with Other() as other:
            with pytest.raises(ZeroDivisionError), nanguard.stabilize():
                1 / 0
            assert _get_current_function_mode_stack() == [other]

    def test_decorates_functions_and_methods(self):
        class Loss:
            @nanguard.stabilize()
            def __call__(self, x):
                """Doc."""
                return torch.log(torch.softmax(x, 0))

        assert Loss()(torch.tensor([0.0, 200])).tolist() == [-200, 0]
        assert Loss.__call__.__doc__ == "Doc."
        assert _get_current_function_mode_stack() == []

    def test_fills_a_list_that_is_handed_in(self):
        swaps = []
        guard = nanguard.stabilize(swaps=swaps)
        for _ in range(3):
            with guard as filled:
                torch.log(torch.softmax(logits(), 1))
            assert filled is swaps
        assert [(swap.rule, swap.count) for swap in swaps] == [("NG101", 3)]

    def test_is_picklable(self):
        with nanguard.stabilize("drop", swaps=[]) as swaps:
            torch.log(torch.softmax(logits(), 1))
        guard, copied = pickle.loads(pickle.dumps((nanguard.stabilize("drop", swaps=swaps), swaps)))
        with guard as filled:
            pass
        assert filled is copied
        assert filled == swaps

    def test_refuses_functions_whose_body_runs_elsewhere(self):
        async def coroutine():
            pass

        def generator():
            yield

        for function in (coroutine, generator):
            with pytest.raises(
                TypeError, match="coroutine or generator function, whose body would run outside the block"
            ):
                nanguard.stabilize()(function)
        with pytest.raises(TypeError, match="Linear is a class, whose methods would run outside the block"):
            nanguard.stabilize()(torch.nn.Linear)
        with pytest.raises(TypeError, match="3 is not callable"):
            nanguard.stabilize()(3)


def test_edits_of_parameters_without_memory():
    """Those of lazy modules, beside something known."""
    layer = torch.nn.LazyLinear(3)
    x = torch.randn(4, 3) * 100
    with nanguard.stabilize() as swaps:
        p = torch.softmax(x, 1)
        layer(torch.ones(2, 5)).sum().backward()
        value = p.log()
    assert swaps
    torch.testing.assert_close(value, x.log_softmax(1))
