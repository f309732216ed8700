"""What surrounds a call: tracers, transforms and autocast."""

from __future__ import annotations

import torch

__all__ = ["in_transform", "is_tracing", "result_dtype"]


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
    differentiating = level >= 0 and torch._C._is_fwd_grad_enabled()
    return differentiating or torch._C._functorch.peek_interpreter_stack() is not None


def result_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which `log` answers a tensor of that dtype, autocast considered."""
    if not torch.is_autocast_enabled(device.type):
        return dtype
    return torch.empty(0, dtype=dtype, device=device).log().dtype


def _proxies() -> bool:
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode() is not None
