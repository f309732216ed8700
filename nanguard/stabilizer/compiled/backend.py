"""A backend that needs no block."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, final

from nanguard.incident import Swap
from nanguard.stabilizer.compiled.counted import counted
from nanguard.stabilizer.compiled.settings import Settings
from nanguard.stabilizer.report import Report

if TYPE_CHECKING:
    from torch import fx

__all__ = ["compile_backend"]


@final
class compile_backend:
    """A backend for `torch.compile` that computes unstable expressions stably, and leaves the rest to another backend.

    What `nanguard.stabilize` does for the calls inside a block, this does for every call of one compiled function, without a
    block.

    Arguments:
        inner: the backend that compiles the stabilised graph: a name that `torch.compile` knows, or a function like one.
        epsilon: ``"keep"`` or ``"drop"``, as for `nanguard.stabilize`.

    Attributes:
        swaps: the list of swaps, one entry for each place, counted whenever the compiled function runs.

    Raises:
        ValueError: for any other `epsilon`.
        TypeError: for an `inner` that is neither a name nor a function.

    Example:
        >>> backend = nanguard.compile_backend()
        >>> step = torch.compile(training_step, backend=backend)
        >>> step(x, y).backward()
        >>> for swap in backend.swaps:
        ...     print(swap)
    """

    def __init__(self, inner: str | Callable[..., Any] = "inductor", epsilon: str = "keep") -> None:
        if epsilon not in ("keep", "drop"):
            raise ValueError(f"compile_backend: epsilon is {epsilon!r}; expected 'keep' or 'drop'")
        if not isinstance(inner, str) and not callable(inner):
            raise TypeError(f"compile_backend: inner is {inner!r}; expected the name of a backend, or a function")
        self._inner = inner
        self._settings = Settings(epsilon == "drop")
        self._report = Report([])
        self.__name__ = f"nanguard_{inner if isinstance(inner, str) else getattr(inner, '__name__', 'backend')}"

    @property
    def swaps(self) -> list[Swap]:
        """The swaps of everything that was compiled with this backend."""
        return self._report.swaps

    def __call__(self, module: fx.GraphModule, inputs: Any, **options: Any) -> Any:
        """Compile a graph that dynamo has captured; `options` are those of `torch.compile`."""
        from nanguard.stabilizer.compiled.transform import stabilised  # only what is compiled pays for that import

        swaps = stabilised(module, lambda node: self._settings)
        return counted(self._compiled(module, inputs, options), swaps, self._note)

    def _compiled(self, module: fx.GraphModule, inputs: Any, options: dict[str, Any]) -> Any:
        if self._inner != "inductor":
            return _lookup(self._inner)(module, inputs, **options)
        # As torch.compile itself understands `mode` and `options`.
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx

        mode = options.get("mode")
        patches = {} if mode in (None, "default") else dict(list_mode_options(mode))
        patches.update(options.get("options") or {})
        return compile_fx(module, inputs, config_patches=patches or None)

    def _note(self, swaps: Iterable[Swap]) -> None:
        for swap in swaps:
            self._report.count(swap)


def _lookup(inner: str | Callable[..., Any]) -> Callable[..., Any]:
    from torch._dynamo.backends.registry import lookup_backend

    found: Callable[..., Any] = lookup_backend(inner)
    return found
