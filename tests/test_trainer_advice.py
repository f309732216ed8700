"""What a Trainer tells about computations that are left as they are, and what its policy repairs."""

import json
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from trainers import make_trainer

import nanguard
from nanguard import NanGuard, NonFiniteError, NumericalAdvice, Policy

LINES = {text.strip(): number for number, text in enumerate(Path(__file__).read_text().splitlines(), 1)}


class Probabilities(pl.LightningModule):
    """Its last layer is a sigmoid, and its weights make it sure of what is wrong."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.net = nn.Linear(2, 1, bias=False)
        nn.init.constant_(self.net.weight, scale)

    def training_step(self, batch, batch_idx):
        x, y = batch
        p = torch.sigmoid(self.net(x)).squeeze(1)
        return self.loss(p, y)

    def loss(self, p, y):
        return F.binary_cross_entropy(p, y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Twice(Probabilities):
    def loss(self, p, y):
        both = torch.softmax(torch.stack([-p, p], 1), 1)
        return F.cross_entropy(both, y.long())


class Saturated(Probabilities):
    def loss(self, p, y):
        return torch.log(p + 1e-8).mean()


def fit(tmp_path, model, guard, batches=6):
    data = [(torch.ones(2), torch.tensor(0.0)) for _ in range(2 * batches)]
    trainer = make_trainer(tmp_path, [guard], max_epochs=1)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        trainer.fit(model, DataLoader(data, batch_size=2))
    return [entry for entry in record if issubclass(entry.category, NumericalAdvice)]


def test_each_place_is_told_once(tmp_path):
    guard = NanGuard(captures=tmp_path)
    (told,) = fit(tmp_path, Twice(), guard)
    (advice,) = guard.advice
    line = LINES["return F.cross_entropy(both, y.long())"]
    assert (advice.rule, advice.file, advice.line) == ("NG301", __file__, line)
    assert advice.count >= 3  # the stabiliser switches itself off where there is nothing to replace
    assert (told.filename, told.lineno) == (__file__, line)
    assert "NG301" in str(told.message)
    assert guard.swaps == []


def test_what_the_backward_pass_establishes_is_told_too(tmp_path):
    guard = NanGuard(captures=tmp_path)
    (told,) = fit(tmp_path, Saturated(scale=-30.0), guard)
    assert [advice.rule for advice in guard.advice] == ["NG306"]
    assert told.lineno == LINES["return torch.log(p + 1e-8).mean()"]


def test_a_loss_that_saturates_is_told_and_left_as_it_is(tmp_path):
    guard, model = NanGuard(captures=tmp_path), Probabilities(scale=30.0)
    (told,) = fit(tmp_path, model, guard)
    assert "binary_cross_entropy_with_logits" in str(told.message)
    assert [(advice.rule, advice.count) for advice in guard.advice] == [("NG304", 6)]
    assert guard.swaps == []
    assert torch.equal(model.net.weight.detach(), torch.full((1, 2), 30.0))  # its gradient is 0


def test_the_policy_repairs_it(tmp_path):
    policy = Policy.parse({"stabilize": {"saturated": "repair"}, "capture": {"directory": str(tmp_path)}})
    guard, model = NanGuard(policy), Probabilities(scale=30.0)
    assert fit(tmp_path, model, guard) == []
    assert guard.advice == []
    assert [(swap.rule, swap.count) for swap in guard.swaps] == [("NG304", 6)]
    torch.testing.assert_close(model.net.weight.detach(), torch.full((1, 2), 30.0 - 6 * 0.1))


@pytest.mark.parametrize("saturated", ["report", "repair"])
def test_a_capture_knows_and_is_replayed_so(tmp_path, saturated):
    class Bad(Probabilities):
        def loss(self, p, y):
            return F.binary_cross_entropy(p, y) * float("inf")

    policy = Policy.parse({"stabilize": {"saturated": saturated}, "capture": {"directory": str(tmp_path / "bad")}})
    with pytest.raises(NonFiniteError) as raised:
        fit(tmp_path, Bad(scale=0.1), NanGuard(policy))
    path = Path(raised.value.incident.capture)
    capture = nanguard.load_capture(path)
    recorded = capture.manifest["step"]["stabilize"]
    assert recorded == {"enabled": True, "epsilon": "keep", "saturated": saturated}
    with warnings.catch_warnings():
        warnings.simplefilter("error", NumericalAdvice)
        assert nanguard.replay(capture, Bad()).reproduced


def test_captures_of_old_are_replayed_as_they_were(tmp_path):
    test_a_capture_knows_and_is_replayed_so(tmp_path, "report")
    (manifest,) = tmp_path.glob("bad/*/manifest.json")
    content = json.loads(manifest.read_text())
    del content["step"]["stabilize"]["saturated"]
    manifest.write_text(json.dumps(content))
    assert nanguard.load_capture(manifest.parent).manifest["step"]["stabilize"] == {"enabled": True, "epsilon": "keep"}
