"""The list of swaps: where, what stood there, what to write instead."""

import re
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F

import nanguard

ROWS = torch.arange(3)


def batch():
    return torch.tensor([[2, 1, 0.1], [1000, 1, -1000], [3, 2, 1]], requires_grad=True), torch.tensor([0, 2, 1])


def lines_of_this_file():
    with open(__file__) as file:
        return file.read().splitlines()


def test_one_entry_for_each_place_with_a_count():
    x, y = batch()
    with nanguard.stabilize() as swaps:
        for _ in range(3):
            torch.log(torch.softmax(x, 1)[ROWS, y])
        torch.log(torch.softmax(x, 1)[ROWS, y])
    assert [swap.count for swap in swaps] == [3, 1]
    for swap in swaps:
        assert swap.file == __file__
        assert swap.original in lines_of_this_file()[swap.line - 1]


def test_the_list_fills_while_the_block_runs():
    x, _ = batch()
    with nanguard.stabilize() as swaps:
        assert swaps == []
        torch.log(torch.softmax(x, 1))
        assert len(swaps) == 1


def test_the_expression_is_that_of_the_call():
    x, y = batch()
    with nanguard.stabilize() as swaps:
        p = torch.softmax(x, 1)
        loss = -(3 * torch.log(p[ROWS, y])).mean()
    assert loss.isfinite()
    whole = "loss = -(3 * torch.log(p[ROWS, y])).mean()"
    assert swaps[0].original == ("torch.log(p[ROWS, y])" if sys.version_info >= (3, 11) else whole)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="columns of calls came with Python 3.11")
def test_an_expression_of_several_lines_with_umlauts():
    x, _ = batch()
    with nanguard.stabilize() as swaps:
        größe = torch.softmax(x, 1)
        # fmt: off
        "ß", torch.log(
            größe
        )
        # fmt: on
    assert swaps[0].original == "torch.log( größe )"


REPLACEMENTS = {
    "F.log_softmax(x, dim=1)": lambda x, y: torch.log(torch.softmax(x, 1)),
    '-F.cross_entropy(x, y, reduction="none")': lambda x, y: torch.log(torch.softmax(x, -1)[ROWS, y]),
    '-F.cross_entropy(x, y, reduction="none").unsqueeze(1)': lambda x, y: (
        torch.softmax(x, 1).gather(1, y[:, None]).log()
    ),
    "F.log_softmax(x, dim=1)[:, 0]": lambda x, y: torch.softmax(x, 1)[:, 0].log(),
    "F.log_softmax(x, dim=0)[index, y]": lambda x, y: torch.softmax(x, 0)[torch.tensor([0, 1, 2]), y].log(),
    "F.log_softmax(x, dim=1)[y, index]": lambda x, y: torch.softmax(x, 1)[y, torch.tensor([0, 1, 2])].log(),
    "torch.logsumexp(x, dim=(1,), keepdim=False)": lambda x, y: x.exp().sum(1).log(),
    "torch.logsumexp(F.log_softmax(x, dim=1), dim=(0,), keepdim=False) - math.log(3)": lambda x, y: torch.log(
        torch.softmax(x, 1).mean(0)
    ),
    "torch.logaddexp(F.log_softmax(x, dim=1), torch.tensor(1e-08).log())": lambda x, y: torch.log(x.softmax(1) + 1e-8),
    "F.log_softmax(x, dim=1).clamp(min=math.log(1e-08))": lambda x, y: torch.log(x.softmax(1).clamp(1e-8)),
    "F.log_softmax(x, dim=1) - F.log_softmax(x, dim=0)": lambda x, y: torch.log(x.softmax(1) / x.softmax(0)),
    "2.0 * (F.log_softmax(x, dim=1) + F.logsigmoid(x))": lambda x, y: torch.log((x.softmax(1) * x.sigmoid()) ** 2),
    "(F.log_softmax(x, dim=1) + F.logsigmoid(x))[0]": lambda x, y: torch.log((x.softmax(1) * x.sigmoid())[0]),
    "torch.cat([F.log_softmax(x, dim=1), F.logsigmoid(x)], dim=0)": lambda x, y: torch.cat(
        [x.softmax(1), x.sigmoid()]
    ).log(),
    "torch.stack([F.log_softmax(x, dim=1), F.logsigmoid(x)], dim=1)": lambda x, y: torch.stack(
        (x.softmax(1), x.sigmoid()), 1
    ).log(),
    "F.logsigmoid(x)": lambda x, y: x.sigmoid().log(),
    "torch.logaddexp(x, torch.tensor(1.0).log())": lambda x, y: torch.log(1 + x.exp()),
    "x": lambda x, y: x.exp().log(),
}


@pytest.mark.parametrize(("text", "code"), REPLACEMENTS.items(), ids=REPLACEMENTS.keys())
def test_the_replacement_names_the_users_tensors(text, code):
    x, y = batch()
    with nanguard.stabilize() as swaps:
        result = code(x, y)
    assert [swap.replacement for swap in swaps if swap.rule.startswith("NG1")] == [text]
    space = {"x": x, "y": y, "index": ROWS, "math": __import__("math"), "torch": torch, "F": F}
    torch.testing.assert_close(eval(text, space), result)


