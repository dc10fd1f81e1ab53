"""What is said on a stream: msgpack maps with a fixed schema. Anything else is a StreamError; nothing is executed.

Up, from a participant, each but the last answered by one frame down:

    Hello     who I am and what I count on             Welcome
    Begin     I am ready for a round                   Layers, or Over
    Again     I lost the answer to a step              Answer
    Step      a mini-batch                             Answer
    Finish    the first layers after the round         Thanks
    Goodbye   I have heard that it is over             (the end of the stream)
"""

from __future__ import annotations

import math
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, TypeVar, overload

from msfusion.errors import StreamError

FORMAT = 1
"""The version of the conversation: both sides must have the same."""

MOST_ENTRIES = 256
"""The most entries of a map or list, and so the most tensors that can cross."""

LONGEST_TEXT = 4096
LARGEST_HELLO = 2**16
"""The most bytes of a Hello: whoever says it is not known yet."""

OVERHEAD = 2**12
"""The most bytes that a frame has besides those of its tensors."""

Scalar = int | float | str | bool | None
Agreement = dict[str, Scalar]


@dataclass(frozen=True)
class Hello:
    """Who connects: its number, how many examples it has, and everything on which both must agree.

    `session` tells a process that has lost its connection from another that takes its number; `attempt` is the
    round that it is in the middle of, if any.
    """

    format: int
    participant: int
    session: bytes
    examples: int
    attempt: bytes
    agreement: Agreement


@dataclass(frozen=True)
class Begin:
    """Ready for a round."""


@dataclass(frozen=True)
class Again:
    """Asks for the answer to a step that was answered before."""

    round: int
    step: int


@dataclass(frozen=True)
class Step:
    """A mini-batch: what the first layers made of it, and its targets (64 bit integers, little-endian)."""

    round: int
    step: int
    pieces: list[bytes]
    targets: bytes


@dataclass(frozen=True)
class Finish:
    """The first layers after the round's last step, as safetensors."""

    round: int
    layers: bytes


@dataclass(frozen=True)
class Goodbye:
    """All rounds are done, and the participant knows it: a stream that just ends may have been cut."""


@dataclass(frozen=True)
class Welcome:
    """Whether the round is still in progress in the middle of which the participant is."""

    resumes: bool


@dataclass(frozen=True)
class Layers:
    """A round begins: the first layers before it, and how many of this participant's steps were answered already.

    `attempt` is new whenever a round is begun, also for the second time.
    """

    round: int
    attempt: bytes
    answered: int
    layers: bytes


@dataclass(frozen=True)
class Answer:
    """The gradients of a step, and its loss."""

    round: int
    step: int
    pieces: list[bytes]
    loss: float


@dataclass(frozen=True)
class Thanks:
    """The first layers have arrived."""

    round: int


@dataclass(frozen=True)
class Over:
    """All rounds are done."""

    rounds: int


Up = Hello | Begin | Again | Step | Finish | Goodbye
Down = Welcome | Layers | Answer | Thanks | Over
Frame = TypeVar("Frame", bound=Up | Down)

_KINDS: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (*typing.get_args(Up), *typing.get_args(Down))
}


def pack(frame: Up | Down) -> bytes:
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
    kind: Any = _KINDS.get(table.pop("kind")) if _is_table(table) else None
    if kind not in expected:
        names = " or ".join(each.__name__ for each in expected)
        came = "an unknown one" if kind is None else kind.__name__
        raise StreamError(f"a message of the kind {names} should have come, but {came} did")
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
    list[bytes]: lambda value: isinstance(value, list) and all(isinstance(each, bytes) for each in value),
    Agreement: _is_agreement,
}


@cache
def _schema(kind: type[Any]) -> dict[str, Callable[[Any], bool]]:
    """What each field of a kind must be."""
    types = typing.get_type_hints(kind)
    return {field.name: _CHECKS[types[field.name]] for field in fields(kind)}
