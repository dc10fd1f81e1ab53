"""Kill a run with SIGKILL at random moments, resume it, and compare what it leaves with an undisturbed run's: the
model, and what participants keep for themselves.

python benchmarks/kill_resume.py --kills 20 --json
python benchmarks/kill_resume.py --config examples/fedgrow.toml --set rounds=4 --set data.max_train=300 --json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from msfusion.digests import digest_of_tensors

QUICK = (
    "rounds=12",
    "training.local_epochs=1",
    "data.max_train=200",
    "data.max_test=100",
    "participants.count=4",
    "model.name=convnet",
    "run.workers=2",
)


def command(directory: Path, arguments: list[str]) -> list[str]:
    return [
        sys.executable,
        "-m",
        "msfusion.cli.main",
        "train",
        "--resume",
        "--out",
        str(directory),
        *arguments,
    ]


def kill(directory: Path, arguments: list[str], round_: int, delay: float) -> bool:
    """Start (or continue) a run and kill it some seconds after a round; whether it was still running then."""
    process = subprocess.Popen(
        command(directory, arguments),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    while process.poll() is None and rounds_done(directory) < round_:
        time.sleep(0.002)
    try:
        process.wait(timeout=delay)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)  # the process alone: its workers have to notice
        process.wait()
        return True
    return False


def finish(directory: Path, arguments: list[str]) -> float:
    """Run to the end; the seconds it took. Raises RuntimeError where it fails."""
    begin = time.perf_counter()
    finished = subprocess.run(
        command(directory, arguments),
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if finished.returncode:
        raise RuntimeError(f"exit code {finished.returncode}: {finished.stderr}")
    return time.perf_counter() - begin


def digest(directory: Path) -> str:
    """Of the model, and of the tensors of the last checkpoint, which has the participants' memories.

    The checkpoint's header is left out: it goes with the metrics, which say how long each round took.
    """
    last = max((directory / "checkpoints").iterdir())
    return hashlib.sha256(
        (directory / "model.safetensors").read_bytes() + digest_of_tensors(load_file(last)).encode()
    ).hexdigest()


def rounds_done(directory: Path) -> int:
    metrics = directory / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def measure(kills: int, arguments: list[str], seed: int, place: Path) -> dict[str, Any]:
    """As many kills as asked for, over as many runs as that takes; every run is finished and compared."""
    draw = random.Random(seed)
    seconds = finish(place / "undisturbed", arguments)
    expected = digest(place / "undisturbed")
    total = rounds_done(place / "undisturbed")
    runs, identical = 0, 0
    rounds: list[int] = []
    while len(rounds) < kills:
        directory = place / f"run{runs}"
        for _ in range(draw.randint(1, 4)):
            # one kill in five strikes at the start, the others anywhere in or between two rounds
            first = rounds_done(directory)
            starting = draw.random() < 0.2
            strike = 0 if starting else draw.randint(first, total)
            delay = draw.uniform(0.0, seconds / 2 if starting else 0.2 * seconds / total)
            if len(rounds) < kills and kill(directory, arguments, strike, delay):
                rounds.append(rounds_done(directory))
        finish(directory, arguments)
        runs += 1
        identical += digest(directory) == expected
    return {
        "kills": len(rounds),
        "runs": runs,
        "identical": identical,
        "rounds": total,
        "rounds_done_when_killed": rounds,
        "undisturbed_seconds": round(seconds, 2),
        "sha256": expected,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument(
        "--set", action="append", default=[], help="settings of the run, as of `msfusion train`"
    )
    parser.add_argument("--config", help="by default the built-in one, made small")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    overrides = [*(QUICK if given.config is None else ()), *given.set]
    run = [given.config] * (given.config is not None) + [p for each in overrides for p in ("--set", each)]
    with tempfile.TemporaryDirectory() as place:
        result = measure(given.kills, run, given.seed, Path(place))
    if given.json:
        print(json.dumps(result, indent=2))
    else:
        print(f"{result['kills']} kills in {result['runs']} runs, of which {result['identical']} ended alike")
    sys.exit(result["identical"] != result["runs"])


if __name__ == "__main__":
    main()
