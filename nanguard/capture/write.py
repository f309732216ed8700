"""Writes one failed step to disk, wholly or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, final

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nanguard.capture import manifest as names
from nanguard.capture.attributes import only_scalars
from nanguard.capture.encode import TreeEncoder
from nanguard.capture.manifest import capture_name, class_reference, find_captures, replay_command
from nanguard.capture.modules import describe_module, device_of, encoded
from nanguard.capture.settings import current_settings, current_versions, machine
from nanguard.errors import CaptureError
from nanguard.incident import Incident
from nanguard.rng import RngState

__all__ = ["CaptureLimitReached", "StepSnapshot", "write_capture"]

_GIB = 2**30


@final
class CaptureLimitReached(CaptureError):
    """The directory holds as many captures as the policy allows. Nothing was written and nothing was deleted."""


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class StepSnapshot:
    """All that a failed step needs to happen again.

    Attributes:
        step, epoch, batch_idx, dataloader_idx, rank: which step it was.
        args, kwargs: what `training_step` was called with, the batch first.
        rng: the generators just before the step.
        module: the live module.
        buffers: qualified name -> value from before the step, of any buffers and parameters that have moved since; the others
            are read from `module`.
        attributes: submodule name -> attribute -> value from before the step, like those of `scalar_attributes`; `None` reads
            them from `module`.
        initial_attributes: the same when the run began. Those that have not moved since are settings, which belong to the
            code: a replay leaves them as the code has them. `None`: all are replayed.
        optimizers: the optimizers, in the order of `configure_optimizers`.
        precision: ``{"autocast_device": "cuda", "autocast_dtype": "bfloat16"}``, optionally with ``default_dtype``, or `None`.
        stabilize: ``{"enabled": bool, "epsilon": str, "saturated": str}``.
        scale: the loss scale.
        accumulate: what the loss is divided by before the backward pass.
        hparams: hyperparameters; `None` takes those of ``module.hparams``.
        trainer: scalar facts that a step may ask its Trainer for, such as ``max_steps``.
        loss: the loss that the step computed, as far as it is known.
        function: the name of the method that was called.
        watch: where more than loss and gradients has to be finite: ``{"modules": [...], "infinities": str}``, the watched
            modules and the infinities that count; `None` otherwise.
    """

    step: int
    epoch: int
    batch_idx: int
    args: tuple[Any, ...]
    module: nn.Module
    rng: RngState
    dataloader_idx: int = 0
    rank: int = 0
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, Any]] | None = None
    initial_attributes: Mapping[str, Mapping[str, Any]] | None = None
    optimizers: Sequence[Any] = ()
    precision: Mapping[str, str] | None = None
    stabilize: Mapping[str, Any] = field(default_factory=lambda: {"enabled": False, "epsilon": "keep"})
    scale: float = 1.0
    accumulate: int = 1
    hparams: Mapping[str, Any] | None = None
    trainer: Mapping[str, Any] = field(default_factory=dict)
    loss: float | None = None
    function: str = "training_step"
    watch: Mapping[str, Any] | None = None


def write_capture(
    directory: str | Path,
    snapshot: StepSnapshot,
    incident: Incident,
    *,
    module: bool = True,
    optimizer: bool = False,
    max_count: int | None = None,
    max_gib: float | None = None,
) -> Path:
    """Writes a capture into `directory`, which is made where it is missing, and returns its path.

    The files are written beside their final place and renamed into it, so that a crash leaves no half capture. A name that is
    taken gets a suffix. No random number is drawn, and nothing of the module is changed.

    Args:
        directory: folder of the captures.
        snapshot: the step.
        incident: what happened; stored with `capture` and `replay` filled in.
        module: whether parameters and buffers are stored.
        optimizer: whether the state of the optimizers is stored.
        max_count: captures in the folder (and below it) after which no more are written.
        max_gib: size of the folder in GiB that must not be exceeded.

    Raises:
        CaptureLimitReached: where a limit is reached.
        CaptureError: where the capture cannot be written; the message gives the reason.
    """
    folder = Path(directory)
    _check_count(folder, max_count)
    partial = folder / f"{names.PARTIAL}{capture_name(snapshot.step, snapshot.rank)}-{uuid.uuid4().hex[:12]}"
    try:
        with torch.no_grad():
            manifest, files = _build(snapshot, module, optimizer)
        _check_size(folder, files, max_gib)
        folder.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        return _fill(folder, partial, manifest, files, snapshot, incident)
    except CaptureError:
        raise
    except Exception as error:
        # The run is failing already, and the reason of that must not be lost under whatever went wrong here.
        raise CaptureError(
            f"{folder}: the capture of step {snapshot.step} cannot be written: {error}; "
            "expected a folder that can be written to, with room for it. Free some space or choose another capture.directory"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _build(
    snapshot: StepSnapshot, module: bool, optimizer: bool
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    batch, rng, model, state = TreeEncoder(), TreeEncoder(), TreeEncoder(), TreeEncoder()
    device = device_of(snapshot.module)
    manifest: dict[str, Any] = {
        "format": "nanguard-capture",
        "format_version": names.FORMAT_VERSION,
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "step": _step(snapshot),
        "versions": current_versions(),
        "machine": machine(device),
        "settings": current_settings(),
        "args": {"items": [batch.encode(value, _argument(index)) for index, value in enumerate(snapshot.args)]},
        "kwargs": {"items": [[name, batch.encode(value, name)] for name, value in snapshot.kwargs.items()]},
        "rng": rng.encode(_rng_tree(snapshot.rng), "rng"),
        "module": describe_module(
            snapshot.module,
            model,
            weights=module,
            overrides=snapshot.buffers,
            attributes=snapshot.attributes,
            initial=snapshot.initial_attributes,
            hparams=snapshot.hparams,
        ),
        "missing": batch.missing,
    }
    if snapshot.optimizers:
        states = [_optimizer_state(entry, optimizer) for entry in snapshot.optimizers]
        manifest["optimizers"] = {"whole": optimizer, "states": state.encode(states, "optimizers")}
    files = {names.BATCH: batch.tensors, names.RNG: rng.tensors}
    if module:
        files[names.MODULE] = model.tensors
    if state.tensors:
        files[names.OPTIMIZER] = state.tensors
    return manifest, files


def _optimizer_state(optimizer: Any, whole: bool) -> dict[str, Any]:
    """The state, or the hyperparameters alone: the learning rate of that step costs a few bytes."""
    state: dict[str, Any] = optimizer.state_dict()
    return state if whole else {"state": {}, "param_groups": state["param_groups"]}


def _argument(index: int) -> str:
    return "batch" if index == 0 else f"args[{index}]"


def _step(snapshot: StepSnapshot) -> dict[str, Any]:
    numbers = {name: int(getattr(snapshot, name)) for name in ("step", "epoch", "batch_idx", "dataloader_idx", "rank")}
    return {
        **numbers,
        "accumulate": int(snapshot.accumulate),
        "scale": float(snapshot.scale),
        "loss": None if snapshot.loss is None else repr(float(snapshot.loss)),
        "precision": None if snapshot.precision is None else dict(snapshot.precision),
        "stabilize": dict(snapshot.stabilize),
        "trainer": encoded(only_scalars(snapshot.trainer)),
        **({} if snapshot.function == "training_step" else {"function": snapshot.function}),
        **({} if snapshot.watch is None else {"watch": dict(snapshot.watch)}),
    }


def _rng_tree(state: RngState) -> dict[str, Any]:
    version, words, gaussian = state.python
    python = {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gaussian": gaussian}
    return {"python": python, "numpy": state.numpy, "torch": state.torch, "cuda": dict(state.cuda)}


def _check_count(folder: Path, most: int | None) -> None:
    if most is None:
        return
    count = len(find_captures(folder))
    if count >= most:
        raise CaptureLimitReached(
            f"{folder}: holds {count} captures, and capture.max_count is {most}; no more are written. "
            "Move some away or raise capture.max_count"
        )


def _check_size(folder: Path, files: Mapping[str, Mapping[str, Tensor]], most: float | None) -> None:
    if most is None:
        return
    held = sum(entry.stat().st_size for entry in folder.rglob("*") if entry.is_file()) if folder.is_dir() else 0
    needed = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    if held + needed > most * _GIB:
        raise CaptureLimitReached(
            f"{folder}: holds {held / _GIB:.3g} GiB, this capture needs {needed / _GIB:.3g} GiB more, and capture.max_gib is "
            f"{most:g}; it is not written. Move some captures away, raise capture.max_gib or set capture.model to false"
        )


def _fill(
    folder: Path,
    partial: Path,
    manifest: dict[str, Any],
    files: Mapping[str, Mapping[str, Tensor]],
    snapshot: StepSnapshot,
    incident: Incident,
) -> Path:
    sizes = {}
    for name, tensors in files.items():
        file = partial / name
        save_file(dict(tensors), file)
        file.chmod(partial.stat().st_mode & 0o666)  # safetensors makes files that only their owner can read
        _sync(file)
        sizes[name] = file.stat().st_size
    manifest["files"] = sizes
    for final_path in _candidates(folder / capture_name(snapshot.step, snapshot.rank)):
        command = replay_command(final_path, class_reference(type(snapshot.module)), snapshot.function)
        stored = dataclasses.replace(incident, capture=str(final_path), replay=command)
        _write_manifest(partial / names.MANIFEST, {**manifest, "incident": stored.to_dict()})
        _sync(partial)
        try:
            os.rename(partial, final_path)
        except OSError:
            if os.path.lexists(final_path):  # another process took the name meanwhile
                continue
            raise
        _sync(folder)
        return final_path
    raise AssertionError("unreachable: there is always a next name")


def _write_manifest(file: Path, manifest: dict[str, Any]) -> None:
    with file.open("w", encoding="utf-8") as stream:
        json.dump(manifest, stream, allow_nan=False, indent=1)
        stream.flush()
        os.fsync(stream.fileno())


def _candidates(path: Path) -> Iterator[Path]:
    number = 1
    while True:
        candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
        if not os.path.lexists(candidate):
            yield candidate
        number += 1


def _sync(path: Path) -> None:
    """Waits until a file or a folder is on the disk; folders cannot be opened on Windows, and need not be."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
