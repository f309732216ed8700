"""Steps of every kind: accumulated, checkpointed, compiled, manual, transient, random."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from zoo.base import Small, bug, rows

CALLS = []


def _log(h, s):
    return torch.log(h.sigmoid() * s)  # <- here


def _root(h, s):
    return (h * s).square().sum(1).sqrt()  # <- here


@bug("aten.log", "log_of_zero", trainer={"accumulate_grad_batches": 3})
class SecondOfThreeMicroBatches(Small):
    def loss(self, h, y, s):
        return torch.log(h.sigmoid() * s).mean()  # <- here


@bug("aten.sqrt", "singular_gradient", phase="backward", trainer={"accumulate_grad_batches": 3})
class GradientOfAMicroBatch(Small):
    def loss(self, h, y, s):
        return (h * s).square().sum(1).sqrt().mean()  # <- here


@bug("aten.log", "log_of_zero", source=_log)
class CheckpointedForward(Small):
    def loss(self, h, y, s):
        return checkpoint(_log, h, s, use_reentrant=False).mean()


@bug("aten.sqrt", "singular_gradient", phase="backward", source=_root)
class CheckpointedBackward(Small):
    def loss(self, h, y, s):
        return checkpoint(_root, h, s, use_reentrant=False).mean()


@bug("aten.sqrt", "singular_gradient", phase="backward", source=_root)
class ReentrantBackward(Small):
    def loss(self, h, y, s):
        return checkpoint(_root, h, s, use_reentrant=True).mean()


@bug("aten.log", "log_of_zero", source=_log)
class ReentrantForward(Small):
    def loss(self, h, y, s):
        return checkpoint(_log, h, s, use_reentrant=True).mean()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, h, s):
        out = self.inner(h)
        return (out * s).square().sum(1).sqrt()  # <- here


@bug("aten.sqrt", "singular_gradient", phase="backward", module="blocks.1", source=Block)
class CheckpointedModule(Small):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity(), Block()])

    def loss(self, h, y, s):
        return checkpoint(self.blocks[1], h, s, use_reentrant=False).mean()


@bug("aten.sqrt", "singular_gradient", phase="backward", module="block", source=Block)
class CompiledModule(Small):
    def __init__(self):
        super().__init__()
        self.block = torch.compile(Block(), backend="eager")

    def loss(self, h, y, s):
        return self.block(h, s).mean()


@bug("aten.log", "log_of_zero", source=_log)
class CompiledFunction(Small):
    def loss(self, h, y, s):
        return torch.compile(_log, backend="aot_eager")(h, s).mean()


@bug(None, "unknown", phase=None, module=None, samples=None, indices=None, verdict="not_replayed", source=_log)
class ManualOptimization(Small):
    """Two optimizers; the second loss fails."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        x, _, s = batch
        one, two = self.optimizers()
        for optimizer, loss in ((one, self.body(x).square().mean()), (two, _log(self.critic(x), s).mean())):
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(module.parameters(), lr=0.01) for module in (self.body, self.critic)]


@bug(
    None,
    "bad_input",
    phase=None,
    module=None,
    samples=None,
    indices=None,
    verdict="not_replayed",
    tensor="batch[0]",
    data=lambda: [(x / s, y, s) for x, y, s in rows()],
    source=_log,
)
class ManualWithBadInput(Small):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.body(batch[0]).square().mean())
        optimizer.step()


@bug(None, "transient", phase=None, module=None, samples=None, indices=None, verdict="transient", bad=(), source=_log)
class FailsOnce(Small):
    """What counts the calls cannot be put back."""

    def __init__(self):
        super().__init__()
        CALLS.clear()

    def loss(self, h, y, s):
        CALLS.append(0)
        return F.cross_entropy(h, y) * (float("nan") if len(CALLS) == 2 else 1.0)


@bug("aten.div", "division_by_zero", samples=None, bad=())
class DroppedAltogether(Small):
    """Dropout leaves nothing of one sample. With the same draws any batch fails; others of them are well."""

    def loss(self, h, y, s):
        drawn = torch.rand(len(h), 1)
        keep = (drawn > drawn.min()).float() if self.unlucky else torch.ones_like(drawn)
        kept = h.abs() * keep
        return (kept / kept.sum(1, keepdim=True)).square().mean()  # <- here

    def on_train_batch_start(self, batch, batch_idx):
        self.unlucky = batch_idx == 1


@bug("aten.div", "division_by_zero", samples=None, bad=(), count=1)
class FailsAtTheSecondStep(Small):
    """A counter of the module's own: with it, every batch fails."""

    def loss(self, h, y, s):
        warmup = float(self.global_step - 1) if self.global_step < 2 else 1.0
        return (h.square() / warmup).mean()  # <- here


@bug("aten.log", "log_of_zero")
class LossInADictionary(Small):
    def loss(self, h, y, s):
        return {"loss": torch.log(h.sigmoid() * s).mean(), "extra": h.detach()}  # <- here


@bug("aten.log", "log_of_zero", trainer={"precision": "16-mixed"})
class SixteenBitOnTheCpu(Small):
    def loss(self, h, y, s):
        p = h.float().sigmoid() * s
        return torch.log(p).mean()  # <- here


@bug("aten.sqrt", "singular_gradient", phase="backward")
class GradientPenalty(Small):
    """The norm of an inner gradient that is 0."""

    def training_step(self, batch, batch_idx):
        x, _, s = batch
        x = x.clone().requires_grad_()
        out = (self.body(x).square() * s).sum()
        (inner,) = torch.autograd.grad(out, x, create_graph=True)
        return (inner.square().sum(1).sqrt() - 1).square().mean()  # <- here


@bug("aten.log", "log_of_zero", count=None)
class WithLbfgs(Small):
    def loss(self, h, y, s):
        return -torch.log(h.sigmoid() * s + 1e-3 * s).mean()  # <- here

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=2)


@bug("aten.exp", "overflow", bad=(), samples=None, batch_idx=0, count=None)
class LeapsWithinTheFirstStep(Small):
    """LBFGS calls the step again after it has moved the parameters: what fails is that call, from those parameters."""

    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.body.weight)

    def loss(self, h, y, s):
        return torch.exp(h.abs() + 1).mean()  # <- here

    def training_step(self, batch, batch_idx):
        _, y, s = batch
        return self.loss(self.body(torch.ones(len(y), 4)), y, s)

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=1e4, max_iter=4)


@bug(
    None,
    "unknown",
    phase=None,
    module=None,
    samples=None,
    indices=None,
    verdict="not_replayed",
    source=_log,
    batch_idx=0,
)
class FetchesByItself(Small):
    """Lightning does not know which batch it is before the step has fetched it."""

    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        x, _, s = batch
        return _log(self.body(x), s).mean()
