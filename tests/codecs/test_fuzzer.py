"""The fuzzer, as a user runs it, on few messages; a wide run is in docs/codecs.md."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def test_hostile_messages_are_decoded_or_refused() -> None:
    command = [sys.executable, str(ROOT / "benchmarks/fuzz_codecs.py"), "--payloads", "1500", "--seed", "7"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    found = json.loads(finished.stdout)["codecs"]
    assert len(found) == 7
    for counts in found.values():
        assert counts["refused"] + counts["decoded"] == counts["payloads"] == 1500
        assert counts["refused"] > 500
        assert counts["decoded"] > 30  # the mutations are not so coarse that everything is refused at once
        assert counts["slowest_ms"] < 5000
        assert counts["peak_memory_growth_mb"] < 300
