"""One sentence for what is wrong with a configuration: which key, in which file, what was probably meant."""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError

from msfusion.config_keys import flattened


def first_mistake(
    error: ValidationError,
    schema: type[BaseModel],
    table: Mapping[str, Any],
    origin: str,
    overrides: Mapping[str, Any],
) -> str:
    """The sentence about the first mistake that pydantic found in `table`.

    `origin` names the file; a key that is in `overrides` (by its dotted name) is said to come from --set.
    """
    # an unknown key explains a missing one better than the other way round
    mistake = min(error.errors(include_url=False), key=lambda found: found["type"] == "missing")
    path = _path_in(table, mistake["loc"])
    key = ".".join(path)
    from_override = any(
        key == name or key.startswith(f"{name}.") or name.startswith(f"{key}.") for name in overrides
    )
    where = "--set" if from_override else origin
    if mistake["type"] == "extra_forbidden":
        return f"{where}: there is no key '{key}'{_suggestion(path, schema)}."
    if mistake["type"] == "missing":
        return f"{where}: {key} lacks the key '{key}.{mistake['loc'][-1]}'."
    if mistake["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"{where}: {key} = {_shown(mistake['input'])} should be a table (a [{key}] section)."
    reason = mistake["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if not path:  # two sections that do not fit together: the reason names them
        return f"{where}: {reason}."
    return f"{where}: {key} = {_shown(mistake['input'])} {reason}."


def about_section(
    error: Exception, section: str, values: BaseModel, origin: str, overrides: Mapping[str, Any]
) -> str:
    """The sentence about a value that the section's own dataclass refused, naming file and section."""
    message = str(error).rstrip(".")
    named = [key for key in type(values).model_fields if re.search(rf"\b{key}\b", message)]
    refused = [  # where a table within the section has the value that the message begins with
        key
        for key, value in flattened({section: values.model_dump()}).items()
        if message.startswith(
            (f"{key.rpartition('.')[2]} is {value}:", f"{key.rpartition('.')[2]} is {value!r}:")
        )
    ]
    if len(refused) == 1:
        message = f"{refused[0].rpartition('.')[0]}.{message}"
    elif any(message.startswith(key) for key in named):
        message = f"{section}.{message}"
    keys = refused or [f"{section}.{key}" for key in named]
    where = "--set" if any(key in flattened(overrides) for key in keys) else origin
    return f"{where}: {message}."


def known_keys(schema: type[BaseModel], prefix: str = "") -> list[str]:
    """The dotted names of all keys and sections of a configuration."""
    keys: list[str] = []
    for name, field in schema.model_fields.items():
        keys.append(f"{prefix}{name}")
        for section in _sections_in(field.annotation):
            keys += known_keys(section, f"{prefix}{name}.")
    return keys


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a key may hold: one, none, or several where it is optional or a choice."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    inner = (_sections_in(argument) for argument in typing.get_args(annotation))
    return list(dict.fromkeys(section for sections in inner for section in sections))


def _suggestion(path: list[str], schema: type[BaseModel]) -> str:
    """The nearest known key: in the same section first, then anywhere by its last part."""
    known = known_keys(schema)
    key = ".".join(path)
    inside = [name for name in known if name.rpartition(".")[0] == ".".join(path[:-1])]
    near = get_close_matches(key, inside, 1, 0.7) or [n for n in known if n.split(".")[-1] == path[-1]]
    near = near or get_close_matches(key, known, 1, 0.6)
    if near:
        return f" (did you mean '{near[0]}'?)"
    return f" (known here: {', '.join(inside)})"


def _path_in(table: Mapping[str, Any], location: tuple[int | str, ...]) -> list[str]:
    """The part of pydantic's location that is in the user's table; the rest names branches of unions."""
    path: list[str] = []
    at: Any = table
    for part in location:
        if isinstance(part, int):
            break
        if path and not (isinstance(at, Mapping) and part in at):
            continue
        path.append(part)
        at = at.get(part) if isinstance(at, Mapping) else None
    return path


def _shown(value: Any) -> str:
    try:
        return json.dumps(value)
    except TypeError:
        return str(value)
