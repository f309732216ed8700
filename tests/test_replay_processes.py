"""Bit for bit, in another process: a step captured in one, replayed in the next."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

WRITE = """
import sys, random
import numpy as np, torch
from nanguard.capture import StepSnapshot, write_capture, scalar_attributes
from nanguard.incident import Incident
from nanguard.rng import RngState
from replay_models import Net, Gan, a_batch
from nanguard.capture.running import _gradients
import lightning as L

out, kind = sys.argv[1:3]
L.seed_everything(5, verbose=False)
model = Gan(closures=kind == "closures") if kind in ("gan", "closures") else Net(width=5)
autocast = kind == "bf16"
scale, accumulate = (256.0, 4) if kind == "scaled" else (1.0, 1)
found = {}

class Probe(L.Callback):
    # Takes the state before the step as the guard does, and the gradients after it.
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        np.random.randn(1)  # leaves a cached Gaussian behind
        if trainer.global_step < 3 * (2 if kind in ("gan", "closures") else 1):
            return
        self.rng = RngState.save()
        buffers = {name: b.clone() for name, b in module.named_buffers()}
        snapshot = StepSnapshot(
            step=trainer.global_step, epoch=trainer.current_epoch, batch_idx=batch_idx, args=(batch, batch_idx),
            rng=self.rng, module=module, buffers=buffers, optimizers=trainer.optimizers, scale=scale, accumulate=accumulate,
            precision={"autocast_device": "cpu", "autocast_dtype": "bfloat16"} if autocast else None,
        )
        incident = Incident(trainer.global_step, trainer.current_epoch, batch_idx, trigger="gradients")
        found["path"] = write_capture(out, snapshot, incident, optimizer=True)
    def on_after_backward(self, trainer, module):
        if "path" in found:
            found["grads"] = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if "path" in found:
            found["after"] = {n: p.detach().clone() for n, p in module.named_parameters()}
            if outputs:
                found["loss"] = outputs["loss"].detach()

original = type(model).training_step
def recorded(self, batch, batch_idx):
    loss = original(self, batch, batch_idx)
    if isinstance(loss, torch.Tensor):
        found["loss_exact"] = loss.detach().clone()
        return loss * scale if kind == "scaled" else loss
type(model).training_step = recorded

batches = [a_batch(seed=i) for i in range(4)]
trainer = L.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    accelerator="cpu", callbacks=[Probe()], precision="bf16-mixed" if autocast else "32-true", num_sanity_val_steps=0)
trainer.fit(model, torch.utils.data.DataLoader(batches, batch_size=None))
grads = {n: g / scale for n, g in found["grads"].items()} if kind == "scaled" else found["grads"]
if kind == "scaled":
    grads = {n: g / accumulate for n, g in grads.items()}
torch.save({"grads": grads, "loss": found.get("loss_exact")}, out + "/expected.pt")
print(found["path"])
"""

READ = """
import sys
import torch, nanguard
from replay_models import Net, Gan
path, kind, expected = sys.argv[1:4]
torch.manual_seed(99)
model = Gan(closures=kind == "closures") if kind in ("gan", "closures") else Net(width=5)
expected = torch.load(expected)
result = nanguard.replay(path, model)
assert result.finite and not result.reproduced, result
if expected["loss"] is not None:
    assert result.loss.dtype == expected["loss"].dtype
    assert torch.equal(result.loss, expected["loss"]), (result.loss, expected["loss"])
assert set(result.gradients) == set(expected["grads"]), (set(result.gradients), set(expected["grads"]))
for name, gradient in expected["grads"].items():
    assert torch.equal(gradient, result.gradients[name]), name
print("identical", len(expected["grads"]))
"""


def run(code: str, *arguments: object) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=200
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("kind", ["plain", "bf16", "gan", "closures", "scaled"])
def test_loss_and_gradients_are_those_of_the_run(kind: str, tmp_path: Path) -> None:
    path = run(WRITE, tmp_path, kind)
    assert run(READ, path, kind, tmp_path / "expected.pt").startswith("identical")
