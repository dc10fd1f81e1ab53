"""What has left a participant, in a log that it keeps for itself: a line for each message, told from its very bytes."""

from __future__ import annotations

import datetime
import hashlib
import json
from pathlib import Path
from typing import Any

from msfusion.engines.grpc.packing import Agreement
from msfusion.federated.messages import decode
from msfusion.files import append_line, refusing_write_errors


class SentLog:
    """A file of lines of JSON; without a path, nothing is written.

    Each line has the time, the kind of message, and its content but for the values of tensors: of these the names,
    types and shapes. A line is there before its message leaves. Raises RunDirectoryError where it cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        if path is not None:
            with refusing_write_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)

    def hello(self, examples: int, agreement: Agreement) -> None:
        """The first message of a connection: how many examples there are, and digests of what both sides agree on."""
        self._write("hello", {"examples": examples, "agreement": agreement})

    def message(self, kind: str, message: bytes) -> None:
        """An update, or a request in the middle of a task."""
        if self._path is not None:
            header, tensors = decode(message)
            forms = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
            about = {"bytes": len(message), "sha256": hashlib.sha256(message).hexdigest()}
            self._write(kind, {**about, "header": header, "tensors": forms})

    def _write(self, kind: str, content: dict[str, Any]) -> None:
        if self._path is not None:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            append_line(self._path, json.dumps({"time": now, "kind": kind, **content}))
