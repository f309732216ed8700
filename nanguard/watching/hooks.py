"""The hooks themselves, and what copies of a module have in their place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import nn

__all__ = ["ModuleHook", "around"]

_DICTIONARIES = ("_forward_pre_hooks", "_forward_hooks")


@final
class ModuleHook:
    """A hook on one module, of which a copy of the module, deep or pickled, gets a harmless function.

    Args:
        hook: called with the name and what torch gives to a hook.
        name: of the module.
    """

    def __init__(self, hook: Callable[..., None], name: str) -> None:
        self._hook = hook
        self._name = name

    def __call__(self, *args: Any) -> None:
        """Passes the call on."""
        # Compiled code takes the first way, and so holds nothing of the hook.
        if not torch.compiler.is_compiling():
            self._hook(self._name, *args)

    def __deepcopy__(self, memo: Any) -> Callable[..., None]:
        return _nothing

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _harmless, ()


def _harmless() -> Callable[..., None]:
    return _nothing


def _nothing(module: nn.Module, *_: Any) -> None:
    """Stands where a hook was, in a copy that was made during a watched step, until the copy is called."""
    if torch.compiler.is_compiling():
        return
    for name in _DICTIONARIES:  # torch goes through copies of them
        hooks, with_kwargs = getattr(module, name), getattr(module, f"{name}_with_kwargs")
        for key in [key for key, hook in hooks.items() if hook is _nothing]:
            del hooks[key]
            with_kwargs.pop(key, None)


def around(module: nn.Module, plain: Callable[..., Any], before: ModuleHook, after: ModuleHook) -> Callable[..., Any]:
    """A call of a module that takes no hooks, with the hooks around it."""

    def call(*args: Any, **kwargs: Any) -> Any:
        before(module, args, kwargs)
        output = plain(*args, **kwargs)
        after(module, args, kwargs, output)
        return output

    return call
