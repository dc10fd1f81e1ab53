"""Codecs as a configuration names them: a name, or a table that has one, as { codec = "scaled", inner = "paper" }."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msfusion.codecs import CODECS, FORMER_NAMES, Codec, by_table
from msfusion.errors import ConfigError
from msfusion.imports import import_function, is_reference


def codec_of(table: str, key: str, given: str | dict[str, Any]) -> Codec:
    """The codec under a key of a table; `module:Class` is imported, which registers it. Raises ConfigError."""
    try:
        name = given.get("codec") if isinstance(given, dict) else given
        if isinstance(name, str) and is_reference(name):
            made = import_function(name, f"{table}.{key}")
            own = str(getattr(made, "name", None))
            if CODECS.get(own) is not made:
                raise ConfigError(f"'{name}' is no codec: decorate its class with msfusion.codecs.register.")
            given = {**given, "codec": own} if isinstance(given, dict) else own
        return by_table(given)
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{key}: {error}") from error


def as_now(given: Any) -> Any:
    """A codec with today's names of profiles: a run that was begun before has their former ones."""
    return _renamed(given, {before: now for now, before in FORMER_NAMES.items()})


def as_before(given: Any) -> Any:
    """A codec with the former names of profiles, which the fingerprints of runs go by."""
    return _renamed(given, FORMER_NAMES)


def _renamed(given: Any, names: Mapping[str, str]) -> Any:
    """A codec, and the one within it, by other names."""
    if isinstance(given, str):
        return names.get(given, given)
    if isinstance(given, dict):
        named = {key: _renamed(given[key], names) for key in ("codec", "inner") if key in given}
        return {**given, **named}
    return given
