"""The parts of a capture that hold tensors, read back one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanguard.capture.decode import TreeDecoder
from nanguard.capture.unstored import Unstored
from nanguard.errors import CaptureError
from nanguard.rng import RngState

__all__ = ["CPU", "decoded", "read_arguments", "read_extra", "read_optimizers", "read_rng", "read_state"]

CPU = torch.device("cpu")


@final
class _TensorFile(Mapping[str, Tensor]):
    """The tensors of one safetensors file by name, each read when it is asked for."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._open: Any = None
        self._names: frozenset[str] = frozenset()

    def _handle(self) -> Any:
        if self._open is None:
            try:
                self._open = safe_open(self._file, framework="pt", device="cpu")
                self._names = frozenset(self._open.keys())
            except FileNotFoundError:
                raise CaptureError(f"{self._file}: is missing; the capture is incomplete, copy it again") from None
            except (SafetensorError, OSError, ValueError, RuntimeError) as error:
                raise CaptureError(
                    f"{self._file}: cannot be read as safetensors: {error}; copy the capture again"
                ) from None
        return self._open

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise KeyError(name)
        tensor: Tensor = self._handle().get_tensor(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        self._handle()
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        self._handle()
        return iter(self._names)

    def __len__(self) -> int:
        self._handle()
        return len(self._names)


def decoded(file: Path, entries: Any, decoder: TreeDecoder | None = None) -> dict[str, Any]:
    """Name -> value from a list of ``[name, node]``; scalars only where there is no decoder.

    Raises:
        CaptureError: where an entry is damaged.
    """
    decoder = decoder or TreeDecoder(file, {})
    return {name: decoder.decode(node, name) for name, node in entries}


def read_arguments(
    file: Path,
    args: Any,
    kwargs: Any,
    fill: Mapping[str, Any],
    missing: tuple[dict[str, Any], ...],
    place: Callable[[torch.device], torch.device] | None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the step; raises `CaptureError` for a damaged entry and for a `fill` that names nothing."""
    decoder = TreeDecoder(file, _TensorFile(file), fill, place)
    positional = tuple(
        decoder.decode(node, "batch" if index == 0 else f"args[{index}]") for index, node in enumerate(args["items"])
    )
    named = decoded(file, kwargs["items"], decoder)
    unused = sorted(set(fill) - decoder.filled)
    if unused:
        known = ", ".join(repr(entry["path"]) for entry in missing) or "nothing: the capture is whole"
        raise CaptureError(f"{file}: fill names {unused[0]!r}, which is no entry of the batch; missing there: {known}")
    return positional, named


def read_rng(file: Path, node: Any) -> RngState:
    """The saved generators."""
    tree = TreeDecoder(file, _TensorFile(file)).decode(node, "rng")
    try:
        python = tree["python"]
        words = tuple(python["words"].tolist())
        state = RngState((python["version"], words, python["gaussian"]), tree["numpy"], tree["torch"], tree["cuda"])
        if not isinstance(state.torch, Tensor) or not isinstance(state.cuda, dict):
            raise TypeError("torch's state is no tensor")
    except (KeyError, TypeError, AttributeError) as error:
        raise CaptureError(f"{file}: entry 'rng' is damaged ({error}); copy the capture again") from None
    return state


def read_state(file: Path, module: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """Parameters and buffers by name, or `None` where none are held."""
    if module["state"] is None:
        return None
    state = decoded(file, module["state"], TreeDecoder(file, _TensorFile(file)))
    for name, tensor in state.items():
        if isinstance(tensor, Unstored):
            raise CaptureError(
                f"{file}: {name} was not stored: {tensor.reason}; replay with weights='current' and load the weights yourself"
            )
        if not isinstance(tensor, torch.Tensor):
            raise CaptureError(f"{file}: {name}: found {type(tensor).__name__}; expected a tensor; the file is damaged")
    return state


def read_extra(file: Path, module: Mapping[str, Any]) -> dict[str, Any]:
    """What `get_extra_state` of the submodules returned, by the name of the submodule."""
    return decoded(file, module["extra"], TreeDecoder(file, _TensorFile(file)))


def read_optimizers(file: Path, entry: Any) -> list[dict[str, Any]] | None:
    """The states of the optimizers, or `None` where none are held."""
    if entry is None:
        return None
    states = TreeDecoder(file, _TensorFile(file)).decode(entry["states"], "optimizers")
    if not isinstance(states, list) or not all(isinstance(state, dict) and "param_groups" in state for state in states):
        raise CaptureError(f"{file}: entry 'optimizers' is damaged; copy the capture again")
    return states
