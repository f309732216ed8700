"""What a Lightning Trainer keeps about a step, and how to put it back. Works on the objects it is given; imports no lightning.

These reach into attributes that Lightning does not document; each function names the one it relies on.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from nanguard.archive import Circumstances
from nanguard.errors import NanGuardError
from nanguard.patches import Patches
from nanguard.peers import Peers
from nanguard.source import is_users_hook
from nanguard.through_trainer import silent
from nanguard.values import Undo
from nanguard.window import Moment

__all__ = [
    "IGNORED",
    "autocast",
    "changes_before_step",
    "circumstances",
    "gives_iterators",
    "hold_schedulers",
    "loss_of_step",
    "moment_of",
    "optimizer_progress",
    "peers_of",
    "quiet",
    "refuse_engines",
    "save_manual",
    "save_results",
    "validated_values",
    "validation_loader",
]

# Attributes through which Lightning ties a module to its Trainer; they are not the module's state.
IGNORED = (
    "_trainer",
    "_fabric",
    "_current_fx_name",
    "_metric_attributes",
    "_compiler_ctx",
    "_device",
    "_dtype",
    "_device_mesh",
    "_jit_internal",
    "_log_hyperparams",
    "_fabric_optimizers",
    "_strict_loading",
)
_SHOWN = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")


def save_results(trainer: Any) -> Undo:
    """Remembers what ``self.log`` has accumulated in the training loop; relies on ``epoch_loop._results``.

    Lightning replaces the accumulated tensors rather than writing into them, so remembering the references is enough.
    What it shows of them (``trainer.callback_metrics`` and the like) also holds the metrics of validation, which stay.
    """
    results = trainer.fit_loop.epoch_loop._results
    kept = {key: (metric, dict(metric.__dict__)) for key, metric in results.items()}
    connector = trainer._logger_connector
    shown = {name: dict(getattr(connector, name)) for name in _SHOWN}

    def undo() -> None:
        for key in {metric.meta.name + suffix for metric in results.values() for suffix in ("", "_step", "_epoch")}:
            for name, values in shown.items():
                if key in values:
                    getattr(connector, name)[key] = values[key]
                else:
                    getattr(connector, name).pop(key, None)
        for key in [key for key in results if key not in kept]:
            dict.pop(results, key)
        for key, (metric, values) in kept.items():
            metric.__dict__.clear()
            metric.__dict__.update(values)
            dict.__setitem__(results, key, metric)

    return undo


def save_manual(trainer: Any) -> Undo:
    """Remembers what a step with manual optimization steps and toggles by itself: schedulers, and which parameters learn."""
    learning = [(parameter, parameter.requires_grad) for parameter in trainer.lightning_module.parameters()]
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    states = [copy.deepcopy(scheduler.state_dict()) for scheduler in schedulers]

    def undo() -> None:
        for parameter, requires_grad in learning:
            if parameter.requires_grad is not requires_grad:
                parameter.requires_grad_(requires_grad)
        for scheduler, state in zip(schedulers, states, strict=True):
            scheduler.load_state_dict(copy.deepcopy(state))

    return undo


def hold_schedulers(trainer: Any, patches: Patches) -> None:
    """Keeps the learning-rate schedulers that step with the optimizer from stepping, until `patches` is undone."""
    for config in trainer.lr_scheduler_configs:
        if config.interval == "step":
            patches.set(config, "interval", "held")


def optimizer_progress(trainer: Any) -> list[Any]:
    """The counters behind ``global_step``: relies on the ``optim_progress`` of both optimization loops."""
    loop = trainer.fit_loop.epoch_loop
    if trainer.lightning_module.automatic_optimization:
        step = loop.automatic_optimization.optim_progress.optimizer.step
    else:
        step = loop.manual_optimization.optim_step_progress
    return [step.total, step.current]


def save_progress(trainer: Any) -> Undo:
    """Remembers ``global_step``."""
    kept = [(tracker, dict(vars(tracker))) for tracker in optimizer_progress(trainer)]

    def undo() -> None:
        for tracker, values in kept:
            vars(tracker).update(values)

    return undo


def validated_values(trainer: Any) -> list[tuple[str, Tensor]]:
    """What ``self.log`` has accumulated in the validation loop, but for metrics; relies on ``val_loop._results``."""
    results = trainer.fit_loop.epoch_loop.val_loop._results
    return [(str(metric.meta.name), metric.value) for metric in results.values() if metric.is_tensor]


def validation_loader(trainer: Any, number: int) -> Any:
    """The loader that a validation batch came from, where that is one; relies on ``val_loop._combined_loader``."""
    loaders: Any = getattr(trainer.fit_loop.epoch_loop.val_loop, "_combined_loader", None)
    if getattr(loaders, "_mode", "") != "sequential":  # a batch of several loaders at once
        return None
    return loaders.flattened[number] if number < len(loaders.flattened) else None


def changes_before_step(trainer: Any, module: Any) -> bool:
    """Whether the user's own code runs after a batch has begun and before its step, and may change the one or the other."""
    return any(is_users_hook(owner, "on_train_batch_start") for owner in (module, *trainer.callbacks))


