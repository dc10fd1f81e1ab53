"""Frames, tasks and updates in Flower's records, and what a participant keeps in Flower's context.

Flower's own way to put tensors into arrays is not used: what those hold is known only when they have been unpacked.
Nothing here needs torch, so that a ClientApp starts fast.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from msfusion.engines.flower.frames import LARGEST_FRAME
from msfusion.errors import StreamError

FRAME, BODY = "msfusion.frame", "msfusion.body"
"""The names of a message's records."""

_KEPT = re.compile(r"msfusion\.kept\.(\d{1,9})")


def records_of(frame: bytes, body: bytes = b"") -> RecordDict:
    """A message's content."""
    records: dict[str, Any] = {FRAME: ConfigRecord({"bytes": frame})}
    if body:
        records[BODY] = _raw_record(body)
    return RecordDict(records)


def said_in(records: RecordDict) -> tuple[bytes, bytes]:
    """The frame and the body of a message, from whoever it comes. Raises StreamError."""
    record = records.get(FRAME)
    frame = record.get("bytes") if isinstance(record, ConfigRecord) and len(record) == 1 else None
    if not isinstance(frame, bytes) or not records.keys() <= {FRAME, BODY}:
        raise StreamError("a message is damaged: it is none of msfusion's")
    if len(frame) > LARGEST_FRAME:
        raise StreamError(f"a frame has {len(frame)} bytes, more than {LARGEST_FRAME}")
    return frame, _raw_in(records[BODY]) if BODY in records else b""


def kept_in(state: RecordDict) -> dict[int, bytes]:
    """By round, what a participant has kept in a context. Raises StreamError where it is damaged."""
    return {int(found[1]): _raw_in(state[name]) for name in state if (found := _KEPT.fullmatch(name))}


def keep_in(state: RecordDict, kept: Mapping[int, bytes]) -> None:
    """Keep this in a context, in place of what was there."""
    for name in [name for name in state if _KEPT.fullmatch(name)]:
        del state[name]
    for number, content in kept.items():
        state[f"msfusion.kept.{number}"] = _raw_record(content)


def _raw_record(content: bytes) -> ArrayRecord:
    """Bytes as one array: Flower carries arrays in pieces, so there is no limit to their size."""
    return ArrayRecord({"bytes": Array("uint8", (len(content),), "msfusion", content)})


def _raw_in(record: object) -> bytes:
    array = record.get("bytes") if isinstance(record, ArrayRecord) and len(record) == 1 else None
    if not isinstance(array, Array) or not isinstance(array.data, bytes):
        raise StreamError("a message is damaged: it holds no array of bytes")
    return array.data
