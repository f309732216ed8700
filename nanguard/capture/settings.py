"""What else decides the bits of a result: versions, the machine, and torch's global settings."""

from __future__ import annotations

import contextlib
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

import nanguard
from nanguard.errors import CaptureError

__all__ = ["current_settings", "current_versions", "machine", "settings_as", "version_notes"]


def current_versions() -> dict[str, str]:
    """Versions of Python, torch, nanguard, and of NumPy and Lightning where they are loaded."""
    versions = {"python": platform.python_version(), "torch": str(torch.__version__), "nanguard": nanguard.__version__}
    for name in ("numpy", "lightning", "pytorch_lightning"):
        version = getattr(sys.modules.get(name), "__version__", None)
        if version is not None:
            versions[name] = str(version)
    return versions


def machine(device: torch.device) -> dict[str, str]:
    """The platform and the device that the step ran on."""
    found = {"platform": platform.platform(), "processor": platform.processor() or platform.machine()}
    found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    found["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    return found


def version_notes(then: Mapping[str, Any], machine_then: Mapping[str, Any], device: torch.device) -> list[str]:
    """What differs from when a capture was written, in plain words; bits may differ for it."""
    now, here = current_versions(), machine(device)
    pairs = [(name, then.get(name), now.get(name)) for name in ("torch", "python", "numpy")]
    pairs += [(name, machine_then.get(name), here.get(name)) for name in ("device", "cpu_capability")]
    return [f"{name}: {found} now, {was} when captured" for name, was, found in pairs if was and found and was != found]


def current_settings() -> dict[str, Any]:
    """The global settings of torch that decide bits, as JSON values."""
    found = {}
    for name, (get, _) in _SETTINGS.items():
        with contextlib.suppress(RuntimeError, AttributeError):  # not in this build, or old and new TF32 switches mixed
            found[name] = get()
    return found


@contextlib.contextmanager
def settings_as(captured: Mapping[str, Any]) -> Iterator[None]:
    """Runs its block under captured settings, and puts the present ones back.

    Raises:
        CaptureError: where a captured setting has a value that torch does not take.
    """
    before = current_settings()
    try:
        _apply(captured, before)
        yield
    finally:
        _apply(before, current_settings())


def _apply(wanted: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name, value in wanted.items():
        if name not in _SETTINGS or name not in now or now[name] == value:
            continue
        try:
            _SETTINGS[name][1](value)
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise CaptureError(f"setting {name!r}: found {value!r}, which torch does not take ({error})") from None


def _attribute(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


def _deterministic(value: Any) -> None:
    enabled, warn_only = value
    torch.use_deterministic_algorithms(bool(enabled), warn_only=bool(warn_only))


def _default_dtype(value: Any) -> None:
    torch.set_default_dtype(getattr(torch, value))


def _threads(value: Any) -> None:
    if type(value) is not int or not 1 <= value <= _MOST_THREADS:
        raise ValueError(f"expected 1 to {_MOST_THREADS} threads")
    torch.set_num_threads(value)


# More would not make a replay more exact, only exhaust the memory.
_MOST_THREADS = 1024

_SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "num_threads": (torch.get_num_threads, _threads),
    "default_dtype": (lambda: str(torch.get_default_dtype())[6:], _default_dtype),
    "deterministic_algorithms": (
        lambda: [torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()],
        _deterministic,
    ),
    "float32_matmul_precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "cudnn.enabled": _attribute(torch.backends.cudnn, "enabled"),
    "cudnn.benchmark": _attribute(torch.backends.cudnn, "benchmark"),
    "cudnn.deterministic": _attribute(torch.backends.cudnn, "deterministic"),
    "cudnn.allow_tf32": _attribute(torch.backends.cudnn, "allow_tf32"),
    "matmul.allow_fp16_reduced_precision_reduction": _attribute(
        torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction"
    ),
    "matmul.allow_bf16_reduced_precision_reduction": _attribute(
        torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"
    ),
    "sdp.flash": (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    "sdp.math": (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    "sdp.mem_efficient": (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
}
