"""What becomes of hooks where modules are copied, stored, replaced, added and taken away while they are watched."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainers import Net, fit, policy, rows
from watched import Simple, hooks_of

ALL = {"modules": ["*"], "every_n_steps": 1}


def stored(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": stored}


class Copying(Net):
    how = staticmethod(copy.deepcopy)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.copies = [self.how(self.block)]
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES)
def test_a_copy_that_was_made_in_a_watched_step_loses_its_hooks_when_it_is_called(tmp_path: Path, how: Any) -> None:
    def make() -> Net:
        model = Copying()
        model.how = how
        return model

    run = fit(tmp_path, make, rows(3), policy(tmp_path, watch=ALL))
    assert run.incidents == []
    assert hooks_of(run.model) == []
    (made,) = run.model.copies
    assert hooks_of(made)
    seen = []
    made.linear.register_forward_hook(lambda module, args, kwargs, out: seen.append(kwargs), with_kwargs=True)
    x = torch.ones(4, 4)
    assert torch.equal(made.linear(x), nn.functional.linear(x, made.linear.weight, made.linear.bias))
    made(x)
    assert len(seen) == 2  # hooks of others stay
    assert hooks_of(made) == []
    other = fit(tmp_path, make, rows(3), policy(tmp_path)).model.state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in run.model.state_dict().items())


class Changing(Simple):
    """Replaces a layer, adds one and takes one away."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.old = nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(4, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0]
        if batch_idx == 1:
            self.one = nn.Linear(4, 4).requires_grad_(False)
            self.new = nn.Linear(4, 4)
            self.taken = [self.old]
            del self.old
        if batch_idx in (3, 4):
            (self.one if batch_idx == 3 else self.new)(x.detach() * torch.nan)
        return self.two(self.one(x)).square().mean()


@pytest.mark.parametrize("modules", [["*"], ["one", "old", "[on]*"]])
def test_modules_that_come_later_are_watched(tmp_path: Path, modules: list[str]) -> None:
    watch = {**ALL, "modules": modules}
    run = fit(tmp_path, Changing, rows(5), policy(tmp_path, watch=watch))
    assert [(i.trigger, i.batch_idx) for i in run.incidents] == [("activations", 3), ("activations", 4)]
    assert ["`one`" in run.incidents[0].detail, "`new`" in run.incidents[1].detail] == [True, True]
    assert hooks_of(run.model) == hooks_of(run.model.taken[0]) == []
