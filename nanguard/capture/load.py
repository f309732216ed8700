"""A capture that was read back. Free of torch until its tensors are asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, final

from nanguard.capture.manifest import BATCH, MODULE, OPTIMIZER, RNG, read_manifest, replay_command
from nanguard.incident import Incident

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from nanguard.rng import RngState

__all__ = ["Capture", "load_capture"]


def load_capture(path: str | Path) -> Capture:
    """Opens the capture in the directory `path`; tensors are read when they are asked for.

    Raises:
        CaptureError: where there is no capture, or it is damaged, incomplete or of another format version.
    """
    return Capture(Path(path), MappingProxyType(read_manifest(path)))


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Capture:
    """One failed step on disk. Immutable.

    Attributes:
        path: its directory.
        manifest: the whole manifest, as JSON values.
    """

    path: Path
    manifest: Mapping[str, Any]

    def __repr__(self) -> str:
        incident = self.incident
        return (
            f"<Capture {self.path}: step {self.step}, epoch {self.epoch}, batch {self.batch_idx}, {incident.trigger}>"
        )

    @cached_property
    def incident(self) -> Incident:
        """What happened, with `capture` and `replay` set to where the capture lies now."""
        command = replay_command(self.path, str(self.manifest["module"]["class"]), self.function)
        found = Incident.from_dict(self.manifest["incident"])
        return dataclasses.replace(found, capture=str(self.path), replay=command)

    @property
    def step(self) -> int:
        """Optimizer steps that had been taken when the batch began."""
        return int(self.manifest["step"]["step"])

    @property
    def epoch(self) -> int:
        """The epoch of the batch."""
        return int(self.manifest["step"]["epoch"])

    @property
    def batch_idx(self) -> int:
        """The position of the batch in its epoch."""
        return int(self.manifest["step"]["batch_idx"])

    @property
    def rank(self) -> int:
        """The process that wrote the capture."""
        return int(self.manifest["step"]["rank"])

    @property
    def function(self) -> str:
        """The method that was called: ``training_step`` or ``validation_step``."""
        return str(self.manifest["step"].get("function", "training_step"))

    @property
    def watch(self) -> Mapping[str, Any] | None:
        """Where more than loss and gradients has to be finite: the watched ``modules``, and which ``infinities`` count."""
        found: Mapping[str, Any] | None = self.manifest["step"].get("watch")
        return found

    @property
    def loss(self) -> float | None:
        """The loss that the step computed then, or `None` where it was not known."""
        loss = self.manifest["step"]["loss"]
        return None if loss is None else float(loss)

    @property
    def versions(self) -> dict[str, str]:
        """Versions of Python, torch and the libraries that wrote the capture."""
        return dict(self.manifest["versions"])

    @property
    def missing(self) -> tuple[dict[str, Any], ...]:
        """What of the batch could not be stored: dictionaries with ``path``, ``type``, ``reason`` and ``optional``."""
        return tuple(dict(entry) for entry in self.manifest["missing"])

    @cached_property
    def args(self) -> tuple[Any, ...]:
        """The positional arguments of the step, the batch first; tensors on the CPU. What could not be stored raises when used.

        Raises:
            CaptureError: where an entry is damaged, or a class in the batch is not imported.
        """
        return self.arguments()[0]

    @cached_property
    def kwargs(self) -> dict[str, Any]:
        """The keyword arguments of the step."""
        return self.arguments()[1]

    @property
    def batch(self) -> Any:
        """The batch: the first argument of the step."""
        if self.args:
            return self.args[0]
        return self.kwargs.get("batch")

    @cached_property
    def rng(self) -> RngState:
        """The generators of random numbers just before the step."""
        from nanguard.capture.sections import read_rng

        return read_rng(self.path / RNG, self.manifest["rng"])

    @cached_property
    def module_state(self) -> dict[str, Tensor] | None:
        """Parameters and buffers by name, like `state_dict`, or `None` where the capture holds no weights."""
        state = self.state()
        if state is None:
            return None
        transient = set(self.manifest["module"]["transient"])
        return {name: tensor for name, tensor in state.items() if name not in transient}

    @cached_property
    def optimizer_state(self) -> list[dict[str, Any]] | None:
        """What `state_dict` of each optimizer was, or `None` where the capture does not hold it."""
        held = self.manifest.get("optimizers")
        return self.optimizers() if held is not None and held["whole"] else None

    def arguments(
        self, fill: Mapping[str, Any] | None = None, device: torch.device | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A fresh copy of the positional and keyword arguments of the step, which the step may edit.

        Args:
            fill: path -> value to use in its place.
            device: where tensors go that were on the device of the module; those that stood beside it stay on the CPU.
        """
        from nanguard.capture.sections import CPU, read_arguments

        module_device = self.manifest["module"]["device"]

        def place(recorded: torch.device) -> torch.device:
            return device if device is not None and recorded.type in ("cuda", module_device) else CPU

        fill = fill or {}
        return read_arguments(
            self.path / BATCH, self.manifest["args"], self.manifest["kwargs"], fill, self.missing, place
        )

    def state(self) -> dict[str, Tensor] | None:
        """All parameters and buffers by name, also those that `state_dict` leaves out, or `None`."""
        from nanguard.capture.sections import read_state

        return read_state(self.path / MODULE, self.manifest["module"])

    def optimizers(self) -> list[dict[str, Any]] | None:
        """Per optimizer its `state_dict`; without the state where the capture holds hyperparameters only."""
        from nanguard.capture.sections import read_optimizers

        return read_optimizers(self.path / OPTIMIZER, self.manifest.get("optimizers"))
