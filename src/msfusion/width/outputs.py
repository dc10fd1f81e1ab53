"""Which of a model's outputs count: the others are dropped from what is traced, and so from what sub-models return."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import nn

from msfusion.errors import UntraceableModelError

Outputs = str | int | Sequence[str | int]
"""Keys or attributes of the output, or positions where it is a tuple or a list."""


def as_names(outputs: Outputs | None) -> tuple[str | int, ...] | None:
    """The outputs that count, as a tuple; None where all do."""
    if outputs is None or isinstance(outputs, (str, int)):
        return None if outputs is None else (outputs,)
    return tuple(outputs)


def selected(output: Any, names: tuple[str | int, ...] | None, model: nn.Module) -> Any:
    """What a model returned, of the same kind, with the outputs of these names alone.

    A kind that cannot go without its other fields (a named tuple, a dataclass) has None there.
    Raises UntraceableModelError for a name that the output does not have.
    """
    output = _without_cache(output)
    if names is None:
        return output
    known = _parts(output)
    length = len(output) if isinstance(output, (tuple, list)) else 0
    names = tuple(name + length if isinstance(name, int) and name < 0 else name for name in names)
    missing = [name for name in names if name not in known]
    if missing or not names:
        wanted = repr(missing[0]) if missing else "an empty list"
        has = f"it has {', '.join(map(repr, known))}" if known else "it is one tensor"
        raise UntraceableModelError(
            f"{type(model).__name__} cannot be traced with outputs={wanted}, because its output has no such part: {has}"
        )
    kept = {name: known[name] for name in names}
    if isinstance(output, dict):
        if hasattr(output, "__dataclass_fields__"):  # those of transformers
            return type(output)(**{str(name): part for name, part in kept.items()})
        left = copy.copy(output)
        for name in [name for name in left if name not in kept]:
            del left[name]
        return left
    if hasattr(output, "_fields"):
        chosen = {
            name if isinstance(name, str) else output._fields[name]: part for name, part in kept.items()
        }
        return type(output)(**dict.fromkeys(output._fields) | chosen)
    if isinstance(output, (tuple, list)):
        return type(output)(kept.values())
    return type(output)(**{field.name: kept.get(field.name) for field in fields(output)})


def _without_cache(output: Any) -> Any:
    """An output of `transformers` without keys and values for generating more text, of which training has no use.

    `use_cache=False` switches them off, except where they were given (prefix tuning).
    """
    if isinstance(output, dict) and hasattr(output, "__dataclass_fields__"):
        if any(map(_is_cache, output.values())):
            return type(output)(**{name: part for name, part in output.items() if not _is_cache(part)})
    elif type(output) is tuple and any(map(_is_cache, output)):
        return tuple(part for part in output if not _is_cache(part))
    return output


def _is_cache(value: Any) -> bool:
    return any(kind.__module__ == "transformers.cache_utils" for kind in type(value).__mro__)


def _parts(output: Any) -> dict[str | int, Any]:
    """The parts of an output by the names that they may be called."""
    if isinstance(output, dict):
        return dict(output)
    parts: dict[str | int, Any] = {}
    if isinstance(output, (tuple, list)):
        parts.update({name: getattr(output, name) for name in getattr(output, "_fields", ())})
        parts.update(enumerate(output))
    elif is_dataclass(output) and not isinstance(output, type):
        parts.update({field.name: getattr(output, field.name) for field in fields(output)})
    return parts
