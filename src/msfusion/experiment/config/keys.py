"""Dotted keys: `participants.ratio` for the key `ratio` of the table `[participants]`."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from typing import Any

from msfusion.errors import ConfigError
from msfusion.quoting import quoted, short

MOST_LEVELS = 16
"""Of tables and lists within each other: more than any key of ours needs, few enough to be walked through."""


def parsed(text: str, origin: str) -> dict[str, Any]:
    """What a TOML text says. Raises ConfigError for text that is none, and for values as in `check_values`."""
    try:
        table = _loaded(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{origin} is not valid TOML: {error}.") from error
    except RecursionError:
        raise ConfigError(f"{origin}: tables and lists go more than {MOST_LEVELS} levels deep.") from None
    except ValueError:  # of an integer with more digits than Python reads
        raise ConfigError(f"{origin}: an integer does not fit into 64 bits.") from None
    check_values(table, origin)
    return table


def _loaded(text: str) -> dict[str, Any]:
    """As tomllib reads it, whose time grows with the square of a dotted key's parts: RecursionError for very many."""
    if _MANY_PARTS.search(text):
        raise RecursionError
    return tomllib.loads(text)


_MANY_PARTS = re.compile(
    rf"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){{{2 * MOST_LEVELS}}}"""
)


def check_values(table: Mapping[str, Any], origin: str) -> None:
    """Raise ConfigError, naming the key, for integers that TOML does not have, and for endless levels."""
    waiting: list[tuple[str, Any]] = list(table.items())
    for _ in range(MOST_LEVELS):
        below: list[tuple[str, Any]] = []
        for key, value in waiting:
            if isinstance(value, Mapping):
                below += [(f"{key}.{name}", inner) for name, inner in value.items()]
            elif isinstance(value, list):
                below += [(key, inner) for inner in value]
            elif isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise ConfigError(f"{origin}: {short(key)} is an integer that does not fit into 64 bits.")
        waiting = below
    if waiting:
        raise ConfigError(
            f"{origin}: tables and lists in {short(waiting[0][0], 40)} go more than {MOST_LEVELS} levels deep."
        )


def parse_override(override: str) -> tuple[str, Any]:
    """The dotted key and the value of `key=value`: a TOML value, or text as it stands where it is not one.

    Raises ConfigError where there is no key or no equals sign, and for values as in `check_values`.
    """
    key, equals, text = (part.strip() for part in override.partition("="))
    parts = key.split(".")
    if not equals or not all(parts):
        raise ConfigError(
            f"--set '{short(override)}' should have the form key=value, as in --set training.batch_size=32."
        )
    if len(parts) > MOST_LEVELS:
        raise ConfigError(f"--set {short(key, 40)}: tables go more than {MOST_LEVELS} levels deep.")
    try:
        table = _loaded(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return key, text
    except (RecursionError, ValueError):  # levels without end, digits without end: parsed tells which
        table = parsed(f"value = {text}", f"--set {short(key)}")
    if len(table) > 1:
        return key, text
    check_values({key: table["value"]}, "--set")
    return key, table["value"]


CODECS = frozenset({"codec", "codec_down", "activations", "gradients"})
"""The keys whose value may be { codec = 'top_k', ... }, as a whole: another codec must not inherit these settings."""


def flattened(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, under dotted keys. A codec with its settings is one value."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping) and value and key not in CODECS:
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def shown(value: Any) -> str:
    """A value as in a configuration file."""
    return "not set" if value is None else quoted(value)


def put(table: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key, making the tables on the way. Raises ConfigError where a value is in the way."""
    *parents, last = key.split(".")
    for depth, parent in enumerate(parents):
        below = table.setdefault(parent, {})
        if not isinstance(below, dict):
            path = ".".join(parents[: depth + 1])
            raise ConfigError(f"--set {short(key)}: {short(path)} is {shown(below)}, not a table.")
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
        if isinstance(below, Mapping) and isinstance(value, Mapping) and key not in CODECS:
            value = merged(below, value)
        result[key] = value
    return result


def without_none(value: Any) -> Any:
    """TOML has no null: what is not set is left out, in tables within tables and lists too."""
    if isinstance(value, dict):
        return {key: without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_none(inner) for inner in value]
    return value
