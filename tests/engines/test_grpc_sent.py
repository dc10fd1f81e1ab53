"""The log of what has left a participant: every message, from its bytes, before it leaves."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from loopback import AGREED

from msfusion.engines.grpc.sent import SentLog
from msfusion.errors import RunDirectoryError
from msfusion.federated.messages import encode


def test_a_line_tells_all_but_the_values_of_tensors(tmp_path: Path) -> None:
    path = tmp_path / "new" / "sent.jsonl"
    log, message = SentLog(path), encode({"loss": 0.5, "examples": 8}, {"w": torch.ones(2, 3)})
    log.hello(8, AGREED)
    log.message("update", message)
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert (first["kind"], first["examples"], first["agreement"]) == ("hello", 8, {"model": "small"})
    assert (second["kind"], second["bytes"]) == ("update", len(message))
    assert second["sha256"] == hashlib.sha256(message).hexdigest()
    assert second["header"] == {"loss": 0.5, "examples": 8}
    assert second["tensors"] == {"w": ["torch.float32", [2, 3]]}


def test_without_a_path_nothing_is_written() -> None:
    SentLog(None).message("update", b"no message at all")


def test_nothing_leaves_where_the_log_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "sent.jsonl").mkdir()
    with pytest.raises(RunDirectoryError, match=r"sent\.jsonl"):
        SentLog(tmp_path / "sent.jsonl").hello(8, AGREED)
