"""What a LightningModule asks its Trainer for, without a Trainer. Knows Lightning by the names of attributes alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from nanguard.capture.manual import Optimizers

__all__ = ["TrainerStandIn", "attach"]

_SILENCED = ("log", "log_dict", "print")


def attach(module: nn.Module, trainer: TrainerStandIn, function: str) -> None:
    """Gives the module, and LightningModules inside it, the stand-in for a Trainer, and silences their logging.

    Writes into the instances' dictionaries only, which the caller puts back.
    """
    for part in module.modules():
        own = part.__dict__
        if "_trainer" not in own:
            continue
        own["_trainer"] = trainer
        own["_fabric"] = None
        own["_current_fx_name"] = function
        own.update(dict.fromkeys(_SILENCED, _nothing))


@final
class TrainerStandIn:
    """Answers the questions that a training step puts to its Trainer.

    Args:
        facts: name -> value: what is known about the Trainer of the captured run, and what the user adds.
        step, epoch, rank: those of the captured step.
        backward: called with a loss that `manual_backward` is given.
        device: the module's device.
    """

    def __init__(
        self,
        facts: Mapping[str, Any],
        *,
        step: int,
        epoch: int,
        rank: int,
        device: torch.device,
        backward: Callable[..., None],
    ) -> None:
        self.global_step, self.current_epoch, self.global_rank, self.local_rank = step, epoch, rank, rank
        self.is_global_zero, self.world_size, self.num_devices, self.num_nodes = rank == 0, 1, 1, 1
        self.training, self.sanity_checking, self.validating, self.testing, self.predicting = (
            True,
            False,
            False,
            False,
            False,
        )
        self.barebones, self.should_stop, self.is_last_batch = False, False, False
        self.logger, self.loggers = _Sink(), [_Sink()]
        self.callbacks: list[Any] = []
        self.progress_bar_callback = self.progress_bar_metrics = self.datamodule = None
        self.callback_metrics: dict[str, Any] = {}
        self.logged_metrics: dict[str, Any] = {}
        self.optimizers: list[Any] = []
        self.lr_scheduler_configs: list[Any] = []
        self.gradient_clip_val = self.gradient_clip_algorithm = None
        self.precision_plugin = SimpleNamespace(clip_gradients=_clip_gradients, scaler=None)
        self.strategy = SimpleNamespace(
            backward=backward,
            root_device=device,
            all_gather=_same,
            reduce=_same,
            broadcast=_same,
            barrier=_nothing,
            is_global_zero=rank == 0,
            global_rank=rank,
            local_rank=rank,
            world_size=1,
            precision_plugin=self.precision_plugin,
            model=None,
            _lightning_optimizers=[],
        )
        for name, value in facts.items():
            setattr(self, name, value)

    def use(self, optimizers: Optimizers) -> None:
        """Hands out the optimizers and schedulers of a module that optimizes by itself."""
        self.optimizers = self.strategy._lightning_optimizers = optimizers.optimizers
        self.strategy.optimizers = optimizers.optimizers
        self.lr_scheduler_configs = [SimpleNamespace(scheduler=scheduler) for scheduler in optimizers.schedulers]

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"a replay has no Trainer, and the training step asks for `trainer.{name}`; "
            f"give it with replay(..., trainer={{{name!r}: value}})"
        )


@final
class _Sink:
    """A logger that takes everything and keeps nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: object, **kwargs: object) -> Any:
        return self


def _nothing(*args: object, **kwargs: object) -> None:
    """In place of logging and printing."""


def _same(value: Any, *args: object, **kwargs: object) -> Any:
    """A collective in a group of one."""
    return value


def _clip_gradients(optimizer: Any, clip_val: float | None = 0.0, gradient_clip_algorithm: Any = "norm") -> None:
    if not clip_val or clip_val <= 0:
        return
    parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    if str(getattr(gradient_clip_algorithm, "value", gradient_clip_algorithm)) == "value":
        torch.nn.utils.clip_grad_value_(parameters, clip_val)
    else:
        torch.nn.utils.clip_grad_norm_(parameters, clip_val)
