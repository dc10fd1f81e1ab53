"""Frames as bytes: msgpack maps with a fixed schema, which a frame's dataclass gives. Nothing is executed."""

from __future__ import annotations

import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache
from typing import Any, TypeVar, overload

from msfusion.errors import StreamError

MOST_ENTRIES = 4096
"""The most entries of a map or list: settings on which both sides agree. Room for a list is taken at once."""

LONGEST_TEXT = 4096

Scalar = int | float | str | bool | None
Agreement = dict[str, Scalar]
"""Everything on which both sides must agree, by a name for people."""

Frame = TypeVar("Frame")


def pack(frame: Any) -> bytes:
    """A frame as bytes."""
    import msgpack

    packed: bytes = msgpack.packb({"kind": type(frame).__name__, **vars(frame)})
    return packed


@overload
def unpack(data: bytes, expected: type[Frame], /) -> Frame: ...


@overload
def unpack(data: bytes, /, *expected: Any) -> Any: ...


def unpack(data: bytes, /, *expected: Any) -> Any:
    """The frame of these bytes, one of the kinds that may come now.

    Raises StreamError for everything else; no more is allocated than some times the bytes that came.
    """
    import msgpack

    try:
        table = msgpack.unpackb(
            data,
            max_map_len=MOST_ENTRIES,
            max_array_len=MOST_ENTRIES,
            max_str_len=LONGEST_TEXT,
            max_ext_len=0,
        )
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise StreamError("a message is damaged: it is no table in the format of msgpack") from error
    came = table.pop("kind") if _is_table(table) else "an unknown one"
    kind: Any = {each.__name__: each for each in expected}.get(came)
    if kind is None:
        names = " or ".join(each.__name__ for each in expected)
        raise StreamError(f"a message of the kind {names} should have come, but {came[:40]} did")
    for name, fits in _schema(kind).items():
        if name not in table or not fits(table[name]):
            raise StreamError(f"the field '{name}' of a message {kind.__name__} is missing or damaged")
    if len(table) != len(_schema(kind)):
        raise StreamError(f"a message {kind.__name__} has fields that it should not have")
    return kind(**table)


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("kind"), str)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_agreement(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(key, str) and (entry is None or isinstance(entry, int | float | str))
        for key, entry in value.items()
    )


_CHECKS: dict[Any, Callable[[Any], bool]] = {
    int: _is_count,
    bool: lambda value: isinstance(value, bool),
    float: lambda value: isinstance(value, float) and math.isfinite(value),
    bytes: lambda value: isinstance(value, bytes),
    str: lambda value: isinstance(value, str),
    list[int]: lambda value: isinstance(value, list) and all(map(_is_count, value)),
    list[bytes]: lambda value: isinstance(value, list) and all(isinstance(each, bytes) for each in value),
    Agreement: _is_agreement,
}


@cache
def _schema(kind: type[Any]) -> dict[str, Callable[[Any], bool]]:
    """What each field of a kind must be."""
    types = typing.get_type_hints(kind)
    return {field.name: _CHECKS[types[field.name]] for field in fields(kind)}


def check_agreement(mine: Agreement, theirs: Mapping[str, Scalar]) -> None:
    """Raises StreamError, naming the first thing in which a participant differs from the server."""
    if theirs.keys() - mine.keys():
        raise StreamError(
            "the participant counts on something that this server does not know: both need the same msfusion",
            "FAILED_PRECONDITION",
        )
    for name, value in mine.items():
        their = theirs.get(name)
        if value != their:
            raise StreamError(
                f"the participant's {name} is {_shown(their)}, and the server's {_shown(value)}: "
                "both need the same configuration, and data of the same kind",
                "FAILED_PRECONDITION",
            )


def _shown(value: Scalar) -> str:
    return "not set" if value is None else repr(value)[:100]
