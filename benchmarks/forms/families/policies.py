"""Policy gradients: REINFORCE, importance ratios, SAC, categorical distributions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from forms.exact import entropy, lsm, picked, shannon
from forms.inputs import classes, free, pair, randn, scores
from forms.registry import Family

TARGETED = classes("mild extreme half")
family = Family("policies", TARGETED)
RETURNS = torch.tensor([1.0, -0.5, 2.0, 0.3])


def reinforce(x, y):
    return -(picked(x, y) * RETURNS.to(x)).sum()


class Policy(nn.Module):
    """Probabilities of actions."""

    def forward(self, state):
        """Of a batch of states."""
        return F.softmax(state, dim=-1)


@family.form(reinforce, classes("mild extreme"))
def reinforce_gathered(x, y):
    p = Policy()(x)
    return -(torch.log(p.gather(1, y.view(-1, 1))).squeeze(1) * RETURNS.to(x)).sum()


@family.form(reinforce, classes("mild extreme"))
def reinforce_loop(x, y):
    losses = []
    for state, action, gain in zip(x, y, RETURNS.to(x), strict=True):
        p = Policy()(state.unsqueeze(0))
        losses.append(-torch.log(p.squeeze(0)[action]) * gain)
    return torch.stack(losses).sum()


@family.form(reinforce, classes("mild extreme"))
def reinforce_by_one_hot(x, y):
    p = torch.sum(Policy()(x) * F.one_hot(y, 5), dim=1)
    return -(p.log() * RETURNS.to(x)).sum()


@family.form(lambda x, y: picked(x, y), classes("mild extreme"))
def categorical_probs(x, y):
    return torch.distributions.Categorical(probs=F.softmax(x, 1), validate_args=False).probs[torch.arange(4), y].log()


EPS = torch.finfo(
    torch.float32
).eps  # torch.distributions floors its probabilities there, which is none of our business


@family.twin(
    "categorical_probs",
    classes("mild extreme"),
    stable=lambda x, y: picked(x, y).clamp(math.log(EPS), math.log1p(-EPS)),
)
def categorical_log_prob(x, y):
    return torch.distributions.Categorical(F.softmax(x, 1), validate_args=False).log_prob(y)


@family.twin("actor_critic_with_entropy_bonus", classes("mild extreme"), stable=lambda x, y: shannon(x))
def categorical_entropy(x, y):
    return torch.distributions.Categorical(probs=F.softmax(x, 1), validate_args=False).entropy()


def floored_bernoulli(x):
    p = torch.sigmoid(x).clamp(EPS, 1 - EPS)
    return F.logsigmoid(torch.where(torch.arange(6) % 2 == 0, 1, -1) * torch.logit(p))


@family.twin("bce_by_hand", scores("mild extreme"), stable=floored_bernoulli)
def bernoulli_log_prob(x):
    labels = (torch.arange(6) % 2 == 0).to(x.dtype)
    return torch.distributions.Bernoulli(probs=torch.sigmoid(x), validate_args=False).log_prob(labels)


@family.form(lambda x, y: picked(x, y) * RETURNS.to(x) + 0.01 * shannon(x), classes("mild extreme"))
def actor_critic_with_entropy_bonus(x, y):
    p = Policy()(x)
    log_p = torch.log(p)
    chosen = log_p.gather(1, y[:, None]).squeeze(1)
    return chosen * RETURNS.to(x) - 0.01 * (p * log_p).sum(1)


# Ratios: of the same action under two policies.
ACTIONS = torch.tensor([0, 2, 1, 3])
CLOSE = free(
    lambda: (randn(4, 5), randn(4, 5) + randn(4, 5, seed=1, scale=0.1)),
    lambda: (randn(4, 5) * 200, randn(4, 5) * 200 + randn(4, 5, seed=1, scale=0.1)),
)


def log_ratio(a, b):
    return picked(a, ACTIONS) - picked(b, ACTIONS)


@family.form(lambda a, b: torch.exp(log_ratio(a, b.detach())), CLOSE)
def importance_ratio(a, b):
    new = F.softmax(a, 1).gather(1, ACTIONS[:, None])
    old = F.softmax(b, 1).gather(1, ACTIONS[:, None]).detach()
    return (new / old).squeeze(1)


@family.form(lambda a, b: log_ratio(a, b), pair("mild extreme half"))
def log_of_importance_ratio(a, b):
    new, old = F.softmax(a, 1)[torch.arange(4), ACTIONS], F.softmax(b, 1)[torch.arange(4), ACTIONS]
    return torch.log(new / old)


@family.form(lambda a, b: torch.exp(log_ratio(a, b.detach())), CLOSE)
def exp_of_difference_of_logs(a, b):
    new = torch.log(F.softmax(a, 1)).gather(1, ACTIONS[:, None])[:, 0]
    old = torch.log(F.softmax(b, 1)).gather(1, ACTIONS[:, None])[:, 0].detach()
    return torch.exp(new - old)


def clipped(a, b):
    ratio = torch.exp(log_ratio(a, b.detach()))
    gain = RETURNS.to(a)
    return -torch.min(ratio * gain, ratio.clamp(0.8, 1.2) * gain).mean()


@family.form(clipped, CLOSE)
def ppo(a, b):
    new = F.softmax(a, 1)[torch.arange(4), ACTIONS]
    old = F.softmax(b, 1)[torch.arange(4), ACTIONS].detach()
    ratio = new / old
    gain = RETURNS.to(a)
    return -torch.min(ratio * gain, torch.clamp(ratio, 0.8, 1.2) * gain).mean()


@family.form(lambda a, b: -(torch.exp(log_ratio(a, b.detach())) * RETURNS.to(a)).mean(), CLOSE)
def trpo_surrogate(a, b):
    new = torch.exp(a) / torch.exp(a).sum(1, keepdim=True)
    with torch.no_grad():
        old = torch.exp(b) / torch.exp(b).sum(1, keepdim=True)
    pick = (torch.arange(4), ACTIONS)
    return -(new[pick] / old[pick] * RETURNS.to(a)).mean()


@family.form(lambda a, b: -F.logsigmoid(0.1 * log_ratio(a, b)), pair("mild extreme"))
def dpo_by_hand(a, b):
    chosen, rejected = F.softmax(a, 1)[torch.arange(4), ACTIONS], F.softmax(b, 1)[torch.arange(4), ACTIONS]
    return -torch.log(torch.sigmoid(0.1 * (torch.log(chosen) - torch.log(rejected))))


# Squashed Gaussians.
def log_squash(x):
    return 2 * (math.log(2) - x - F.softplus(-2 * x))


@family.form(log_squash, scores("mild extreme"))
def sac_log_one_minus_tanh_squared(x):
    return torch.log(1 - torch.tanh(x) ** 2)


@family.form(log_squash, scores("mild extreme saturated"))
def sac_with_pow_method(x):
    return torch.log(1 - x.tanh().pow(2))


@family.form(log_squash, scores("mild extreme"))
def sac_with_product(x):
    a = torch.tanh(x)
    return torch.log((1 - a) * (1 + a))


@family.form(log_squash, scores("mild extreme"))
def sac_log1p(x):
    return torch.log1p(-torch.tanh(x).square())


def squash_plus(x, eps):
    a = log_squash(x)
    return torch.logaddexp(a, torch.full_like(a, math.log(eps))) if eps else a


@family.form(squash_plus, scores("mild extreme=saturated large=extreme"), epsilon="both")
def sac_with_eps(x, eps=1e-10):
    return torch.log(1 - torch.tanh(x).pow(2) + eps)


@family.form(squash_plus, scores("mild extreme=saturated"), epsilon="both")
def sac_with_relu(x, eps=1e-10):
    return torch.log(F.relu(1 - torch.tanh(x).pow(2)) + eps)


@family.form(lambda x: F.logsigmoid(2 * x) + math.log(2), scores("mild extreme saturated"))
def log_one_plus_tanh(x):
    return torch.log(1 + torch.tanh(x))


@family.form(lambda x: 2 * x, scores("mild extreme saturated"))
def atanh_by_logs(x):
    a = torch.tanh(x)
    return torch.log((1 + a) / (1 - a))


@family.form(lambda x: x, scores("mild extreme saturated"))
def atanh_of_tanh(x):
    return torch.atanh(torch.tanh(x))


@family.form(
    lambda x, y: -entropy(lsm(x / 0.2)).sum(1) * 0.2 + (lsm(x / 0.2).exp() * x).sum(1), classes("mild extreme")
)
def soft_value(x, y):
    p = F.softmax(x / 0.2, dim=1)
    return (p * (x - 0.2 * torch.log(p))).sum(1)
