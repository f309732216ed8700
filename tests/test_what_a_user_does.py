"""The main job, sentence by sentence, each with a real Trainer."""

from __future__ import annotations

import inspect
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import nanguard
from nanguard import NanGuard, NanGuardWarning, NonFiniteError

ROOT = Path(__file__).parent.parent
LOGITS = torch.tensor([[2.0, 1.0, 0.1], [1000.0, 1.0, -1000.0], [3.0, 2.0, 1.0]])
TARGET = torch.tensor([0, 2, 1])


def softmax(z):
    scores = z.exp()
    return scores / scores.sum(1, keepdim=True)


class HandRolled(pl.LightningModule):
    """A classifier as in thousands of tutorials; its logits are large from the first step on."""

    def __init__(self, scale: float = 400.0) -> None:
        super().__init__()
        self.scale = scale
        self.net = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))

    def training_step(self, batch, batch_idx):
        x, y = batch
        p = softmax(self.scale * self.net(x))
        picked = p[torch.arange(len(y)), y]
        loss = -torch.log(picked).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-5)


def images(bad=()):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 4, generator=generator), torch.randint(0, 3, (64,), generator=generator)
    for index in bad:
        x[index, 1] = float("nan")
    return DataLoader(TensorDataset(x, y), batch_size=8)


def fit(guard, model, loader, epochs=2):
    torch.manual_seed(0)
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[] if guard is None else [guard],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(model, loader)
    return trainer


@pytest.fixture
def model():
    torch.manual_seed(0)
    return HandRolled()


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def finite(module):
    return all(bool(torch.isfinite(value).all()) for value in module.state_dict().values())


def told(record):
    return [entry for entry in record if issubclass(entry.category, NanGuardWarning)]


def test_1_without_the_guard_the_weights_are_gone(model):
    fit(None, model, images())
    assert not finite(model)


def test_2_and_3_one_callback_and_the_run_does_not_die(model):
    guard = NanGuard(ROOT / "configs" / "default.yaml")
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        fit(guard, model, images())
    assert finite(model)
    assert guard.incidents == []
    # Told once for each place, in the user's file, on the user's line, with the line to write instead.
    messages = told(record)
    assert len(messages) == len(guard.swaps) == 2
    source, first = inspect.getsourcelines(HandRolled.training_step)
    line = first + next(i for i, text in enumerate(source) if "torch.log(picked)" in text)
    logarithm = next(swap for swap in guard.swaps if swap.original == "torch.log(picked)")
    assert (logarithm.file, logarithm.line, logarithm.count) == (__file__, line, 16)
    assert logarithm.replacement == '-F.cross_entropy(logits, y, reduction="none")'
    message = next(entry for entry in messages if "torch.log(picked)" in str(entry.message))
    assert (message.filename, message.lineno) == (__file__, line)
    assert logarithm.replacement in str(message.message)


