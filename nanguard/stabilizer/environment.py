"""What surrounds a call: tracers, checkpoints, transforms and autocast."""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.utils import checkpoint

__all__ = ["in_checkpoint", "in_transform", "is_tracing", "result_dtype"]

_CHECKPOINT_FILE = checkpoint.__file__


def is_tracing() -> bool:
    """Whether the call is being written down by `torch.jit.trace` or `make_fx`, rather than computed."""
    if torch._C._get_tracing_state() is not None:
        return True
    return torch._C._len_torch_dispatch_stack() > 0 and _proxies()


def in_transform() -> bool:
    """Whether the call runs inside `torch.func` transforms or forward-mode differentiation.

    What `requires_grad` says about a tensor there does not tell whether derivatives flow through it.
    """
    level: int = torch.autograd.forward_ad._current_level
    return level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def in_checkpoint() -> bool:
    """Whether the call runs inside a checkpointed region, or in a backward pass, which recomputes such regions.

    The forward and its recomputation must save the same tensors, but the backward pass may run outside the block.
    """
    if torch._C._current_graph_task_id() != -1:
        return True
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is not None:
        # Other hooks may lie on top of those of a checkpoint.
        return getattr(hooks[0], "__module__", "") == checkpoint.__name__ or _frame_of_checkpoint()
    # A reentrant checkpoint runs its forward without grad, and leaves no other trace than its frame.
    return not torch.is_grad_enabled() and _frame_of_checkpoint()


def result_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which `log` answers a tensor of that dtype, autocast considered."""
    if not torch.is_autocast_enabled(device.type):
        return dtype
    return torch.empty(0, dtype=dtype, device=device).log().dtype


def plain_device(tensors: list[Tensor], device: torch.device) -> bool:
    """Whether all tensors live on that device."""
    return all(tensor.device == device for tensor in tensors)


def _proxies() -> bool:
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode() is not None


def _frame_of_checkpoint() -> bool:
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == _CHECKPOINT_FILE:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
