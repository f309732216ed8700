"""What surrounds a call: tracers, transforms and autocast."""

from __future__ import annotations

import torch

__all__ = ["has_hooks_of_saved_tensors", "in_transform", "is_surrounded", "is_tracing", "may_look", "result_dtype"]

# Asked in every call that anything is known about.
_tracing_state = torch._C._get_tracing_state
_dispatch_modes = torch._C._len_torch_dispatch_stack
_differentiates_forward = torch._C._is_fwd_grad_enabled
_transform = torch._C._functorch.peek_interpreter_stack
_forward = torch.autograd.forward_ad
_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def is_surrounded() -> bool:
    """Whether there is a tracer, a transform or a dispatch mode."""
    return (
        _tracing_state() is not None
        or _dispatch_modes() > 0
        or _forward._current_level >= 0
        or _transform() is not None
    )


def is_tracing() -> bool:
    """Whether the call is being written down by `torch.jit.trace` or `make_fx`, rather than computed."""
    if _tracing_state() is not None:
        return True
    return _dispatch_modes() > 0 and _proxies()


def in_transform() -> bool:
    """Whether the call runs inside `torch.func` transforms or forward-mode differentiation.

    What `requires_grad` says about a tensor there does not tell whether derivatives flow through it.
    """
    if _forward._current_level >= 0 and _differentiates_forward():
        return True
    return _transform() is not None


def has_hooks_of_saved_tensors() -> bool:
    """Whether what nodes save goes through hooks: a checkpoint, or one that offloads, may be asked for it only once."""
    return _top_hooks(True) is not None


def may_look(device: torch.device) -> bool:
    """Whether numbers may decide how something is computed: not under checkpoints, nor where a device would be waited for."""
    return device.type == "cpu" and not is_surrounded() and not has_hooks_of_saved_tensors()


def result_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which `log` answers a tensor of that dtype, autocast considered."""
    if not torch.is_autocast_enabled(device.type):
        return dtype
    return torch.empty(0, dtype=dtype, device=device).log().dtype


def _proxies() -> bool:
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode() is not None
