"""Where the code stands: autocast, half precision, checkpoints, transforms, modules, hooks, no_grad, threads of data."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from forms.exact import cross_entropy, lsm, nll, picked, shannon
from forms.inputs import classes, pair, randn, vector
from forms.registry import Family

TARGETED = classes("mild extreme")
family = Family("surroundings", TARGETED)
ONE = classes("mild extreme", target=False)


def loss(x, y):
    return -torch.log(F.softmax(x, 1)[torch.arange(4), y]).mean()


# Regions under a checkpoint are left as they are: their backward pass runs outside the block.
@family.twin("textbook", compilable=False)
def checkpointed(x, y):
    return checkpoint(loss, x, y, use_reentrant=False)


@family.twin("textbook", compilable=False)
def checkpointed_reentrant(x, y):
    return checkpoint(loss, x, y, use_reentrant=True)


@family.twin("textbook", compilable=False)
def model_checkpointed_and_loss_outside(x, y):
    p = checkpoint(nn.Softmax(1), x, use_reentrant=False)
    return -torch.log(p)[torch.arange(4), y].mean()


@family.form(cross_entropy, compilable=False)
def logits_checkpointed_and_softmax_outside(x, y):
    z = checkpoint(lambda t: t * 1.0, x, use_reentrant=False)
    return loss(z, y)


@family.form(cross_entropy, classes("mild extreme=bfloat"), precision=torch.bfloat16, double=False)
def autocast_to_bfloat(x, y):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return loss(x @ torch.eye(5, dtype=x.dtype), y).to(x.dtype)


BFLOAT = {**classes("extreme=bfloat"), "mild": lambda: (randn(4, 5).bfloat16(), torch.tensor([0, 2, 1, 3]))}


@family.form(cross_entropy, BFLOAT, double=False)
def autocast_around_the_model_only(x, y):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = F.linear(x.float(), torch.eye(5))
    p = F.softmax(z, 1)
    return -torch.log(p[torch.arange(4), y]).mean()


@family.form(cross_entropy, classes("mild extreme masked"), compilable=False)
def autocast_switched_off_again(x, y):
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        return loss(x, y)


@family.form(nll, classes("mild extreme half bfloat"))
def upcast_after_the_softmax(x, y):
    p = torch.softmax(x, 1)
    return -torch.log(p.to(torch.promote_types(p.dtype, torch.float32)))[torch.arange(4), y]


@family.form(lambda x: lsm(x), vector("mild extreme low saturated half bfloat"))
def vector_of_half_precision(x):
    return torch.softmax(x, 0).log()


@family.form(lambda x: -picked(x, torch.tensor([0, 2, 1, 3])), ONE, compilable=False)
def vmapped_over_samples(x):
    y = torch.tensor([0, 2, 1, 3])
    return torch.func.vmap(lambda row, label: -torch.log(torch.softmax(row, 0).gather(0, label[None]))[0])(x, y)


@family.form(lambda x: shannon(x), ONE, compilable=False)
def vmapped_entropy(x):
    def one(row):
        p = row.exp() / row.exp().sum()
        return -(p * p.log()).sum()

    return torch.func.vmap(one)(x)


@family.form(lambda x: torch.stack([lsm(x)[0, 0], lsm(x)[1, 2], lsm(x)[2, 1], lsm(x)[3, 3]]), ONE)
def in_a_list_comprehension(x):
    return torch.stack([torch.log(F.softmax(row, 0)[label]) for row, label in zip(x, [0, 2, 1, 3], strict=True)])


class Stateful(nn.Module):
    """Keeps its probabilities as an attribute."""

    def forward(self, x):
        """Remember them."""
        self.probs = F.softmax(x, 1)
        return self

    def loss(self, y):
        """Of what was remembered."""
        return -torch.log(self.probs[torch.arange(4), y]).mean()


@family.form(cross_entropy)
def kept_in_an_attribute(x, y):
    return Stateful()(x).loss(y)


@family.form(cross_entropy)
def returned_as_a_tuple(x, y):
    def model(z):
        return F.softmax(z, 1), z.argmax(1)

    p, _ = model(x)
    return F.nll_loss(p.log(), y)


@family.form(cross_entropy)
def through_a_sequential(x, y):
    p = nn.Sequential(nn.Flatten(), nn.Softmax(dim=1), nn.Identity())(x)
    return F.nll_loss(torch.log(p), y)


@family.form(cross_entropy)
def through_dropout_in_evaluation(x, y):
    p = nn.Dropout(0.5).eval()(F.softmax(x, 1))
    return F.nll_loss(torch.log(p), y)


@family.form(cross_entropy)
def named_helper(x, y):
    def softmax(z):
        shifted = z - z.max(1, keepdim=True)[0]
        return shifted.exp() / shifted.exp().sum(1, keepdim=True)

    def log_likelihood(p, label):
        return p.gather(1, label.unsqueeze(1)).log()

    return -log_likelihood(softmax(x), y).mean()


@family.form(cross_entropy)
def weights_and_buffers(x, y):
    scale = nn.Parameter(torch.ones(1, dtype=x.dtype))
    z = x * scale
    return -torch.log(F.softmax(z, dim=1)).gather(1, y[:, None]).mean()


@family.form(lambda a, b: cross_entropy(a + b, torch.tensor([0, 2, 1, 3])), pair("mild extreme"))
def two_towers(a, b):
    e = a.exp() * b.exp()
    p = e / e.sum(1, keepdim=True)
    return -torch.log(p[torch.arange(4), torch.tensor([0, 2, 1, 3])]).mean()


@family.form(lambda a, b: -picked(a, torch.tensor([0, 2, 1, 3])) * (1 - shannon(b).detach()), pair("mild extreme"))
def weighted_by_a_detached_entropy(a, b):
    with torch.no_grad():
        q = F.softmax(b, 1)
        entropy = -(q * q.log()).sum(1)
    return -torch.log(F.softmax(a, 1))[torch.arange(4), torch.tensor([0, 2, 1, 3])] * (1 - entropy)


@family.form(lambda x, y: shannon(x).detach() * nll(x, y), TARGETED)
def weighted_by_its_own_detached_entropy(x, y):
    p = F.softmax(x, 1)
    entropy = -(p * torch.log(p)).sum(1)
    return entropy.detach() * -torch.log(p[torch.arange(4), y])


@family.form(lambda x: shannon(x).detach() + 0 * x.sum(), ONE)
def entropy_without_a_gradient(x):
    with torch.no_grad():
        p = torch.exp(x) / torch.exp(x).sum(1, keepdim=True)
        entropy = -(p * p.log()).sum(1)
    return entropy + 0 * x.sum()


@family.form(cross_entropy)
def annotated_image_head(x, y):
    z = x.t().reshape(1, 5, 2, 2)
    p = nn.Softmax(dim=1)(z)
    return F.nll_loss(torch.log(p), y.view(1, 2, 2))


@family.form(cross_entropy)
def sequence_head(x, y):
    p = F.softmax(x.view(2, 2, 5), dim=-1)
    return F.nll_loss(p.log().view(-1, 5), y)


@family.form(cross_entropy)
def transposed_for_the_loss(x, y):
    p = F.softmax(x.view(2, 2, 5), dim=2)
    return F.nll_loss(torch.log(p).transpose(1, 2), y.view(2, 2))


@family.form(
    lambda x, y: torch.autograd.functional.jacobian(lambda z: nll(z, y).sum(), x, create_graph=True),
    classes("mild extreme"),
    compilable=False,
)
def gradient_inside(x, y):
    total = -torch.log(F.softmax(x, 1)[torch.arange(4), y]).sum()
    return torch.autograd.grad(total, x, create_graph=True)[0]


@family.form(lambda x, y: lsm(x).exp() - F.one_hot(y, 5), TARGETED, compilable=False)
def functional_gradient_inside(x, y):
    return torch.func.grad(lambda z: -torch.log(torch.softmax(z, 1)[torch.arange(4), y]).sum())(x)
