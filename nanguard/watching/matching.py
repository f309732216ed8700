"""Which modules the patterns of a policy mean."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import nn

from nanguard.diagnosis.naming import clean_name
from nanguard.errors import PolicyError

__all__ = ["matched_modules", "refusing_hooks"]


def matched_modules(root: nn.Module, patterns: Iterable[str], *, required: bool = True) -> dict[str, nn.Module]:
    """The modules whose qualified name matches a pattern, by that name, in the order of `named_modules`.

    1. Names are as the user would write them, without what `torch.compile` and checkpoint wrappers put in between; the root
    is ``""``, which ``*`` matches, too. 2. A module inside a compiled or scripted one is watched from outside: at that one.
    3. Metrics of torchmetrics are no part of the model: only their exact name matches them.

    Args:
        root: the module whose submodules are meant.
        patterns: as those of a shell.
        required: whether each has to match.

    Raises:
        PolicyError: where a pattern that has to match does not; the message lists close names.
    """
    shown = _outermost(root)
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        names = [name for name, (_, module) in shown.items() if _matches(name, module, pattern)]
        if not names and required:
            raise PolicyError(_unmatched(pattern, list(shown), type(root).__name__))
        found.update(shown[name] for name in names)
    order = {name: position for position, name in enumerate(shown)}
    return dict(sorted(found.items(), key=lambda entry: order[entry[0]]))


def refusing_hooks(root: nn.Module) -> frozenset[int]:
    """The identities of the modules that refuse hooks, or compute otherwise where there are any.

    Scripted modules take none, and the layers of torch's Transformer encoder leave their fast path for them.
    """
    layers = [module for module in root.modules() if isinstance(module, nn.TransformerEncoderLayer)]
    inside = {id(module) for layer in layers for module in layer.modules()}
    return frozenset(inside | {id(module) for module in root.modules() if isinstance(module, torch.jit.ScriptModule)})


def _outermost(root: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """For each name where it can be watched: at the outermost compiled module that it is inside of, or at itself."""
    found: dict[str, tuple[str, nn.Module]] = {}
    compiled: dict[str, nn.Module] = {}
    for raw, module in root.named_modules():
        name = clean_name(raw)
        if name in found:
            continue  # what a wrapper wraps is watched at the wrapper
        outer = next((entry for entry in compiled if name.startswith(f"{entry}.") or not entry), None)
        if outer is not None:
            found[name] = outer, compiled[outer]
            continue
        found[name] = name, module
        if _is_compiled(module):
            compiled[name] = module
    return found


def _is_compiled(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return True
    return "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None


def _matches(name: str, module: nn.Module, pattern: str) -> bool:
    if name == pattern:
        return True
    is_metric = any(base.__module__.split(".")[0] == "torchmetrics" for base in type(module).__mro__)
    return not is_metric and fnmatchcase(name, pattern)


def _unmatched(pattern: str, names: list[str], root: str) -> str:
    words = [name for name in names if name]
    close = difflib.get_close_matches(pattern.rstrip("*").rstrip(".") or pattern, words, n=5, cutoff=0.5)
    shown = f"Close names: {', '.join(close)}" if close else f"Some names: {', '.join(words[:8]) or 'there are none'}"
    return (
        f"watch.modules: found {pattern!r}, which matches no module of {root}; expected a pattern over qualified names of "
        f"modules, such as 'decoder.*', or '*' for all. {shown}"
    )
