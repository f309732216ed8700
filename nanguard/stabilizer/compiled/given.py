"""What is known about the inputs of a compiled graph, from the eager code before it: a break of the graph loses nothing.

What a block knows about a tensor is nothing that compiled code could be guarded by. So a graph whose inputs are known when it
is compiled is compiled twice: as it stands, for calls in which nothing is known, and as one that takes the logarithms of these
inputs as further inputs. The block computes them as it answers ``torch.log``, with all its care: they are part of the user's
graph, and derivatives asked for at an input find their way. What depends on the form of a term is decided by the term itself.

Where the logarithms change nothing in the graph it is compiled once, and what they tell about its results is told all the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, fx
from torch._guards import TracingContext

from nanguard.algebra import Apply, Leaf, Term
from nanguard.algebra import operators as ops
from nanguard.errors import NanGuardWarning
from nanguard.incident import Swap
from nanguard.stabilizer.blocks import Block, active_blocks
from nanguard.stabilizer.compiled.boundary import Boundary
from nanguard.stabilizer.compiled.counted import counted
from nanguard.stabilizer.compiled.handed import handing
from nanguard.stabilizer.compiled.memory import example
from nanguard.stabilizer.compiled.plan import Policy
from nanguard.stabilizer.compiled.reading import shape_of
from nanguard.stabilizer.compiled.transform import stabilised
from nanguard.stabilizer.exchange import is_probability

__all__ = ["Knowing", "either", "knowing"]

# More of them are no probabilities of one loss.
_MOST = 16
# What loses digits if all that is known of a probability is its logarithm, as that of 1 - p.
_NEED_ODDS = frozenset({"complement", "difference", "distance", "closeness", "expm1", "minus"})


@final
class Knowing:
    """A copy of a graph that takes the logarithms of some of its inputs as further inputs.

    Arguments:
        module: the graph, which stays as it is.
        known: the inputs by their places, each with its logarithm as the block knows it.
        further: the logarithms as tensors; of odds, where `odds` says so.
        odds: whether these are logarithms of odds p / (1 - p).
        policy: how the nodes of the graph are stabilised.

    Attributes:
        places: which inputs.
        swaps: what is replaced in it.
        boundary: what crosses its boundaries.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        known: Mapping[int, Term],
        further: Sequence[Tensor],
        odds: Sequence[bool],
        policy: Policy,
    ) -> None:
        self.places = list(known)
        self.odds = odds
        self._further = further
        self._module, originals = _copied(module)
        nodes = [node for node in self._module.graph.nodes if node.op == "placeholder"]
        inputs = [nodes[place] for place in self.places]
        new = self._further_inputs(inputs, nodes[-1])
        terms = list(zip(new, known.values(), odds, strict=True))
        self.boundary = Boundary(
            [(example(node), _logarithm(of, is_odds)) for node, (of, _, is_odds) in zip(inputs, terms, strict=True)],
            {node: term for node, term, is_odds in terms if not is_odds},
            {node: term for node, term, is_odds in terms if is_odds},
        )
        self.swaps = stabilised(self._module, lambda node: policy(originals.get(node, node)), self.boundary)

    def _further_inputs(self, inputs: Sequence[fx.Node], last: fx.Node) -> list[fx.Node]:
        """Nodes of further inputs, which look like these but for their dtypes."""
        found = []
        for node, value in zip(inputs, self._further, strict=True):
            with self._module.graph.inserting_after(last):
                last = self._module.graph.placeholder(f"log_{node.name}")
            last.meta["example_value"] = _like(example(node), value)
            last._dynamo_source = None
            found.append(last)
        return found

    def compiled(
        self,
        compiler: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        note: Callable[[Iterable[Swap]], None],
    ) -> Callable[..., Any] | None:
        """The compiled graph; `None`, with a warning, where the backend cannot do it.

        Arguments:
            compiler: the user's backend.
            args: what it is called with besides the graph, as for the original.
            kwargs: the same, by keyword.
            note: counts swaps.
        """
        try:
            symbols = TracingContext.get().tensor_to_context
            for place, value in zip(self.places, self._further, strict=True):
                symbols[value] = _of_same_sizes(symbols[args[0][place]])
            compiled = compiler(self._module, [*args[0], *self._further], *args[1:], **kwargs)
        except Exception as error:  # the graph as it stands may compile
            message = f"a logarithm after a graph break is left as it is: {type(error).__name__}: {error}"
            warnings.warn(message, NanGuardWarning, stacklevel=2)
            return None
        return handing(counted(compiled, self.swaps, note), self.boundary, self.places, self.odds)


