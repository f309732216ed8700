"""Bit for bit, in another process: a step captured in one, replayed in the next."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

WRITE = """
import sys
from pathlib import Path
import lightning as L, numpy as np, torch
from nanguard.capture import StepSnapshot, write_capture
from nanguard.incident import Incident
from nanguard.rng import RngState
from replay_models import Gan, Net, a_batch

class Probe(L.Callback):
    # Takes the state before the step as a guard does, and the loss and the gradients after it.
    def __init__(self, out, kind):
        self.out, self.kind, self.expected, self.path = out, kind, {}, None

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        np.random.randn(1)  # leaves a cached Gaussian behind
        if batch_idx < 3:
            return
        bf16 = {"autocast_device": "cpu", "autocast_dtype": "bfloat16"}
        snapshot = StepSnapshot(
            step=trainer.global_step, epoch=trainer.current_epoch, batch_idx=batch_idx, args=(batch, batch_idx),
            rng=RngState.save(), module=module, optimizers=trainer.optimizers,
            precision=bf16 if self.kind == "bf16" else None,
            accumulate=2 if self.kind == "accumulate" else 1,
            buffers={name: buffer.clone() for name, buffer in module.named_buffers()},
        )
        incident = Incident(trainer.global_step, trainer.current_epoch, batch_idx, trigger="gradients")
        self.path = write_capture(self.out, snapshot, incident, optimizer=True)
        if self.kind == "accumulate":
            trainer.optimizers[0].zero_grad()  # the micro-batch's own part of the gradient

    def on_before_backward(self, trainer, module, loss):
        if self.path and module.automatic_optimization:
            self.expected["loss"] = loss.detach() * (2 if self.kind == "accumulate" else 1)

    def on_after_backward(self, trainer, module):
        if self.path:
            self.expected["gradients"] = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}

for kind in sys.argv[2:]:
    L.seed_everything(5, verbose=False)
    model = Gan(closures=kind == "closures") if kind in ("gan", "closures") else Net(width=5)
    probe = Probe(Path(sys.argv[1], kind), kind)
    trainer = L.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu", callbacks=[probe], precision="bf16-mixed" if kind == "bf16" else "32-true",
        accumulate_grad_batches=2 if kind == "accumulate" else 1,
    )
    trainer.fit(model, torch.utils.data.DataLoader([a_batch(seed=i) for i in range(4)], batch_size=None))
    torch.save({**probe.expected, "path": str(probe.path)}, f"{sys.argv[1]}/{kind}.pt")
"""

READ = """
import sys
import nanguard, torch
from replay_models import Gan, Net

torch.manual_seed(99)
for kind in sys.argv[2:]:
    expected = torch.load(f"{sys.argv[1]}/{kind}.pt")
    model = Gan(closures=kind == "closures") if kind in ("gan", "closures") else Net(width=5)
    result = nanguard.replay(expected["path"], model)
    same = result.finite and not result.reproduced
    if "loss" in expected:
        same = same and result.loss.dtype == expected["loss"].dtype and torch.equal(result.loss, expected["loss"])
    if "gradients" in expected:
        gradients = expected["gradients"]
        same = same and gradients and gradients.keys() == result.gradients.keys()
        same = same and all(torch.equal(gradients[name], result.gradients[name]) for name in gradients)
    print(kind, "identical" if same else f"different: {result} {expected}")
"""

KINDS = ("plain", "bf16", "accumulate", "gan", "closures")


def run(code: str, *arguments: object) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=200
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_loss_and_gradients_are_those_of_the_run(tmp_path: Path) -> None:
    run(WRITE, tmp_path, *KINDS)
    assert run(READ, tmp_path, *KINDS).splitlines() == [f"{kind} identical" for kind in KINDS]
