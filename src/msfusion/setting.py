"""A setting is declared once: as a field of a dataclass, with its default, its meaning, and the values it may have.

    @dataclass(frozen=True)
    class Mine:
        momentum: float = setting(0.9, "of SGD", ge=0, lt=1)

        def __post_init__(self) -> None:
            check(self)

A table of a configuration takes its keys, types, defaults, ranges and meanings from such a dataclass
(`experiment.config.declared`), so the same sentence refuses a value in a program and in a file.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from typing import Any, Literal

from msfusion.errors import ConfigError, MsfusionError
from msfusion.quoting import quoted

COMPARED: Mapping[str, str] = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
"""How each limit is called in a sentence."""


@dataclass(frozen=True)
class Allowed:
    """Which values a setting may have: limits of a number, or what `fits` says, with `wanted` in words."""

    limits: Mapping[str, float | int]
    fits: Callable[[Any], bool] | None = None
    wanted: str = ""

    def refusal(self, value: Any) -> str | None:
        """What the value should be instead, as in "at least 1"; None if it may be. None is for a setting left out."""
        if value is None:
            return None
        if self.fits is not None:
            return None if self.fits(value) else self.wanted
        endless = bool(self.limits) and isinstance(value, float) and not math.isfinite(value)
        if not endless and all(_keeps(value, name, limit) for name, limit in self.limits.items()):
            return None
        words = [f"{COMPARED[name]} {limit}" for name, limit in self.limits.items()]
        if endless and not {"le", "lt"} & set(self.limits):
            words.append("finite")
        return " and ".join(words)


def _keeps(value: float | int, name: str, limit: float | int) -> bool:
    if name in ("ge", "gt"):
        return value > limit or (name == "ge" and value == limit)
    return value < limit or (name == "le" and value == limit)


def setting(
    default: Any = MISSING,
    meaning: str = "",
    *,
    fits: Callable[[Any], bool] | None = None,
    wanted: str = "",
    **limits: float | int,
) -> Any:
    """A field of a dataclass that declares a setting.

    `default` may be a class or function that makes one (`dict`); MISSING is a setting that has to be given. `meaning`
    is one line. `limits` are those of a number: `ge`, `gt`, `le`, `lt`, as in pydantic.
    """
    metadata = {"meaning": meaning, "allowed": Allowed(limits, fits, wanted)}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def one_of(names: Sequence[str]) -> dict[str, Any]:
    """What `setting` takes for a text that must be one of these names. (A Literal says the same by itself.)"""
    return {"fits": lambda name: name in names, "wanted": f"one of {', '.join(names)}"}


def meaning_of(declared: Any) -> str | None:
    """What a dataclass's field means, in one line; None where it does not say."""
    return declared.metadata.get("meaning") or None


def allowed_of(declared: Any) -> Allowed:
    """Which values a dataclass's field may have: any, where it does not say."""
    allowed: Allowed = declared.metadata.get("allowed", Allowed({}))
    return allowed


def check(settings: Any, error: type[MsfusionError] = ConfigError, prefix: str = "") -> None:
    """Raise an error, naming the setting (with a prefix), for the first one that has a value it may not have."""
    kind: type = type(settings)
    choices = _choices(kind)
    for each in fields(settings):
        value = getattr(settings, each.name)
        names = choices.get(each.name)
        wanted = allowed_of(each).refusal(value)
        if names is not None and value not in names:
            wanted = f"one of {', '.join(name for name in names if name is not None)}"
        if wanted is not None:
            raise error(f"{prefix}{each.name} is {quoted(value)}: it must be {wanted}")


@cache
def _choices(settings: type) -> Mapping[str, tuple[Any, ...]]:
    """By the name of each field whose type is a Literal (or None): what it may be."""
    kinds = typing.get_type_hints(settings)
    found = {each.name: _names_in(kinds[each.name]) for each in fields(settings)}
    return {name: names for name, names in found.items() if names}


def _names_in(kind: Any) -> tuple[Any, ...]:
    """The names that a type lists; none where it has anything else in it."""
    if kind is type(None):
        return (None,)
    if typing.get_origin(kind) is Literal:
        return typing.get_args(kind)
    parts = [_names_in(part) for part in typing.get_args(kind)]
    is_choice = typing.get_origin(kind) in (typing.Union, types.UnionType) and all(parts)
    return sum(parts, ()) if is_choice else ()