def knowing(module: fx.GraphModule, inputs: Sequence[Any], policy: Policy) -> Knowing | None:
    """A graph that takes the logarithms of what the block knows among these inputs; `None` where it knows nothing."""
    context = TracingContext.try_get()
    block = next(iter(active_blocks()[-1:]), None)
    if block is None or context is None or any(isinstance(part, fx.GraphModule) for part in module.children()):
        return None
    known: dict[int, Term] = {}
    symbols = getattr(context, "tensor_to_context", {})
    for place, value in enumerate(inputs):
        if isinstance(value, Tensor) and value in symbols:
            found = block.exchange.known(value)
            if found is not None and block.exchange.replaces(found):
                known[place] = found.term
    if not 0 < len(known) <= _MOST:
        return None

    def with_odds(odds: Sequence[bool]) -> Knowing | None:
        further = _further(block, inputs, known, odds)
        return None if further is None else Knowing(module, known, further, odds, policy)

    plain = with_odds([False] * len(known))
    if plain is None or not plain.boundary.operators & _NEED_ODDS:
        return plain
    return with_odds([is_probability(term) for term in known.values()])


def either(plain: Callable[..., Any], other: Callable[..., Any], graph: Knowing) -> Callable[..., Any]:
    """The graph that takes logarithms, in calls in which the block knows them all, and else the one that does not."""
    places, odds = tuple(graph.places), tuple(graph.odds)

    def run(*args: Any) -> Any:
        block = next(iter(active_blocks()[-1:]), None)
        further = None if block is None else _further(block, args, places, odds)
        return plain(*args) if further is None else other(*args, *further)

    return run


def _further(block: Block, inputs: Sequence[Any], places: Iterable[int], odds: Sequence[bool]) -> list[Tensor] | None:
    found = []
    for place, of_odds in zip(places, odds, strict=True):
        logarithm = block.exchange.logarithm(inputs[place], of_odds)
        if logarithm is None:
            return None
        found.append(logarithm)
    return found


def _logarithm(node: fx.Node, odds: bool) -> Term:
    """The logarithm of an input, made of a further input."""
    value = example(node)
    leaf = Leaf(node, shape_of(node, value), 0, value.requires_grad)
    return Apply(ops.LOG_SIGMOID, (leaf,), leaf.shape) if odds else leaf


def _like(value: Tensor, logarithm: Tensor) -> Tensor:
    """The example of a logarithm, with sizes that may differ from call to call."""
    with torch._C.DisableTorchFunction():
        return torch.empty_like(value, dtype=logarithm.dtype).requires_grad_(logarithm.requires_grad)


def _of_same_sizes(symbols: Any) -> Any:
    """What the symbols of a further input stand for: its sizes are those of the input in every call, and no more."""
    sizes = {
        environment: {name: symbol for name, symbol in names.items() if ".size()" in name}
        for environment, names in symbols.shape_env_to_source_to_symbol_cache.items()
    }
    return replace(symbols, view_base_context=None, shape_env_to_source_to_symbol_cache=sizes)


def _copied(module: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """A copy of a graph, and which node of the original each of its nodes is."""
    graph = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, nodes))
    for node, new in nodes.items():
        if hasattr(node, "_dynamo_source"):
            new._dynamo_source = node._dynamo_source
    copy = fx.GraphModule(module, graph)
    copy.meta = dict(module.meta)
    for name, value in vars(module).items():
        copy.__dict__.setdefault(name, value)
    return copy, {new: node for node, new in nodes.items()}
