"""Which elements of an operation's input reach which elements of its result.

A rule takes the call, the position of the input among its arguments, and a mask of the result; it gives a mask of the input.
Where there is no rule, all of the input may reach all of the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanguard.diagnosis.evidence import chosen_where, same_place
from nanguard.diagnosis.operations import broadcast_to, reduced_to
from nanguard.diagnosis.records import Record, Source
from nanguard.diagnosis.statistics import plain

__all__ = ["needed"]

Rule = Callable[[Any, int, Tensor, Tensor], Tensor]


def needed(record: Record, source: Source, wanted: Tensor | None) -> Tensor | None:
    """Which bad elements of an input reach the elements of the result that are wanted; `None` for those is all of them."""
    bad = source.value.bad
    if bad is None or wanted is None:
        return bad
    if record.pointwise:
        chosen = chosen_where(record, source)
        fitting = None if chosen is None else broadcast_to(chosen.to(wanted.device), wanted.shape)
        reached = reduced_to(wanted if fitting is None else wanted & fitting, bad.shape)
    else:
        reached = _by_rule(record, source, wanted)
    return bad if reached is None or reached.shape != bad.shape else bad & reached.to(bad.device)


def _by_rule(record: Record, source: Source, wanted: Tensor) -> Tensor | None:
    if record.call is None:
        return None
    func, args, kwargs = record.call
    try:
        if record.kernel in _MOVES:
            return _moved(func, args, kwargs, source.value.tensor, wanted)
        rule = _RULES.get(record.kernel)
        if rule is None:
            return None
        for position, value in enumerate(args):
            if isinstance(value, Tensor) and same_place(value, source.value.tensor):
                return rule((args, kwargs), position, source.value.tensor, wanted)
    except (RuntimeError, IndexError, TypeError):  # a spelling that the rule does not know
        pass
    return None


def _moved(func: Any, args: Any, kwargs: Any, tensor: Tensor, wanted: Tensor) -> Tensor:
    """The operation once more, with the places of the elements in place of their values."""
    places = torch.arange(1, tensor.numel() + 1, device=tensor.device).reshape(tensor.shape)

    def places_of(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [places_of(entry) for entry in value]
        if not isinstance(value, Tensor) or not plain(value):
            return value
        return places if same_place(value, tensor) else torch.zeros(value.shape, dtype=torch.long, device=value.device)

    moved = func(*[places_of(value) for value in args], **kwargs)
    reached = torch.zeros(tensor.numel() + 1, dtype=torch.bool, device=tensor.device)
    reached[moved[wanted]] = True
    return reached[1:].reshape(tensor.shape)


def _product(call: Any, position: int, tensor: Tensor, wanted: Tensor) -> Tensor:
    """Rows of the left matrix reach rows of the product, columns of the right one columns."""
    first = len([value for value in call[0] if isinstance(value, Tensor)]) - 2  # after a bias
    if position < first:
        reached = reduced_to(wanted, tensor.shape)
        return torch.ones_like(tensor, dtype=torch.bool) if reached is None else reached
    dim = -1 if position == first else -2
    return wanted.any(dim, keepdim=True).expand(tensor.shape)


def _reduction(call: Any, position: int, tensor: Tensor, wanted: Tensor) -> Tensor:
    args, kwargs = call
    dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
    dims = [dims] if isinstance(dims, int) else list(dims or range(tensor.ndim))
    if wanted.ndim != tensor.ndim:
        for dim in sorted(dim % tensor.ndim for dim in dims):
            wanted = wanted.unsqueeze(dim)
    return wanted.expand(tensor.shape)


def _along(call: Any, position: int, tensor: Tensor, wanted: Tensor) -> Tensor:
    dim = call[1].get("dim", call[0][1] if len(call[0]) > 1 else -1)
    return wanted.any(dim, keepdim=True).expand(tensor.shape)


def _of_the_sample(call: Any, position: int, tensor: Tensor, wanted: Tensor) -> Tensor:
    """Samples do not mix; the weights reach everything."""
    if position != 0:
        return torch.ones_like(tensor, dtype=torch.bool)
    return wanted.flatten(1).any(1).view(-1, *[1] * (tensor.ndim - 1)).expand(tensor.shape)


def _normalised(call: Any, position: int, tensor: Tensor, wanted: Tensor) -> Tensor:
    if position != 0:
        return torch.ones_like(tensor, dtype=torch.bool)
    dims = tuple(range(-len(call[0][1]), 0))
    return wanted.any(dims, keepdim=True).expand(tensor.shape) if dims else wanted


def _rules(rule: Rule, names: str) -> dict[str, Rule]:
    return {f"aten.{name}": rule for name in names.split()}


# Operations whose result holds elements of their input, unchanged.
_MOVES = frozenset(
    f"aten.{name}"
    for name in ("stack", "cat", "index", "index_select", "gather", "take", "masked_select", "flip", "roll", "repeat")
)
_RULES: dict[str, Rule] = {
    **_rules(_product, "mm bmm addmm baddbmm"),
    **_rules(_reduction, "sum mean prod amax amin logsumexp var std linalg_vector_norm all any"),
    **_rules(_along, "_softmax _log_softmax _safe_softmax cumsum cumprod logcumsumexp sort cummax cummin"),
    **_rules(_of_the_sample, "convolution native_group_norm"),
    **_rules(_normalised, "native_layer_norm"),
}
