"""Innocents: probabilities that are edited, watched, kept, or handed to something else."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from forms.inputs import classes
from forms.registry import Family

ONE = classes("mild extreme", target=False)
around = Family("edited, watched or kept", ONE)


@around.innocent()
def moving_average_of_probabilities(x):
    average = torch.full((5,), 0.2)
    with torch.no_grad():
        average.mul_(0.9).add_(torch.softmax(x, 1).mean(0), alpha=0.1)
    return x - torch.log(average)


@around.innocent()
def sinkhorn_in_place(x):
    with torch.no_grad():
        q = torch.exp(x / x.abs().max() / 0.5).t()
        q /= torch.sum(q)
        for _ in range(3):
            q /= torch.sum(q, dim=1, keepdim=True)
            q /= q.shape[0]
            q /= torch.sum(q, dim=0, keepdim=True)
            q /= q.shape[1]
        q *= q.shape[1]
    return -(q.t() * F.log_softmax(x, 1)).sum(1)


@around.innocent()
def sinkhorn_then_edited(x):
    with torch.no_grad():
        q = torch.exp(x / x.abs().max())
        q /= q.sum(dim=1, keepdim=True).add_(0.1)
        q[0] = 0.2
    return -(q * F.log_softmax(x, 1)).sum(1) + torch.log(q + 1).sum(1)


@around.innocent()
def probabilities_overwritten(x):
    p = torch.softmax(x.detach(), 1)
    p[p < 0.1] = 0.05
    return torch.log(p) * x


@around.innocent()
def probabilities_overwritten_through_a_view(x):
    p = torch.softmax(x.detach(), 1)
    p[0].fill_(0.2)
    return torch.log(p) * x


@around.innocent()
def probabilities_overwritten_through_data(x):
    p = torch.softmax(x.detach(), 1)
    p.data.mul_(0.5)
    return torch.log(p) * x


@around.innocent()
def probabilities_overwritten_through_numpy(x):
    p = torch.softmax(x.detach(), 1)
    p.numpy()[0] = 0.2
    return torch.log(p) * x


@around.innocent()
def probabilities_overwritten_with_out(x):
    p = torch.softmax(x.detach(), 1)
    torch.mul(p, 0.5, out=p)
    return torch.log(p) * x


@around.innocent()
def probabilities_filled_in_place(x):
    p = torch.softmax(x.detach(), 1)
    p.masked_fill_(torch.eye(5)[:4].bool(), 0.5)
    return torch.log(p) * x


@around.innocent()
def probabilities_clamped_by_tensors_in_place(x):
    p = torch.softmax(x.detach(), 1)
    p.copy_(torch.rand(4, 5, generator=torch.Generator().manual_seed(0)))
    return torch.log(p) * x


@around.innocent()
def probabilities_with_an_index_copied(x):
    p = torch.softmax(x.detach(), 1).index_fill_(1, torch.tensor([0]), 0.5)
    return torch.log(p.scatter_(1, torch.tensor([[1], [2], [3], [4]]), 0.7)) * x


@around.innocent()
def probabilities_at_a_hook(x):
    p = torch.softmax(x * 1.0, 1)
    p.register_hook(lambda gradient: gradient * 0.5)
    return torch.log(p + 0.1)


@around.innocent(compilable=False)
def probabilities_that_retain_gradients(x):
    p = torch.softmax(x * 1.0, 1)
    p.retain_grad()
    return torch.log(p + 0.1)


@around.innocent(compilable=False)
def probabilities_as_new_leaves(x):
    p = torch.softmax(x.detach(), 1).requires_grad_()
    q = torch.log(p + 0.1)
    return q.detach() * x + torch.autograd.grad(q.sum(), p)[0]


@around.innocent(compilable=False)
def probabilities_kept_across_a_step(x):
    model = nn.Linear(5, 3)
    with torch.no_grad():
        model.weight.fill_(0.01)
        model.bias.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    old = torch.softmax(model(x.detach()), 1)
    old.sum().backward()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    new = F.log_softmax(model(x), 1)
    return (old.detach() * new).sum(1)


@around.innocent()
def custom_function(x):
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, p):
            return p * 0.5 + 0.1

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    return torch.log(Scaled.apply(torch.softmax(x, 1)))


@around.innocent()
def tensor_subclass(x):
    class Labelled(torch.Tensor):
        pass

    return torch.log(torch.softmax(x.detach(), 1).as_subclass(Labelled) + 0.1).as_subclass(torch.Tensor) * x


@around.innocent()
def sparse(x):
    p = torch.softmax(x.detach(), 1).to_sparse()
    return torch.log(p.to_dense() + 0.1) * x


@around.innocent()
def accuracy_and_calibration(x):
    p = torch.softmax(x.detach(), 1)
    confidence, guess = p.max(1)
    return x.mean() + (guess == torch.arange(4)).float().mean() - confidence.mean()


@around.innocent()
def cross_entropy_beside_logged_probabilities(x):
    loss = F.cross_entropy(x, torch.arange(4))
    with torch.no_grad():
        seen = torch.softmax(x, 1).mean(0).tolist()
    return loss + 0 * len(seen)


@around.innocent()
def sampled_actions(x):
    torch.manual_seed(0)
    actions = torch.multinomial(torch.nan_to_num(torch.softmax(x, 1), 1), 1)
    return F.log_softmax(x, 1).gather(1, actions)


@around.innocent()
def batch_norm_then_sigmoid(x):
    return torch.sigmoid(F.batch_norm(x, None, None, training=True))


@around.innocent()
def long_short_term_memory(x):
    torch.manual_seed(0)
    return nn.LSTM(5, 3, batch_first=True)(x[None])[0]
