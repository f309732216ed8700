"""Errors about policies in the words of the person who wrote the file, and the YAML reader beneath them."""

from __future__ import annotations

import difflib
from collections.abc import Hashable
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from nanguard.errors import PolicyError

__all__ = ["PLANNED", "check_keys", "describe", "pattern_problem", "read_yaml"]

# Names that the policy format reserves and this version does not act on yet: key -> what to do meanwhile.
PLANNED = {
    "rollback": "use skip_step, or remove the key",
    "checkpoint_gate": "remove the key",
    "resume": "remove the key",
}
_PLANNED_VALUES = {"rollback": "use skip_step", "micro_batch": "use window"}


def check_keys(data: Any, where: str) -> None:
    """Refuses keys that are no text: YAML 1.1 reads the bare words on, off, yes and no as truth values.

    Raises:
        PolicyError: naming the key.
    """
    if isinstance(data, dict):
        for key, value in data.items():
            if not isinstance(key, str):
                hint = (
                    " (YAML reads the bare words on, off, yes and no as truth values)" if isinstance(key, bool) else ""
                )
                raise PolicyError(
                    f"{where}: found the key {key!r}; expected text{hint}; put it in quotes, or remove it"
                )
            check_keys(value, where)
    elif isinstance(data, (list, tuple)):
        for value in data:
            check_keys(value, where)


def describe(error: ValidationError, model: type[BaseModel], where: str) -> str:
    """All that is wrong with a policy: per entry the key, what was found, what is expected and what to do."""
    entries = [_entry(item, model) for item in error.errors(include_url=False)]
    head = f"{where}: {len(entries)} thing{'s' if len(entries) > 1 else ''} in this policy cannot be used"
    return "\n".join([head, *(f"  {entry}" for entry in entries)])


def pattern_problem(pattern: str) -> str:
    """What keeps a text from matching any module's name, in a few words; empty where nothing does."""
    if pattern != pattern.strip():
        return "with spaces around it"
    if any(character.isspace() for character in pattern):
        return "with spaces in it"
    if pattern.startswith(".") or pattern.endswith(".") or ".." in pattern:
        return "with an empty name between its dots"
    if pattern.count("[") != pattern.count("]"):
        return "with a bracket that is not closed"
    return ""


def _entry(item: Any, model: type[BaseModel]) -> str:
    location = tuple(
        part for part in item["loc"] if not (isinstance(part, str) and part.startswith(("function-", "tuple[")))
    )
    key, found, kind = _dotted(location), item.get("input"), item["type"]
    if kind == "extra_forbidden":
        return _unknown_key(key, location, model)
    if isinstance(found, str) and found in _PLANNED_VALUES and kind == "literal_error":
        return f"{key}: found {found!r}, which this version does not do yet; {_PLANNED_VALUES[found]}"
    if kind == "value_error":
        return f"{key}: {item['ctx']['error']}" if key else str(item["ctx"]["error"])
    if kind in ("model_type", "model_attributes_type"):
        return f"{key or 'the file'}: found {_shown(found)}; expected a mapping of keys to values"
    if kind == "missing":
        return f"{key}: is missing; add it"
    expected = _expected(item)
    return f"{key}: found {_shown(found)}; expected {expected}{_closest(found, item)}"


def _unknown_key(key: str, location: tuple[Any, ...], model: type[BaseModel]) -> str:
    if key in PLANNED:
        return f"{key}: this version does not do that yet; {PLANNED[key]}"
    allowed = _keys_at(model, location[:-1])
    guess = difflib.get_close_matches(str(location[-1]), allowed, n=1)
    hint = f". Did you mean {guess[0]!r}?" if guess else ""
    return f"{key}: unknown key; allowed here: {', '.join(allowed)}{hint}"


def _keys_at(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    for part in location:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        nested = [
            one for one in (annotation, *get_args(annotation)) if isinstance(one, type) and issubclass(one, BaseModel)
        ]
        if not nested:
            return []
        model = nested[0]
    return list(model.model_fields)


def _expected(item: Any) -> str:
    context = item.get("ctx") or {}
    if "expected" in context:
        return f"one of {context['expected']}".replace(" or ", ", ")
    message: str = item["msg"]
    return message.replace("Input should be ", "")


def _closest(found: Any, item: Any) -> str:
    options = str((item.get("ctx") or {}).get("expected", "")).replace(" or ", ", ").replace("'", "").split(", ")
    guess = difflib.get_close_matches(found, options, n=1) if isinstance(found, str) else []
    return f". Did you mean {guess[0]!r}?" if guess else ""


def _dotted(location: tuple[Any, ...]) -> str:
    text = ""
    for part in location:
        text += (
            f"[{part}]" if isinstance(part, int) and not isinstance(part, bool) else f".{part}" if text else str(part)
        )
    return text


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def read_yaml(path: Path) -> Any:
    """Parses one YAML document.

    Numbers such as ``1e-3``, which YAML 1.1 takes for text, are numbers here, and a repeated key is an error rather
    than a silent last-one-wins.

    Raises:
        PolicyError: where the file cannot be read or parsed.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise PolicyError(f"{path}: there is no such file{_neighbours(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"{path}: cannot be read as a policy: {error}") from None
    try:
        return yaml.load(text, _loader(yaml))
    except yaml.YAMLError as error:
        raise PolicyError(f"{path}: is not valid YAML: {error}") from None
    except RecursionError:
        raise PolicyError(f"{path}: is nested too deeply to be a policy") from None


def _neighbours(path: Path) -> str:
    folder = path.parent
    found = sorted(entry.name for entry in folder.glob("*.y*ml")) if folder.is_dir() else []
    if found:
        return f"; in {folder} there are {', '.join(found)}"
    return f" (looked in {folder.absolute()}); without a policy, NanGuard() captures and raises"


def _loader(yaml: Any) -> Any:
    import re

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """The safe loader with two traps removed."""

    def mapping(loader: Any, node: Any) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = loader.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            if isinstance(key, Hashable):
                seen.add(key)
        result: dict[Hashable, Any] = yaml.SafeLoader.construct_mapping(loader, node, deep=True)
        return result

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )
    return Loader