def test_a_total_from_a_loop_is_written_as_the_rule_says():
    x, _ = batch()
    with nanguard.stabilize() as swaps:
        total = x.exp().sum()
        for _ in range(50):
            total = total + x.exp().sum()
        value = total.log()
    assert [(swap.rule, swap.replacement) for swap in swaps] == [("NG103", "torch.logsumexp(logits, dim=1)")]
    assert value.item() == pytest.approx(1000 + torch.tensor(51.0).log().item())


def test_tensors_without_a_name_get_the_usual_ones():
    with nanguard.stabilize() as swaps:
        torch.log(torch.softmax(batch()[0] * 1, 1)[ROWS, batch()[1]])
    assert swaps[0].replacement == '-F.cross_entropy(logits, target, reduction="none")'


UNNAMED = {
    "F.logsigmoid(-logits)": lambda one, two: torch.log(1 - torch.sigmoid(one(X))),
    "F.logsigmoid(logits)": lambda one, two: torch.log(1 / (1 + torch.exp(-one(X)))),
    "torch.exp(0.5 * F.logsigmoid(-logits))": lambda one, two: (1 - torch.sigmoid(one(X))) ** 0.5,
    "torch.logaddexp(h, -h)": lambda one, two: _both_signs(one(X)),
    "torch.logaddexp(h, 2 * h)": lambda one, two: _and_doubled(one(X)),
    "F.log_softmax(logits, dim=1) - F.log_softmax(logits_2, dim=1)": lambda one, two: torch.log(
        one(X).softmax(1) / two(X).softmax(1)
    ),
    "torch.logaddexp(logits, logits_2)": lambda one, two: torch.log(one(X).exp() + two(X).exp()),
    "F.logsigmoid(-logits) + F.logsigmoid(logits_2)": lambda one, two: torch.log(
        (1 - one(X).sigmoid()) * two(X).sigmoid()
    ),
    "F.log_softmax(logits, dim=1)": lambda one, two: _of_the_transposed(one(X)),
}
X = torch.linspace(-2, 2, 12).view(3, 4)


def _both_signs(h):
    return torch.log(torch.exp(h) + torch.exp(-h))


def _and_doubled(h):
    return torch.log(torch.exp(h) + torch.exp(2 * h))


def _of_the_transposed(h):
    return torch.log(torch.softmax(h.T, 1))


@pytest.mark.parametrize(("text", "code"), UNNAMED.items(), ids=UNNAMED.keys())
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_each_tensor_without_a_name_has_one_name_and_keeps_its_sign(text, code, compiled):
    torch.manual_seed(0)
    one, two = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    run = torch.compile(code, backend="eager") if compiled else code
    with nanguard.stabilize() as swaps:
        result = run(one, two)
    # A name inside of a function that was inlined is not known to compiled code.
    assert swaps[-1].replacement in ([text, re.sub(r"\bh\b", "logits", text)] if compiled else [text])
    space = {"logits": one(X), "logits_2": two(X), "h": one(X), "torch": torch, "F": F}
    if "transposed" in code.__code__.co_names[0]:
        space["logits"] = one(X).T
    torch.testing.assert_close(eval(text, space), result)


def test_an_index_that_does_not_count_up_is_no_cross_entropy():
    x, y = batch()
    with nanguard.stabilize() as swaps:
        torch.log(torch.softmax(x, 1)[ROWS.flip(0), y])
    assert "cross_entropy" not in swaps[0].replacement


def test_names_are_looked_up_without_keeping_tensors_alive():
    import gc
    import weakref

    with nanguard.stabilize() as swaps:
        x = batch()[0] * 1
        torch.log(torch.softmax(x, 1))
        reference = weakref.ref(x)
        del x
        gc.collect()
        assert reference() is None
    assert swaps[0].replacement == "F.log_softmax(x, dim=1)"


def test_a_library_is_not_the_users_code():
    """The deepest frame of the user's own code is named, not the library that took the logarithm."""
    distribution = torch.distributions.Geometric(logits=torch.zeros(2))
    with nanguard.stabilize() as swaps:
        torch.distributions.Categorical(logits=torch.zeros(3)).entropy()
        torch.distributions.kl_divergence(distribution, distribution)
        torch.nn.Sequential(torch.nn.Softmax(1), Log())(torch.zeros(1, 2))
    assert [swap.file for swap in swaps] == [__file__] * len(swaps)
    assert swaps[-1].line == Log.forward.__code__.co_firstlineno + 1


class Log(torch.nn.Module):
    def forward(self, p):
        return torch.log(p)


def test_a_helper_is_told_what_to_write_for_whatever_it_is_called_with():
    def safe_log(p):
        return p.log()

    x, z = torch.randn(3, 4), torch.randn(3, 4)
    texts = []
    for probability in (lambda: x.softmax(1), lambda: z.softmax(0), lambda: z.softmax(1)[:, 0], lambda: x.softmax(1)):
        with nanguard.stabilize() as swaps:
            safe_log(probability())
        texts.append(swaps[0].replacement)
    assert texts == [
        "F.log_softmax(x, dim=1)",
        "F.log_softmax(z, dim=0)",
        "F.log_softmax(z, dim=1)[:, 0]",
        "F.log_softmax(x, dim=1)",
    ]


def test_a_transposed_number_is_the_number():
    x = torch.randn(3)
    with nanguard.stabilize(), warnings.catch_warnings(action="ignore"):
        assert torch.equal(x.softmax(0).max().mT, x.softmax(0).max())