def test_2_and_3_the_guarded_run_is_the_run_with_cross_entropy(model):
    class Stable(HandRolled):
        def training_step(self, batch, batch_idx):
            x, y = batch
            loss = F.cross_entropy(self.scale * self.net(x), y)
            self.log("loss", loss)
            return loss

    torch.manual_seed(0)
    reference = Stable()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NanGuardWarning)
        guarded = fit(NanGuard(), model, images())
    expected = fit(None, reference, images())
    torch.testing.assert_close(guarded.callback_metrics, expected.callback_metrics)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_4_raise_the_optimizer_does_not_step_and_the_user_is_told(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    guard = NanGuard(captures="bad")
    with pytest.raises(NonFiniteError) as caught:
        fit(guard, model, images(bad=[3]))
    incident = caught.value.incident
    assert guard.incidents == [incident]
    assert (incident.step, incident.batch_idx, incident.trigger, incident.action) == (0, 0, "loss", "raised")
    assert (incident.cause, incident.origin.tensor, incident.origin.module) == ("bad_input", "batch[0]", "net.0")
    assert (incident.samples, incident.dataset_indices) == ((3,), (3,))
    assert Path(incident.capture).name == "step-00000000-rank0"
    assert str(caught.value).splitlines()[-1].startswith(f"nanguard replay {incident.capture} --module ")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_4_skip_goes_on_and_says_which_images(model):
    guard = NanGuard(ROOT / "configs" / "survive.yaml", captures="bad")
    with pytest.warns(NanGuardWarning, match=r"samples  3 of the batch = 43 of the dataset"):
        fit(guard, model, images(bad=[5, 43]), epochs=1)
    assert finite(model)
    assert [incident.dataset_indices for incident in guard.incidents] == [(5,), (43,)]
    assert [incident.action for incident in guard.incidents] == ["skipped", "skipped"]


def test_5_a_week_later_pytest_replays_the_batch(model, pytester):
    """In processes of their own: one trains and fails, then pytest fails until the code is fixed."""
    header = "import lightning.pytorch as pl, torch\nfrom torch import nn\n"
    module = header + inspect.getsource(softmax) + inspect.getsource(HandRolled)
    pytester.makepyfile(model=module)
    pytester.makepyfile(
        train=textwrap.dedent(
            """
            import torch, lightning.pytorch as pl
            from torch.utils.data import DataLoader, TensorDataset
            from nanguard import NanGuard
            from model import HandRolled
            torch.manual_seed(0)
            x, y = torch.randn(16, 4), torch.randint(0, 3, (16,))
            x[3, 1] = float("nan")
            trainer = pl.Trainer(max_epochs=1, callbacks=[NanGuard(captures="bad")], logger=False,
                                 enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
            trainer.fit(HandRolled(), DataLoader(TensorDataset(x, y), 8))
            """
        )
    )
    done = subprocess.run([sys.executable, "train.py"], cwd=pytester.path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    command = done.stderr.strip().splitlines()[-1]
    captured = pytester.path / "bad" / "step-00000000-rank0"
    assert command == f"nanguard replay {captured} --module model:HandRolled"

    pytester.makepyfile(
        test_bad="""
        import nanguard
        from model import HandRolled

        def test_bad_batches(nanguard_capture):
            nanguard.assert_finite_step(HandRolled(), nanguard_capture)
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "--nanguard-captures", "bad", "test_bad.py")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*step-00000000-rank0*", "*cause    bad input*"])

    fixed = module.replace("x, y = batch", "x, y = batch\n        x = x.nan_to_num()")
    assert fixed != module
    pytester.path.joinpath("model.py").write_text(fixed)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "--nanguard-captures", "bad", "test_bad.py")
    result.assert_outcomes(passed=1)


class Textbook(pl.LightningModule):
    """The three rows as parameters, so that one step of gradient descent shows their gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(LOGITS.clone())

    def training_step(self, batch, batch_idx):
        p = softmax(self.logits)
        loss = -torch.log(p[torch.arange(3), TARGET]).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def test_the_textbook_case():
    once = DataLoader(torch.zeros(1, 1))
    naive = Textbook()
    trainer = fit(None, naive, once, epochs=1)
    assert trainer.callback_metrics["loss"] == float("inf")
    assert torch.isnan(naive.logits[1]).all()

    guarded = Textbook()
    with pytest.warns(NanGuardWarning, match=r"Write instead: -F\.cross_entropy\("):
        trainer = fit(NanGuard(), guarded, once, epochs=1)
    reference = LOGITS.clone().requires_grad_()
    loss = F.cross_entropy(reference, TARGET)
    loss.backward()
    assert trainer.callback_metrics["loss"].item() == pytest.approx(667.2748, abs=1e-4)
    assert torch.equal(trainer.callback_metrics["loss"], loss.detach())
    assert torch.equal(guarded.logits.detach(), LOGITS - reference.grad)


def test_the_textbook_sample_alone():
    z = torch.tensor([[1000.0, 1.0, -1000.0]], requires_grad=True)
    with nanguard.stabilize():
        loss = -torch.log(softmax(z)[0, 2])
    loss.backward()
    assert loss.item() == 2000
    assert torch.isfinite(z.grad).all()
