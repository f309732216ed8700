"""Exact functions that references are made of: in float64 they keep their digits, in value and gradient, everywhere."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "cross_entropy",
    "entropy",
    "log1mexp",
    "log_add",
    "log_others",
    "log_sub",
    "lsm",
    "nll",
    "picked",
    "shannon",
]


def lsm(x: Tensor, dim: int = -1) -> Tensor:
    """The logarithm of a softmax."""
    return torch.log_softmax(x, dim)


def picked(x: Tensor, y: Tensor) -> Tensor:
    """The log-probability of each sample's target."""
    return lsm(x).gather(1, y[:, None])[:, 0]


def nll(x: Tensor, y: Tensor) -> Tensor:
    """The cross-entropy of each sample."""
    return F.cross_entropy(x, y, reduction="none")


def cross_entropy(x: Tensor, y: Tensor) -> Tensor:
    """The mean cross-entropy."""
    return F.cross_entropy(x, y)


def log1mexp(a: Tensor) -> Tensor:
    """log(1 - exp(a)) for a below 0; each branch is kept away from what would spoil the other's gradient."""
    near = a > -math.log(2)
    close = torch.where(near, a, -1.0)
    far = torch.where(near, -1.0, a)
    return torch.where(near, torch.log(-torch.expm1(close)), torch.log1p(-torch.exp(far)))


def log_add(a: Tensor, b: Tensor | float) -> Tensor:
    """log(exp(a) + exp(b)), where b may be the logarithm of a number, and of 0."""
    b = torch.as_tensor(b, dtype=a.dtype)
    return torch.logsumexp(torch.stack(torch.broadcast_tensors(a, b)), 0)


def log_sub(a: Tensor, b: Tensor) -> Tensor:
    """log(exp(a) - exp(b)) for a above b."""
    return a + log1mexp(b - a)


def log_others(x: Tensor, dim: int = -1) -> Tensor:
    """log(1 - softmax): the share of all the others."""
    x = x.movedim(dim, -1)
    size = x.shape[-1]
    rest = x.unsqueeze(-2).expand(*x.shape[:-1], size, size)
    rest = rest.masked_fill(torch.eye(size, dtype=torch.bool), -math.inf)
    return (torch.logsumexp(rest, -1) - torch.logsumexp(x, -1, keepdim=True)).movedim(-1, dim)


def entropy(log_p: Tensor) -> Tensor:
    """P log p, which is 0 with gradient 0 where p is 0."""
    dead = log_p == -math.inf
    return torch.where(dead, 0.0, log_p.exp() * torch.where(dead, 0.0, log_p))


def shannon(x: Tensor, dim: int = -1) -> Tensor:
    """The entropy of a softmax."""
    return -entropy(lsm(x, dim)).sum(dim)


def eps_log(a: Tensor, eps: float) -> Tensor:
    """log(exp(a) + eps)."""
    return log_add(a, math.log(eps) if eps else -math.inf)


def floor_log(a: Tensor, low: float, high: float = math.inf) -> Tensor:
    """log(clamp(exp(a), low, high))."""
    return a.clamp(math.log(low) if low else -math.inf, math.log(high) if high < math.inf else None)
