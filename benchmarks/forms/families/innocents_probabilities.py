"""Innocents: probabilities that are used as such, changed on the way to a log, or are none."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from forms.inputs import classes, free, randn
from forms.registry import Family

ONE = classes("mild extreme half", target=False)
TARGETED = classes("mild extreme")
SQUARE = free(lambda: (randn(4, 4),), lambda: (randn(4, 4) * 60,))
family = Family("probabilities used as such", ONE)


def noise(x, seed=0):
    return torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.dtype)


PLAIN = {
    "softmax_alone": lambda x: torch.softmax(x, 1),
    "sigmoid_alone": lambda x: torch.sigmoid(x),
    "log_softmax_itself": lambda x: F.log_softmax(x, 1),
    "logsigmoid_itself": lambda x: F.logsigmoid(x),
    "softplus_itself": lambda x: F.softplus(x),
    "logsumexp_itself": lambda x: torch.logsumexp(x, 1),
    "logaddexp_itself": lambda x: torch.logaddexp(x, x.flip(1)),
    "exp_of_log_softmax": lambda x: F.log_softmax(x, 1).exp(),
    "entropy_of_log_softmax": lambda x: -(F.log_softmax(x, 1).exp() * F.log_softmax(x, 1)).sum(1),
    "expected_value": lambda x: (torch.softmax(x, 1) * torch.arange(5, dtype=x.dtype)).sum(1),
    "gini": lambda x: 1 - (torch.softmax(x, 1) ** 2).sum(1),
    "brier": lambda x: ((torch.softmax(x, 1) - torch.eye(5, dtype=x.dtype)[:4]) ** 2).sum(1),
    "dice": lambda x: 1 - 2 * (x.sigmoid() * (x > 0)).sum() / (x.sigmoid().sum() + (x > 0).sum() + 1),
    "swish": lambda x: x * torch.sigmoid(x),
    "gated_linear_unit": lambda x: torch.sigmoid(x[:, :2]) * torch.tanh(x[:, 2:4]),
    "functional_glu": lambda x: F.glu(x[:, :4], 1),
    "confidence": lambda x: torch.softmax(x, 1).max(1).values,
    "margin_of_probabilities": lambda x: torch.softmax(x, 1).topk(2, 1).values.diff(dim=1),
    "detached_weight": lambda x: torch.softmax(x, 1).detach() * x,
    "straight_through": lambda x: (
        (x.argmax(1, keepdim=True) == torch.arange(5)).to(x.dtype) + torch.softmax(x, 1) - torch.softmax(x, 1).detach()
    ),
    "squeeze_and_excite": lambda x: x * torch.sigmoid(x.mean(1, keepdim=True)),
    "double_softmax_cross_entropy": lambda x: F.cross_entropy(torch.softmax(x, 1), torch.arange(4)),
    "cross_entropy_itself": lambda x: F.cross_entropy(x, torch.arange(4)),
    "bce_with_logits_itself": lambda x: F.binary_cross_entropy_with_logits(x, (x > 0).to(x.dtype)),
    "kl_fed_probabilities": lambda x: F.kl_div(torch.softmax(x, 1), torch.softmax(x, 1).detach(), reduction="sum"),
    "kl_of_log_softmax": lambda x: F.kl_div(F.log_softmax(x, 1), torch.softmax(x.flip(0), 1), reduction="batchmean"),
    "mean_squared_consistency": lambda x: F.mse_loss(torch.softmax(x, 1), torch.softmax(x.flip(0), 1).detach()),
    "sparsemax_like": lambda x: F.relu(x - x.mean(1, keepdim=True)),
    "softmax_of_a_softmax": lambda x: torch.softmax(torch.softmax(x, 1), 1),
    "exponential_weights": lambda x: torch.exp(-x.abs()) * x,
    "radial_basis": lambda x: torch.exp(-(x**2)).sum(1),
    "reparameterised": lambda x: x[:, :2] + torch.exp(0.5 * x[:, 2:4].clamp(max=5)) * 0.3,
    "gaussian_kl": lambda x: -0.5 * (1 + x - x.clamp(max=5).exp()).sum(1),
}
for title, function in PLAIN.items():
    family.innocent(name=f"plain_{title}")(function)


@family.innocent(SQUARE)
def attention(x):
    return torch.softmax(x @ x.T / 2, -1) @ x


@family.innocent(SQUARE)
def attention_functional(x):
    return F.scaled_dot_product_attention(x[None], x[None], x[None])


@family.innocent(SQUARE)
def attention_masked_and_dropped(x):
    torch.manual_seed(0)
    weights = torch.softmax((x @ x.T).masked_fill(torch.ones(4, 4).triu(1).bool(), -math.inf), -1)
    return F.dropout(weights, 0.3) @ x


@family.innocent(SQUARE)
def attention_multi_head(x):
    torch.manual_seed(0)
    return nn.MultiheadAttention(4, 2, batch_first=True)(x[None], x[None], x[None])[0]


@family.innocent(SQUARE)
def attention_of_a_linear_kernel(x):
    q, k = F.elu(x) + 1, F.elu(x) + 1
    return (q @ (k.T @ x)) / (q @ k.sum(0))[:, None]


@family.innocent(SQUARE)
def attention_renormalised_by_queries(x):
    weights = torch.softmax(x, 1)
    weights = weights / (1e-9 + weights.sum(0, keepdim=True))
    return weights @ x


@family.innocent(SQUARE)
def mixture_of_experts(x):
    top, where = torch.softmax(x, 1).topk(2, 1)
    return (top / top.sum(1, keepdim=True) * x.gather(1, where)).sum(1)


@family.innocent(SQUARE)
def load_balancing(x):
    p = torch.softmax(x, 1)
    return 4 * (p.mean(0) * F.one_hot(p.argmax(1), 4).to(x.dtype).mean(0)).sum()


changed = Family("probabilities changed before the log", ONE)


CHANGED = {
    "dropout": lambda p: torch.log(F.dropout(p, 0.5) + 0.1),
    "dropout_module": lambda p: torch.log(nn.Dropout(0.5)(p) + 0.1),
    "alpha_dropout": lambda p: torch.log(F.alpha_dropout(p, 0.5, True).abs() + 0.1),
    "plus_noise": lambda p: torch.log(p + noise(p)),
    "masked_with_zero": lambda p: torch.log(p.masked_fill(torch.eye(5)[:4].bool(), 0) + 0.1),
    "mixed_with_an_unknown": lambda p: torch.log(0.5 * p + 0.5 * noise(p)),
    "joined_with_an_unknown": lambda p: torch.log(torch.cat([p, noise(p) + 0.5])),
    "stacked_with_an_unknown": lambda p: torch.log(torch.stack([p, noise(p) + 0.5])),
    "minus_a_constant": lambda p: torch.log((p - 0.01).abs() + 0.1),
    "rounded": lambda p: torch.log((p * 10).round() + 1),
    "thresholded": lambda p: torch.log((p > 0.2).to(p.dtype) + 1),
    "through_relu": lambda p: torch.log(F.relu(p - 0.2) + 0.5),
    "through_a_linear_layer": lambda p: torch.log((p @ noise(p).T).abs() + 0.1),
    "through_layer_norm": lambda p: torch.log(F.layer_norm(p, (5,)).abs() + 0.1),
    "through_a_convolution": lambda p: torch.log(F.avg_pool1d(p[None].float(), 3).abs() + 0.1),
    "through_interpolation": lambda p: torch.log(F.interpolate(p[None].float(), 7, mode="linear") + 0.1),
    "through_sine": lambda p: torch.log(torch.sin(p) + 2),
    "top_k_renormalised_with_noise": lambda p: torch.log(p.topk(2, 1).values + noise(p[:, :2])),
    "quantised": lambda p: torch.log(torch.fake_quantize_per_tensor_affine(p.float(), 0.1, 0, 0, 255) + 1),
    "nan_to_num": lambda p: torch.log(torch.nan_to_num(p) + noise(p)),
    "as_strided": lambda p: torch.log(p.as_strided((2, 5), (5, 1)) * noise(p[:2]) + 0.1),
    "reinterpreted": lambda p: torch.log(p.detach().float().view(torch.int32).view(torch.float32) + noise(p)),
    "of_its_numpy_copy": lambda p: torch.log(torch.from_numpy(p.detach().float().numpy() * 0.5 + 0.1)),
    "of_a_list_of_numbers": lambda p: torch.log(torch.tensor(p.detach().tolist()) + 0.1),
}
for title, function in CHANGED.items():

    @changed.innocent(name=f"changed_by_{title}")
    def _changed(x, function=function):
        torch.manual_seed(0)
        return function(torch.softmax(x, 1))


other = Family("logs of what is no such probability", ONE)


@other.innocent()
def gumbel_softmax(x):
    torch.manual_seed(0)
    return torch.log(F.gumbel_softmax(x, tau=0.5) + 1e-10)


@other.innocent()
def gumbel_noise(x):
    torch.manual_seed(0)
    u = torch.rand(x.shape)
    return x - torch.log(-torch.log(u + 1e-20) + 1e-20)


@other.innocent()
def hard_gumbel_softmax(x):
    torch.manual_seed(0)
    return torch.log(F.gumbel_softmax(x, hard=True).clamp(min=0.01))


@other.innocent(TARGETED)
def clamped_one_hot_labels(x, y):
    hot = torch.clamp(F.one_hot(y, 5).float(), min=1e-4, max=1.0)
    return -(torch.softmax(x, 1) * torch.log(hot)).sum(1)


@other.innocent(TARGETED)
def mixed_labels(x, y):
    labels = F.one_hot(y, 5).float()
    mixed = 0.3 * labels + 0.7 * labels.flip(0)
    return -(mixed * F.log_softmax(x, 1)).sum(1) + (mixed * torch.log(mixed + 1e-8)).sum()


@other.innocent()
def codebook_perplexity(x):
    hot = F.one_hot(x.argmax(1), 5).to(x.dtype)
    usage = hot.mean(0)
    return x.mean() + 0 * torch.exp(-torch.sum(usage * torch.log(usage + 1e-10)))


@other.innocent()
def positives_by_their_sum(x):
    a = x.abs() + 0.1
    return torch.log(a / a.sum(1, keepdim=True))


@other.innocent()
def relu_by_its_sum(x):
    a = F.relu(x) + 1
    return torch.log(a / a.sum(1, keepdim=True))


@other.innocent()
def softplus_by_its_sum(x):
    a = F.softplus(x) + 0.1
    return a / a.sum(1, keepdim=True)


@other.innocent()
def evidence(x):
    alpha = F.relu(x) + 1
    total = alpha.sum(1, keepdim=True)
    return (torch.log(total) - torch.log(alpha)).sum(1) + torch.lgamma(alpha).sum(1)


@other.innocent()
def inverse_distances(x):
    q = 1 / (1 + x**2)
    q = q / q.sum(1, keepdim=True)
    return torch.log(q)


@other.innocent()
def memory_bank(x):
    bank = torch.rand(5, 5, generator=torch.Generator().manual_seed(0))
    bank = bank / bank.sum(1, keepdim=True)
    return (x.float() @ torch.log(bank)).sum(1)


@other.innocent()
def prior_by_counts(x):
    counts = torch.tensor([10.0, 5, 20, 1, 4])
    return x + torch.log(counts / counts.sum())


@other.innocent()
def logarithm_of_a_parameter(x):
    scale = nn.Parameter(torch.tensor(14.3))
    return x * torch.log(scale)


@other.innocent()
def a_copy_of_probabilities_edited(x):
    p = copy.deepcopy(torch.softmax(x.detach(), 1))
    p[0] = 0.5
    return torch.log(p) + x


@other.innocent()
def integers(x):
    return x + torch.log(torch.exp(torch.arange(5))).to(x.dtype)


@other.innocent()
def complex_numbers(x):
    return torch.log(torch.exp(x.detach().float() * 1j)).real + x


@other.innocent()
def written_to_another_tensor(x):
    return torch.log(torch.softmax(x.detach(), 1) * 1.0, out=torch.empty_like(x)) + x


@other.innocent()
def empty(x):
    return torch.log(x[:0].exp().sum(0)) + x.sum()
