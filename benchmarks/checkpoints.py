"""What a round's checkpoint costs where participants remember much: seconds and bytes, with files for it and without.

The participants are those of a sum of four blocks on a language model: each remembers 50 MB of logits, which change
when a phase of twelve rounds ends. The same checkpoints are written twice, in turns: by a run directory that writes
what changed into a file of its own, and by one that writes everything into each checkpoint.

    python benchmarks/checkpoints.py --json
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from msfusion.experiment import memory_files
from msfusion.experiment.directory import RunDirectory
from msfusion.experiment.environment import environment
from msfusion.experiment.fingerprint import Fingerprint

PARTICIPANTS, NUMBERS = 10, 12_500_000
PHASES, ROUNDS_OF_A_PHASE = 2, 12


def measured(
    path: Path, enough: float, first: int, memories: dict[int, dict[str, Tensor]]
) -> dict[str, float]:
    """One phase in a run directory: its seconds, and the bytes of the files that it wrote."""
    directory = RunDirectory(path)
    written, seconds = 0, 0.0
    with patch.object(memory_files, "ENOUGH", enough):
        for rounds in range(first, first + ROUNDS_OF_A_PHASE):
            directory.add_metrics({"round": rounds})
            known = {each: each.stat().st_mtime_ns for each in (path / "checkpoints").iterdir()}
            begin = time.perf_counter()
            directory.save_checkpoint(rounds, {"weights": torch.zeros(100_000)}, "same", memories)
            seconds += time.perf_counter() - begin
            written += sum(
                each.stat().st_size
                for each in (path / "checkpoints").iterdir()
                if known.get(each) != each.stat().st_mtime_ns
            )
    return {"seconds": seconds, "bytes": written}


def measure() -> dict[str, Any]:
    """Both, phase by phase."""
    totals = {
        name: {"seconds": 0.0, "bytes": 0.0} for name in ("in each checkpoint", "in files of their own")
    }
    with tempfile.TemporaryDirectory(dir=".") as place:
        for name in totals:
            RunDirectory.create(Path(place) / name, "", Fingerprint("", {}, {}, ""))
        for phase in range(PHASES):
            memories = {who: {"block0.logits": torch.randn(NUMBERS)} for who in range(PARTICIPANTS)}
            for name, enough in zip(totals, (float("inf"), memory_files.ENOUGH), strict=True):
                done = measured(Path(place) / name, enough, 1 + phase * ROUNDS_OF_A_PHASE, memories)
                for key, value in done.items():
                    totals[name][key] += value
    before, after = totals.values()
    rounds = PHASES * ROUNDS_OF_A_PHASE
    return {
        "environment": environment(),
        "rounds": rounds,
        "a round": {
            name: {key: round(value / rounds, 4) for key, value in each.items()}
            for name, each in totals.items()
        },
        "ratio": {key: round(after[key] / before[key], 4) for key in before},
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    result = measure()
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    for name, each in result["a round"].items():
        print(f"{name}: {each['seconds']:.2f} s and {each['bytes'] / 1e6:.0f} MB a round")
    print(f"ratio: {result['ratio']['seconds']:.2f} of the time, {result['ratio']['bytes']:.2f} of the bytes")


if __name__ == "__main__":
    main()
