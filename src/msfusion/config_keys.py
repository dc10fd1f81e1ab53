"""Dotted keys: `participants.ratio` for the key `ratio` of the table `[participants]`."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from typing import Any

from msfusion.errors import ConfigError


def parse_override(override: str) -> tuple[str, Any]:
    """The dotted key and the value of `key=value`: a TOML value, or text as it stands where it is not one.

    Raises ConfigError where there is no key or no equals sign.
    """
    key, equals, text = (part.strip() for part in override.partition("="))
    if not equals or not all(part for part in key.split(".")):
        raise ConfigError(
            f"--set '{override}' should have the form key=value, as in --set training.batch_size=32."
        )
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return key, text
    return (key, table["value"]) if len(table) == 1 else (key, text)


def flattened(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, under dotted keys. A codec with its settings is one value."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping) and value and not _is_codec(value):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def shown(value: Any) -> str:
    """A value as in a configuration file."""
    return "not set" if value is None else json.dumps(value)


def put(table: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key, making the tables on the way. Raises ConfigError where a value is in the way."""
    *parents, last = key.split(".")
    for depth, parent in enumerate(parents):
        below = table.setdefault(parent, {})
        if not isinstance(below, dict):
            path = ".".join(parents[: depth + 1])
            raise ConfigError(f"--set {key}: {path} is {shown(below)}, not a table.")
        table = below
    table[last] = value


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The base with the changes in it: tables key by key; other values, and codecs with theirs, as a whole.

    A table that names something else (another model) does not inherit the options of what it replaces.
    """
    renamed = "name" in changes and "name" in base and changes["name"] != base["name"]
    result = {key: value for key, value in base.items() if not (renamed and key == "options")}
    for key, value in changes.items():
        below = result.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping) and not _is_codec(value):
            value = merged(below, value)
        result[key] = value
    return result


def _is_codec(table: Mapping[str, Any]) -> bool:
    """Whether a table is { codec = 'top_k', ... }: another codec must not inherit these settings."""
    return "codec" in table


def without_none(value: Any) -> Any:
    """TOML has no null: what is not set is left out, in tables within tables and lists too."""
    if isinstance(value, dict):
        return {key: without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_none(inner) for inner in value]
    return value
