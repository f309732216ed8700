"""Models whose steps use everything that a replay has to put back."""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Net(L.LightningModule):
    """Dropout, BatchNorm, python and numpy randomness, a counter, a growing list; 0 / 0 where the batch says so."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Dropout(0.5), nn.Linear(width, 1))
        self.seen = 0
        self.temperature = 1.0
        self.history: list[float] = []
        self.register_buffer("cache", torch.zeros(2), persistent=False)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen += 1
        self.history.append(float(self.seen))
        noise = float(np.random.rand()) + float(np.random.randn())
        output = self.body(batch["x"]) * self.seen + noise + torch.rand(()) + self.cache.sum()
        self.cache += 1
        self.log("noise", noise)
        self.log_dict({"a": noise})
        self.print("hello", self.current_epoch, self.global_step)
        if self.logger is not None:
            self.logger.experiment.add_scalar("a", noise, self.global_step)
        return F.mse_loss(output, batch["y"]) / self.temperature + (batch["x"] / batch["scale"]).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Gan(L.LightningModule):
    """Manual optimization: the discriminator steps, and the generator fails after it."""

    def __init__(self, closures: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.closures = closures
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 2))
        self.critic = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        opt_g, opt_d = self.optimizers()
        assert self.lr_schedulers() is not None
        fake = self.generator(batch["x"])
        self.toggle_optimizer(opt_d)
        d_loss = self.critic(batch["real"]).mean() - self.critic(fake.detach()).mean()
        self._take(opt_d, d_loss)
        self.clip_gradients(opt_d, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        self.untoggle_optimizer(opt_d)
        with opt_g.toggle_model():
            self._take(opt_g, (self.critic(fake) / batch["scale"]).mean())
        self.log("d", d_loss)
        self.lr_schedulers().step()

    def _take(self, optimizer: Any, loss: Tensor) -> None:
        if self.closures:

            def closure() -> Tensor:
                optimizer.zero_grad()
                self.manual_backward(loss)
                return loss

            optimizer.step(closure)
            return
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self) -> Any:
        optimizers = [torch.optim.Adam(part.parameters(), lr=0.1) for part in (self.generator, self.critic)]
        return optimizers, [torch.optim.lr_scheduler.StepLR(optimizers[0], 1)]


class SingularGradient(L.LightningModule):
    """A finite loss, a gradient that is not: the derivative of sqrt at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1, bias=False)

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        return {"loss": self.layer(batch).sqrt().sum()}


def a_batch(scale: float = 1.0, rows: int = 6, seed: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(rows, 4, generator=generator),
        "y": torch.randn(rows, 1, generator=generator),
        "real": torch.randn(rows, 2, generator=generator),
        "scale": torch.full((rows, 1), scale),
    }
