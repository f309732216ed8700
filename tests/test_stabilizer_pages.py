"""Large gradients lie on huge pages where the kernel has them, and are the same wherever they lie."""

import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import nanguard
from nanguard.stabilizer import pages
from nanguard.stabilizer.pages import LARGE, LARGEST, product

CLASSES = 8192
ROWS = LARGE // 4 // CLASSES

SHAPES = {
    "large": (ROWS, CLASSES),
    "not quite": (ROWS - 1, CLASSES),
    "small": (3, 5),
    "empty": (0, 5),
}
LAYOUTS = {
    "as computed": lambda tensor: tensor,
    "transposed": lambda tensor: tensor.t().contiguous().t(),
    "part of a larger one": lambda tensor: torch.cat([tensor, tensor], 1)[:, tensor.shape[1] :],
    "saved by a node": lambda tensor: torch.softmax(tensor.requires_grad_(), 1),
}


def flags(tensor):
    """What the kernel says about the memory in the middle of a tensor."""
    middle = tensor.data_ptr() + tensor.nbytes // 2
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        found = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if found:
            inside = int(found[1], 16) <= middle < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return None


def has_huge_pages():
    state = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return sys.platform == "linux" and state.exists() and "[never]" not in state.read_text()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_are_the_plain_product(shape, layout, dtype):
    with torch.enable_grad():
        tensor = LAYOUTS[layout](torch.randn(SHAPES[shape], dtype=dtype))
    factor = torch.randn(tensor.shape[0], 1, dtype=dtype)
    found, expected = product(tensor, factor), tensor * factor
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()
    assert not found.requires_grad
    assert found.untyped_storage().resizable()


def test_have_derivatives_of_their_own():
    tensor = torch.randn(ROWS, CLASSES, requires_grad=True)
    factor = torch.randn(ROWS, 1, requires_grad=True)
    slopes = torch.autograd.grad(product(tensor, factor).sum(), (tensor, factor))
    for found, expected in zip(slopes, torch.autograd.grad((tensor * factor).sum(), (tensor, factor)), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("by_hand", [False, True])
def test_in_a_backward_pass(by_hand):
    x = torch.randn(ROWS, CLASSES, requires_grad=True)
    target = torch.randint(0, CLASSES, (ROWS,))

    def loss():
        e = torch.exp(x)
        p = e / e.sum(1, keepdim=True) if by_hand else torch.softmax(x, 1)
        return -p[torch.arange(ROWS), target].log().mean()

    with nanguard.stabilize():
        value = loss()
    (gradient,) = torch.autograd.grad(value, x)
    (expected,) = torch.autograd.grad(F.cross_entropy(x, target), x)
    torch.testing.assert_close(gradient, expected)
    if has_huge_pages() and flags(gradient) is not None:
        assert "hg" in flags(gradient)


def test_very_large_results_lie_where_they_would():
    tensor, factor = torch.zeros(LARGEST // 4 // CLASSES + 1, CLASSES), torch.ones(1, 1)
    with torch.no_grad():
        assert "hg" not in (flags(product(tensor, factor)) or [])


def test_without_such_pages(monkeypatch):
    tensor, factor = torch.randn(ROWS, CLASSES), torch.randn(ROWS, 1)
    with torch.no_grad():
        expected = product(tensor, factor)
        monkeypatch.setattr(pages, "_madvise", lambda: None)
        assert torch.equal(product(tensor, factor), expected)
