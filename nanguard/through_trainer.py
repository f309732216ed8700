"""What a step may reach through its Trainer: settings of optimizers, schedules, loggers, the data. Imports no lightning.

A step that is only run again for a diagnosis must leave all of that as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

from nanguard.values import Undo, save_value

__all__ = ["silent", "undisturbed"]


@contextmanager
def undisturbed(trainer: Any) -> Iterator[None]:
    """What steps have done to the Trainer, its optimizers' settings, schedules and data inside the block is undone."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    undos = [
        *(_settings(group, "params") for group in groups),
        *(_settings(vars(scheduler), "optimizer") for scheduler in schedulers),
        *(save_value(entry) for entry in _data(trainer)),
    ]
    stops = trainer.should_stop
    try:
        yield
    finally:
        for undo in undos:
            undo()
        trainer.should_stop = stops


def _settings(held: dict[str, Any], owner: str) -> Undo:
    """Remembers the entries of a dictionary but for the one that leads to parameters."""
    values = {key: value for key, value in held.items() if key != owner}
    inside = save_value(values)

    def undo() -> None:
        for key in [key for key in held if key != owner and key not in values]:
            del held[key]
        inside()
        held.update(values)

    return undo


def _data(trainer: Any) -> Iterator[Any]:
    yield getattr(trainer, "datamodule", None)
    loader = getattr(trainer, "train_dataloader", None)
    for name in ("dataset", "sampler", "batch_sampler"):
        yield getattr(loader, name, None)


def silent(logger: Any) -> Any:
    """A stand-in for a logger of a Trainer that tells nobody anything."""
    return _Silent(logger)


@final
class _Silent:
    """Shows the plain attributes of a logger, and swallows all calls."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._logger)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _NOTHING if name == "experiment" else getattr(self._logger, name)
        return value if isinstance(value, (str, int, float, Path, type(None))) else _NOTHING


@final
class _Nothing:
    """Answers every call and every question with itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, key: Any) -> Any:
        return self

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def __setattr__(self, name: str, value: Any) -> None: ...

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *args: Any) -> None: ...

    def __iter__(self) -> Iterator[Any]:
        return iter(())


_NOTHING = _Nothing()
