"""What server and participants say to each other, in Flower's records.

    Meet    who are you?                    Here, or Unfit
    Work    do this task                    Done and an update, or Failed, or Lost
    Over    all rounds are done             Thanks

A message is a record with a frame (msgpack, with a fixed schema) and, of a task or an update, one with its bytes
(safetensors). Flower's own way to put tensors into arrays is not used: what those hold is known only
when they have been unpacked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from msfusion.engines.grpc.packing import Agreement, pack, unpack
from msfusion.errors import StreamError

FORMAT = 1
"""The version of what is said: both sides must have the same."""

FRAME, BODY = "msfusion.frame", "msfusion.body"
"""The names of the records."""

LARGEST_FRAME = 2**17
"""The most bytes of a frame."""


@dataclass(frozen=True)
class Meet:
    """Which participant are you, and what do you count on?"""

    format: int


@dataclass(frozen=True)
class Here:
    """A participant: its number, how many examples it has, and everything on which both sides must agree."""

    format: int
    participant: int
    examples: int
    agreement: Agreement


@dataclass(frozen=True)
class Unfit:
    """The node cannot take part: why, as far as that may be told. `spare`: nothing is wrong, there are enough others."""

    why: str
    spare: bool


@dataclass(frozen=True)
class Work:
    """Something to do; the task is the message's body.

    `kept` is the round, counted from 1, in which the participant kept what it is to go on from; 0 where it is nothing.
    `rounds_kept` is how many rounds the server may go back when it is started again. `examples` is how many the
    participant has said that it has, and `agreement` a digest of what was agreed on: where its data have changed since,
    it does nothing. `everybodys` are how many everybody has, where participants have data of their own.
    """

    participant: int
    kept: int
    rounds_kept: int
    examples: int
    everybodys: list[int]
    agreement: str


@dataclass(frozen=True)
class Done:
    """A task is done; the update is the message's body."""


@dataclass(frozen=True)
class Failed:
    """A task could not be done. Why is told on the participant's own machine: the reason may quote its data."""


@dataclass(frozen=True)
class Lost:
    """What the participant kept in this round is not there any more, so it cannot go on."""

    number: int


@dataclass(frozen=True)
class Over:
    """All rounds are done: nobody goes on from what was kept."""

    rounds: int
    participant: int


@dataclass(frozen=True)
class Thanks:
    """It is known."""


def records_of(frame: object, body: bytes = b"") -> RecordDict:
    """A message's content."""
    records: dict[str, Any] = {FRAME: ConfigRecord({"bytes": pack(frame)})}
    if body:
        records[BODY] = raw_record(body)
    return RecordDict(records)


def raw_record(content: bytes) -> ArrayRecord:
    """Bytes as one array: Flower carries arrays in pieces, so there is no limit to their size."""
    return ArrayRecord({"bytes": Array("uint8", (len(content),), "msfusion", content)})


def raw_in(record: object) -> bytes:
    """The bytes in a `raw_record`. Raises StreamError for anything else."""
    array = record.get("bytes") if isinstance(record, ArrayRecord) and len(record) == 1 else None
    if not isinstance(array, Array) or not isinstance(array.data, bytes):
        raise StreamError("a message is damaged: it holds no array of bytes")
    return array.data


def said_in(records: RecordDict, *expected: type[Any]) -> tuple[Any, bytes]:
    """The frame, of one of these kinds, and the body of a message, from whoever it comes. Raises StreamError."""
    record = records.get(FRAME)
    frame = record.get("bytes") if isinstance(record, ConfigRecord) and len(record) == 1 else None
    if not isinstance(frame, bytes) or not records.keys() <= {FRAME, BODY}:
        raise StreamError("a message is damaged: it is none of msfusion's")
    if len(frame) > LARGEST_FRAME:
        raise StreamError(f"a frame has {len(frame)} bytes, more than {LARGEST_FRAME}")
    body = raw_in(records[BODY]) if BODY in records else b""
    return unpack(frame, *expected), body