def peers_of(trainer: Any) -> Peers:
    """The processes that train together, by the collectives of the Trainer's strategy."""
    strategy = trainer.strategy

    def gather(number: int) -> list[int]:
        numbers: list[int] = (
            strategy.all_gather(torch.tensor(int(number), device=strategy.root_device)).reshape(-1).tolist()
        )
        return numbers

    return Peers(
        rank=trainer.global_rank, any=lambda flag: strategy.reduce_boolean_decision(flag, all=False), gather=gather
    )


def moment_of(trainer: Any, batch_idx: int) -> Moment:
    """Where in the run a batch is."""
    return Moment(trainer.global_step, trainer.current_epoch, batch_idx, trainer.global_rank)


def gives_iterators(loop: Any) -> bool:
    """Whether a loop gives its step an iterator, from which the step fetches for itself; relies on ``_data_fetcher``."""
    return type(loop._data_fetcher).__name__ == "_DataLoaderIterDataFetcher"


def refuse_engines(trainer: Any) -> None:
    """Raises `NanGuardError` where the strategy is one that a guard cannot work with."""
    name = type(trainer.strategy).__name__
    if "DeepSpeed" in name:
        raise NanGuardError(
            f"NanGuard: found the strategy {name}, whose engine steps the optimizer by itself; expected one that steps through "
            "Lightning (DDP, FSDP, a single device). Remove the callback, or use FSDP"
        )


def loss_of_step(trainer: Any, module: Any, args: tuple[Any, ...]) -> Tensor | None:
    """Calls the training step and returns what Lightning differentiates, if anything."""
    output = module.training_step(*args)
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, Tensor):
        return None
    parts = trainer.accumulate_grad_batches
    return loss / parts if parts > 1 else loss  # a division that the user did not write could be blamed


def circumstances(trainer: Any, module: Any) -> Circumstances:
    """What a replay has to know about the run; relies on ``precision_plugin.scaler``, where there is one."""
    plugin = trainer.precision_plugin
    scaler = getattr(plugin, "scaler", None)
    return Circumstances(
        optimizers=tuple(trainer.optimizers),
        precision=autocast(plugin.forward_context),
        scale=float(scaler.get_scale()) if scaler is not None else None,
        accumulate=trainer.accumulate_grad_batches,
        hparams=dict(module.hparams),
        trainer={"max_epochs": trainer.max_epochs, "max_steps": trainer.max_steps},
    )


def autocast(context: Callable[[], AbstractContextManager[Any]]) -> dict[str, str] | None:
    """What autocast the precision plugin enters, read off from inside it."""
    with context():
        for device in ("cuda", "cpu"):
            if torch.is_autocast_enabled(device):
                dtype = str(torch.get_autocast_dtype(device)).removeprefix("torch.")
                return {"autocast_device": device, "autocast_dtype": dtype}
    return None


@contextmanager
def quiet(trainer: Any, module: Any, function: str = "training_step") -> Iterator[None]:
    """A step that is run again logs nothing, prints nothing and reaches no logger."""
    patches = Patches()
    loggers, name = trainer.loggers, module._current_fx_name
    for method in ("log", "log_dict", "print"):
        patches.set(module, method, _nothing)
    trainer.loggers = [silent(logger) for logger in loggers]
    module._current_fx_name = function
    try:
        yield
    finally:
        module._current_fx_name = name
        trainer.loggers = loggers
        patches.undo()


@functools.wraps(print)
def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands in for methods that would tell somebody about a step that is only being run again."""
