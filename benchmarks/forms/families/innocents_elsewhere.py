"""Innocents: logs of variances, spectra and determinants, objects with a `log` of their own."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from forms.inputs import classes, free, randn
from forms.registry import Family

ONE = classes("mild extreme", target=False)
SQUARE = free(lambda: (randn(4, 4),), lambda: (randn(4, 4) * 60,))
family = Family("logs of other things", ONE)

LOGS = {
    "variance": lambda x: torch.log(x.var(1) + 1e-5),
    "deviation": lambda x: torch.log(x.std(1)),
    "log_variance": lambda x: 0.5 * (torch.log(x.pow(2).mean(1) + 1e-6) + 1),
    "softplus_deviation": lambda x: torch.log(F.softplus(x) + 1e-3),
    "absolute_value": lambda x: torch.log(x.abs() + 1),
    "norm": lambda x: torch.log(x.norm(dim=1)),
    "mean_squared_error": lambda x: torch.log(F.mse_loss(x, torch.zeros_like(x))),
    "peak_signal_to_noise": lambda x: 10 * torch.log10(255**2 / (x**2).mean()),
    "mel_spectrogram": lambda x: torch.log(torch.clamp(torch.fft.rfft(x).abs() @ torch.ones(3, 2), min=1e-5)),
    "log_spectral_distance": lambda x: (torch.log(torch.fft.rfft(x).abs().pow(2) + 1e-9)).mean(),
    "root_mean_squared_log": lambda x: (torch.log1p(x.abs()) - 1).pow(2).mean().sqrt(),
    "log1p_of_counts": lambda x: torch.log1p(x.clamp(min=0)),
    "symmetric_log": lambda x: torch.sign(x) * torch.log(x.abs() + 1),
    "depth": lambda x: (torch.log(x.abs() + 1e-3) - torch.log(x.flip(1).abs() + 1e-3)).var(),
    "gamma": lambda x: torch.lgamma(x.abs() + 1),
    "cosine_distance": lambda x: -torch.log((1 + F.cosine_similarity(x, x.flip(0))) / 2 + 1e-4),
    "student_t": lambda x: 1.5 * torch.log(1 + x**2 / 2),
    "cauchy": lambda x: torch.log(1 + (x / 3) ** 2),
    "geman": lambda x: torch.log(x**2 + 1) / (x**2 + 1),
    "intersection_over_union": lambda x: -torch.log(((x.clamp(0, 1)).sum(1) + 1) / (x.abs().sum(1) + 2)),
    "frequencies": lambda x: x * torch.exp(torch.arange(5) * -(math.log(10000.0) / 5)),
    "learning_rate": lambda x: x * math.log(1 + math.exp(0.3)),
    "power": lambda x: torch.log(x.abs().pow(1.3).sum(1) + 1),
    "ratio_of_positives": lambda x: torch.log((x.abs() + 1) / (x.flip(1).abs() + 1)),
    "cumulative_positives": lambda x: torch.log((x.abs() + 1).cumsum(1)),
    "bessel": lambda x: torch.log(torch.special.i0e(x)),
    "error_function": lambda x: torch.log(0.5 * (1 + torch.erf(x / 2)) + 1e-3),
    "normal_cdf": lambda x: torch.special.log_ndtr(x),
    "arctangent": lambda x: torch.log(torch.atan(x) + 2),
    "softsign": lambda x: torch.log(F.softsign(x) + 2),
    "xlogy_of_constants": lambda x: torch.xlogy(torch.ones(5), torch.arange(1.0, 6)) + x,
    "perplexity_of_a_loss": lambda x: torch.exp(F.cross_entropy(x, torch.arange(4))),
    "bits_per_dimension": lambda x: F.cross_entropy(x, torch.arange(4)) / math.log(2),
}
for title, function in LOGS.items():
    family.innocent(name=f"log_of_{title}_is_no_matter")(function)


@family.innocent(SQUARE)
def log_determinant(x):
    return torch.logdet(x @ x.T + torch.eye(4))


@family.innocent(SQUARE)
def log_of_a_determinant(x):
    return torch.log(torch.det(x @ x.T / 100 + torch.eye(4)))


@family.innocent(SQUARE)
def log_of_eigenvalues(x):
    return torch.log(torch.linalg.eigvalsh(x @ x.T + torch.eye(4))).sum()


@family.innocent(SQUARE)
def normalising_flow(x):
    scale = torch.tanh(x[:, :2])
    return x[:, 2:] * torch.exp(scale) + scale.sum(1, keepdim=True)


@family.innocent()
def beta_log_probability(x):
    return torch.distributions.Beta(x.abs() + 1, x.flip(1).abs() + 1, validate_args=False).log_prob(torch.tensor(0.3))


@family.innocent()
def normal_log_probability(x):
    return torch.distributions.Normal(x, 1.0).log_prob(torch.tensor(0.5))


@family.innocent()
def categorical_of_logits(x):
    return torch.distributions.Categorical(logits=x).log_prob(torch.arange(4))


class Lie:
    """A rotation, whose logarithm is one of its own."""

    def __init__(self, x):
        self.x = x

    def exp(self):
        """Of a tangent vector."""
        return Lie(torch.sin(self.x))

    def log(self):
        """Of a rotation."""
        return torch.asin(self.x * 0.999)

    def softmax(self, dim):
        """Of nothing that you know."""
        return Lie(self.x - self.x.mean(dim, keepdim=True))


@family.innocent()
def object_with_a_log(x):
    return Lie(x).exp().log()


@family.innocent()
def object_with_a_softmax(x):
    return Lie(x / 1e4).softmax(1).log()


class Logger(nn.Module):
    """Has a method of that name, as a LightningModule has."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def log(self, name, value):
        """Note a value."""
        self.seen.append((name, value.detach()))

    def forward(self, x):
        """A loss that is noted."""
        loss = F.cross_entropy(x, torch.arange(4))
        self.log("loss", loss)
        self.log("probability", torch.softmax(x, 1))
        return loss


@family.innocent()
def module_with_a_log(x):
    return Logger()(x)
