"""What runs while dynamo traces: it sees to it that the graph is stabilised before the backend gets it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar, final

import torch

from nanguard.incident import Swap
from nanguard.stabilizer.blocks import active_blocks
from nanguard.stabilizer.compiled.settings import Settings

if TYPE_CHECKING:
    from torch import fx

__all__ = ["BLOCK", "entering", "leave", "run_as_is", "tell", "tracing"]

F = TypeVar("F", bound=Callable[..., Any])
# By this attribute the function modes of blocks are known among others.
BLOCK = "_stabilises"


def run_as_is(function: F) -> F:
    """Have dynamo run a function, and all that it calls, as it is, unless it traces it into a caller.

    Where a compiled function breaks its graph, it would otherwise compile the functions below, one by one.
    """
    frames: Any = torch._C._dynamo.eval_frame
    if hasattr(frames, "set_code_exec_strategy"):
        strategy = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.SKIP)
        frames.set_code_exec_strategy(function.__code__, strategy)
    elif hasattr(frames, "skip_code"):
        frames.skip_code(function.__code__)
    return function


def tell(what: Callable[[Any], None]) -> None:
    """Have one of the functions below run while dynamo traces this call; outside of tracing, nothing happens."""
    from torch._dynamo.comptime import comptime  # not earlier: that import takes a second

    comptime(what)


def _telling(note: Callable[[Any, Settings], None], settings: Settings) -> Callable[[Any], None]:
    def told(context: Any) -> None:
        note(context, settings)

    return told


def _watch(context: Any, settings: Settings) -> None:
    """Dynamo traces a call inside a block that was entered before."""
    output = _output(context)
    watch = None if output is None else _watch_of(output)
    if watch is None:
        return
    if watch.around is None:  # of nested blocks the innermost comes first
        watch.around = settings
    # One call of the frame is enough. Dynamo cannot trace all calls through a mode: methods that it knows by name, NumPy.
    state: Any = getattr(_translator(context), "symbolic_torch_function_state", None)
    if hasattr(state, "in_torch_function_mode") and hasattr(state, "mode_stack"):
        state.in_torch_function_mode = functools.partial(_has_others, state)


def _enter(context: Any, settings: Settings) -> None:
    """Dynamo traces the beginning of a block."""
    output = _output(context)
    watch = None if output is None else _watch_of(output)
    if output is not None and watch is not None:
        watch.enter(output.current_tracer.graph, settings)


_BOTH = (False, True)
# Dynamo calls functions that it finds by name, without arguments of our own.
_TRACING = tuple(tuple(_telling(_watch, Settings(drop, repair)) for repair in _BOTH) for drop in _BOTH)
_ENTERING = tuple(tuple(_telling(_enter, Settings(drop, repair)) for repair in _BOTH) for drop in _BOTH)


def tracing(drop: bool, repair: bool) -> Callable[[Any], None]:
    """What to tell of a call inside a block with these settings."""
    return _TRACING[drop][repair]


def entering(drop: bool, repair: bool) -> Callable[[Any], None]:
    """What to tell of the beginning of a block with these settings."""
    return _ENTERING[drop][repair]


def leave(context: Any) -> None:
    """Dynamo traces the end of a block."""
    output = _output(context)
    watch = None if output is None else _watch_of(output)
    if output is not None and watch is not None:
        watch.leave(output.current_tracer.graph)


def _has_others(state: Any) -> bool:
    """Whether function modes other than those of blocks are active at this point of the trace."""
    kinds = [mode.python_type() for mode in state.mode_stack]
    return not all(hasattr(kind, BLOCK) for kind in kinds)


def _translator(context: Any) -> Any:
    return getattr(context, "_ComptimeContext__tx", None)


def _output(context: Any) -> Any:
    """What dynamo is writing; `None` where this version of torch keeps it elsewhere, or exports the graph to run without us."""
    output = getattr(_translator(context), "output", None)
    return None if output is None or getattr(output, "export", False) else output


def _watch_of(output: Any) -> Watch | None:
    compiler = getattr(output, "compiler_fn", None)
    if isinstance(compiler, Watch):
        return compiler
    if compiler is None:
        return None
    output.compiler_fn = Watch(compiler)
    watch: Watch = output.compiler_fn
    return watch


@final
class Watch:
    """Stands before the user's backend for the compilation of one frame.

    Attributes:
        around: the settings of the innermost block around the frame; `None` where there is none.
    """

    def __init__(self, compiler: Callable[..., Any]) -> None:
        self.around: Settings | None = None
        self._compiler = compiler
        self._inside: dict[fx.Node, Settings] = {}
        self._open: list[tuple[fx.Graph, fx.Node | None, Settings]] = []

    def enter(self, graph: fx.Graph, settings: Settings) -> None:
        """A block begins at the end of what has been traced so far."""
        self._open.append((graph, next(iter(reversed(graph.nodes)), None), settings))

    def leave(self, graph: fx.Graph) -> None:
        """The innermost block ends here."""
        if not self._open:
            return
        began, last, settings = self._open.pop()
        if began is not graph or (last is not None and getattr(last, "_erased", False)):
            return
        for node in reversed(graph.nodes):
            if node is last:
                break
            self._inside.setdefault(node, settings)

    def __call__(self, module: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        """Compile a graph that dynamo has captured."""
        # Only what is compiled pays for these imports.
        from nanguard.stabilizer.compiled.boundary import Boundary
        from nanguard.stabilizer.compiled.counted import counted
        from nanguard.stabilizer.compiled.given import either, knowing
        from nanguard.stabilizer.compiled.handed import handing
        from nanguard.stabilizer.compiled.transform import stabilised

        def policy(node: fx.Node) -> Settings | None:
            return self._inside.get(node, self.around)

        if self.around is None:
            swaps = stabilised(module, policy)
            return counted(self._compiler(module, *args, **kwargs), swaps, _note_in_block)
        graph = knowing(module, args[0], policy) if args else None
        boundary = Boundary()
        swaps = stabilised(module, policy, boundary)
        other = None
        if graph is not None and (graph.swaps != swaps or graph.boundary.tells_more_than(boundary)):
            other = graph.compiled(self._compiler, args, kwargs, _note_in_block)
        compiled = handing(counted(self._compiler(module, *args, **kwargs), swaps, _note_in_block), boundary)
        return compiled if graph is None or other is None else either(compiled, other, graph)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compiler, name)  # dynamo asks backends for their names and settings


def _note_in_block(swaps: Iterable[Swap]) -> None:
    for block in active_blocks()[-1:]:
        block.is_renewed()
        for swap in swaps:
            block.report.count(swap)
