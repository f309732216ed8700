"""Between softmax and log: picking, masking, reshaping, casting, combining."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from forms.exact import cross_entropy, lsm, nll, picked
from forms.inputs import classes
from forms.registry import Family

family = Family("picking between softmax and log", classes("mild extreme masked saturated half"))


def hot(y: Tensor) -> Tensor:
    return F.one_hot(y, 5)


PICKS = {
    "arange_index": lambda p, y: p[torch.arange(p.size(0)), y],
    "range_index": lambda p, y: p[range(4), y],
    "list_index": lambda p, y: p[[0, 1, 2, 3], y],
    "gather_method": lambda p, y: p.gather(1, y[:, None]),
    "gather_function": lambda p, y: torch.gather(p, dim=1, index=y.view(-1, 1)).squeeze(1),
    "take_along_dim": lambda p, y: torch.take_along_dim(p, y.unsqueeze(1), dim=1),
    "boolean_mask": lambda p, y: p[hot(y).bool()],
    "masked_select": lambda p, y: torch.masked_select(p, hot(y).bool()),
    "masked_select_method": lambda p, y: p.masked_select(hot(y) == 1),
    "index_select_diagonal": lambda p, y: p.index_select(1, y).diagonal(),
    "index_select_diag": lambda p, y: torch.diag(torch.index_select(p, 1, y)),
    "flat_index": lambda p, y: p.reshape(-1)[torch.arange(4) * 5 + y],
    "take": lambda p, y: torch.take(p, torch.arange(4) * 5 + y),
    "transposed_index": lambda p, y: p.t()[y, torch.arange(4)],
    "one_hot_sum": lambda p, y: (p * hot(y)).sum(1),
    "one_hot_float_sum": lambda p, y: torch.sum(hot(y).to(p.dtype) * p, dim=-1),
    "one_hot_bmm": lambda p, y: torch.bmm(p.unsqueeze(1), hot(y).to(p.dtype).unsqueeze(2)).squeeze(),
    "one_hot_einsum": lambda p, y: torch.einsum("ij,ij->i", p, hot(y).to(p.dtype)),
    "one_hot_matmul": lambda p, y: (p @ hot(y).to(p.dtype).T).diagonal(),
    "where_sum": lambda p, y: torch.where(hot(y).bool(), p, torch.zeros_like(p)).sum(1),
    "masked_fill_sum": lambda p, y: p.masked_fill(hot(y) == 0, 0.0).sum(1),
    "nonzero_index": lambda p, y: p[hot(y).nonzero(as_tuple=True)],
    "row_by_row": lambda p, y: torch.stack([row[label] for row, label in zip(p, y, strict=True)]),
    "unbind_and_cat": lambda p, y: torch.cat(
        [row[label].unsqueeze(0) for row, label in zip(p.unbind(0), y, strict=True)]
    ),
    "select_calls": lambda p, y: torch.stack([p.select(0, i).select(0, int(y[i])) for i in range(4)]),
    "narrowed": lambda p, y: p.narrow(0, 0, 4)[torch.arange(4), y],
    "chunked": lambda p, y: torch.cat(
        [c.gather(1, label[:, None]) for c, label in zip(p.chunk(2), y.chunk(2), strict=True)]
    ),
    "split": lambda p, y: torch.cat(
        [c.gather(1, label[:, None]) for c, label in zip(p.split(2), y.split(2), strict=True)]
    ),
    "flipped": lambda p, y: p.flip(1)[torch.arange(4), 4 - y],
    "rolled": lambda p, y: torch.roll(p, 1, 1)[torch.arange(4), (y + 1) % 5],
    "image_permuted": lambda p, y: p.view(2, 2, 5).permute(2, 0, 1).reshape(5, -1).t().gather(1, y[:, None]),
    "contiguous_clone": lambda p, y: p.t().contiguous().clone().t()[torch.arange(4), y],
    "to_other_dtype": lambda p, y: p.to(torch.float64)[torch.arange(4), y].to(p.dtype),
    "ellipsis_index": lambda p, y: p[None][..., torch.arange(4), y][0],
    "chained_brackets": lambda p, y: p[torch.arange(4)][:, y].diagonal(),
    "unflattened": lambda p, y: p.unflatten(0, (2, 2)).flatten(0, 1).gather(1, y[:, None]),
    "padded": lambda p, y: F.pad(p, (0, 1))[torch.arange(4), y],
    "product_of_two_picks": lambda p, y: (p[torch.arange(4), y] * p[torch.arange(4), y]).sqrt(),
    "max_with_itself": lambda p, y: torch.maximum(p, p)[torch.arange(4), y],
    "index_select_rows": lambda p, y: torch.index_select(p, 0, torch.tensor([0, 1, 2, 3]))[torch.arange(4), y],
}
for title, pick in PICKS.items():
    family.form(cross_entropy, name=f"pick_{title}")(
        lambda x, y, pick=pick: -torch.log(pick(torch.softmax(x, 1), y)).mean()
    )


@family.form(cross_entropy, classes("mild extreme saturated half"))
def log_first_then_one_hot(x, y):
    return -(hot(y) * torch.log(F.softmax(x, 1))).sum(1).mean()


@family.form(cross_entropy)
def log_first_then_gather(x, y):
    return -torch.log(F.softmax(x, 1)).gather(1, y[:, None]).mean()


@family.form(cross_entropy)
def log_first_then_mask(x, y):
    return -torch.masked_select(F.softmax(x, 1).log(), hot(y).bool()).mean()


@family.form(
    lambda x, y: torch.stack([lsm(x)[:, 0] + lsm(x)[:, 1], lsm(x)[:, 2] - lsm(x)[:, 3]]), classes("mild extreme half")
)
def products_and_ratios_of_columns(x, y):
    p = torch.softmax(x, 1)
    return torch.stack([torch.log(p[:, 0] * p[:, 1]), torch.log(p[:, 2] / p[:, 3])])


@family.form(lambda x, y: torch.logsumexp(lsm(x)[:, :2], 1), classes("mild extreme saturated half"))
def groups_of_classes(x, y):
    p = F.softmax(x, dim=1)
    return torch.log(p[:, 0] + p[:, 1])


@family.form(lambda x, y: torch.logsumexp(lsm(x)[:, 1:], 1), classes("mild extreme half"))
def all_but_the_first(x, y):
    return torch.log(torch.softmax(x, -1)[:, 1:].sum(-1))


@family.form(lambda x, y: torch.logsumexp(lsm(x)[:, [1, 3]], 1), classes("mild extreme half"))
def masked_group(x, y):
    group = torch.tensor([0, 1, 0, 1, 0])
    return torch.log((F.softmax(x, 1) * group).sum(1))


@family.form(
    lambda x, y: torch.stack([torch.logsumexp(lsm(x)[:, :2], 1), torch.logsumexp(lsm(x)[:, 2:], 1)], 1),
    classes("mild extreme half"),
)
def coarse_classes_by_matmul(x, y):
    members = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1], [0, 1]], dtype=x.dtype)
    return torch.log(torch.matmul(F.softmax(x, 1), members))


@family.form(
    lambda x, y: torch.stack([torch.logsumexp(lsm(x)[:, :2], 1), torch.logsumexp(lsm(x)[:, 2:], 1)], 1),
    classes("mild extreme half"),
)
def coarse_classes_by_index_add(x, y):
    p = F.softmax(x, 1)
    coarse = torch.zeros(4, 2, dtype=x.dtype).index_add(1, torch.tensor([0, 0, 1, 1, 1]), p)
    return torch.log(coarse)


@family.form(
    lambda x, y: torch.stack([torch.logsumexp(lsm(x)[:, :2], 1), torch.logsumexp(lsm(x)[:, 2:], 1)], 1),
    classes("mild extreme half"),
)
def coarse_classes_by_scatter_add(x, y):
    p = F.softmax(x, 1)
    where = torch.tensor([0, 0, 1, 1, 1]).expand(4, 5)
    return torch.zeros(4, 2, dtype=x.dtype).scatter_add(1, where, p).log()


@family.form(lambda x, y: lsm(x).sum(1), classes("mild extreme half"))
def log_of_product(x, y):
    return torch.log(torch.prod(F.softmax(x, 1), dim=1))


@family.form(lambda x, y: picked(x, y).sum(), classes("mild extreme half"))
def log_likelihood_of_the_batch(x, y):
    return torch.log(F.softmax(x, 1)[torch.arange(4), y].prod())


@family.form(lambda x, y: picked(x, y).cumsum(0), classes("mild extreme half"))
def log_of_cumprod(x, y):
    return torch.log(torch.cumprod(F.softmax(x, 1).gather(1, y[:, None])[:, 0], 0))


@family.form(lambda x, y: torch.logcumsumexp(lsm(x), 1), classes("mild extreme half"))
def log_of_cumsum(x, y):
    return torch.log(torch.cumsum(F.softmax(x, 1), 1))


@family.form(lambda x, y: lsm(x).amin(1), classes("mild extreme saturated half"))
def least_probability(x, y):
    return torch.log(torch.softmax(x, 1).min(dim=1).values)


@family.form(lambda x, y: lsm(x).topk(5, 1).values, classes("mild extreme half"))
def sorted_probabilities(x, y):
    return torch.log(F.softmax(x, 1).topk(5, dim=1)[0])


@family.form(lambda x, y: lsm(x).sort(1, descending=True).values, classes("mild extreme half"))
def sorted_by_sort(x, y):
    ordered, _ = torch.sort(F.softmax(x, 1), descending=True, dim=1)
    return ordered.log()


@family.form(lambda x, y: 0.5 * picked(x, y), classes("mild extreme saturated"))
def geometric_mean(x, y):
    return torch.log(torch.pow(F.softmax(x, 1)[torch.arange(4), y], 0.5))


@family.form(lambda x, y: picked(x, y) + math.log(5), classes("mild extreme saturated"))
def relative_to_chance(x, y):
    return torch.log(F.softmax(x, 1)[torch.arange(4), y] * 5)


@family.twin("relative_to_chance", classes("mild extreme"))
def relative_to_a_prior(x, y):
    prior = torch.tensor([0.1, 0.2, 0.3, 0.1, 0.3], dtype=x.dtype)
    return torch.log((F.softmax(x, 1) / prior)[torch.arange(4), y])


@family.form(nll)
def in_a_dict_of_lists(x, y):
    out = {"probs": [row.softmax(0) for row in x]}
    return torch.stack([-torch.log(p[label]) for p, label in zip(out["probs"], y, strict=True)])


@family.form(nll)
def squeezed_and_unsqueezed(x, y):
    p = F.softmax(x.unsqueeze(1), dim=-1).squeeze(1)
    return -p.unsqueeze(-1).gather(1, y[:, None, None]).squeeze(-1).squeeze(-1).log()


@family.form(lambda x, y: nll(torch.stack([x, x.flip(0)], 1).flatten(0, 1), torch.stack([y, y.flip(0)], 1).flatten()))
def stacked(x, y):
    p = torch.stack([F.softmax(x, 1), F.softmax(x.flip(0), 1)], dim=1).flatten(0, 1)
    return -p.log()[torch.arange(8), torch.stack([y, y.flip(0)], 1).flatten()]


@family.form(nll, classes("mild extreme saturated half"))
def row_by_row_into_empty_memory(x, y):
    p = torch.empty(4, 5, dtype=x.dtype)
    for i in range(4):
        p[i] = x[i].softmax(0)
    return -torch.log(p)[torch.arange(4), y]


@family.form(nll, classes("mild extreme saturated half"))
def some_rows_by_a_mask(x, y):
    p, some = torch.zeros_like(x), y < 2
    p[some] = x[some].softmax(1)
    p[~some] = x[~some].softmax(1)
    return -torch.log(p.gather(1, y[:, None])[:, 0])


@family.form(nll, classes("mild extreme masked saturated"))
def padded_sequence(x, y):
    p = F.softmax(x, 1)
    padded = torch.nn.utils.rnn.pad_sequence([p[:3], p[3:]], batch_first=True, padding_value=1.0)
    flat = torch.cat([padded[0], padded[1, :1]])
    return -torch.log(flat[torch.arange(4), y])
