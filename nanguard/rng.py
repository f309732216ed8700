"""The random number generators of the process: what a step draws from, saved and put back."""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

__all__ = ["RngState"]

# The legacy NumPy generator is 624 words and a position; see `_numpy_state`.
_MT19937_BYTES = 625 * 4

# (bit generator, its raw bytes, its state): the last NumPy snapshot that held no cached Gaussian.
_last: tuple[Any, bytes, dict[str, Any]] | None = None


@final
@dataclass(frozen=True, eq=False)
class RngState:
    """The state of every global generator at one moment. Cheap enough to save before each step (about 15 µs).

    Attributes:
        python: `random.getstate()`.
        numpy: `numpy.random.get_state(legacy=False)`, or `None` where NumPy was not imported. Not to be edited.
        torch: state of torch's CPU generator, a uint8 tensor.
        cuda: device index -> state of that device's generator, a uint8 tensor on the CPU; empty where CUDA was not in
            use.
    """

    python: tuple[Any, ...]
    numpy: dict[str, Any] | None
    torch: Tensor
    cuda: Mapping[int, Tensor]

    @classmethod
    def save(cls) -> RngState:
        """What all generators are about to produce. Draws nothing and waits for no device."""
        return cls(random.getstate(), _numpy_state(), torch.default_generator.get_state(), _cuda_states())

    def restore(self) -> None:
        """Makes all generators produce again what they produced after `save`.

        Devices that this process does not have, and NumPy where it was not imported, are left alone.

        Raises:
            ValueError, TypeError, RuntimeError: where the state is not one that the generators know.
        """
        global _last
        _last = None
        random.setstate(self.python)
        torch.default_generator.set_state(self.torch)
        if self.numpy is not None:
            import numpy

            numpy.random.set_state(self.numpy)
        if self.cuda and torch.cuda.is_available():
            torch.cuda.init()
            generators = torch.cuda.default_generators
            for index, state in self.cuda.items():
                if index < len(generators):
                    generators[index].set_state(state)


def _cuda_states() -> dict[int, Tensor]:
    if not torch.cuda.is_initialized():
        return {}
    # The generators' own states live on the host; torch.cuda.get_rng_state would allocate on each device first.
    return {index: generator.get_state() for index, generator in enumerate(torch.cuda.default_generators)}


def _numpy_state() -> dict[str, Any] | None:
    """NumPy's state; `get_state` costs 50 µs, so it is only asked where the generator has moved.

    The generator's raw bytes do not show the Gaussian that `randn` keeps for its next call. A kept Gaussian comes
    from a draw, which moves the generator, so bytes that have not changed since a snapshot without one mean that
    there is still none.
    """
    global _last
    numpy = sys.modules.get("numpy")
    if numpy is None or not hasattr(numpy, "random"):
        return None
    generator = _bit_generator(numpy)
    if type(generator).__name__ != "MT19937":
        state: dict[str, Any] = numpy.random.get_state(legacy=False)
        return state
    raw = ctypes.string_at(generator.ctypes.state_address, _MT19937_BYTES)
    if _last is not None and _last[0] is generator and _last[1] == raw:
        return _last[2]
    state = numpy.random.get_state(legacy=False)
    _last = None if state["has_gauss"] else (generator, raw, state)
    return state


def _bit_generator(numpy: Any) -> Any:
    get = getattr(numpy.random, "get_bit_generator", None)  # since NumPy 1.24
    return get() if get is not None else numpy.random.mtrand._rand._bit_generator
