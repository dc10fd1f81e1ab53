"""What a network costs: the rounds of a run in one process, and over gRPC with TLS on this machine's loopback.

    python benchmarks/network.py                                  MSfusion and split learning on the digits
    python benchmarks/network.py --set data.max_train=600 --json

Participants are processes of their own, three of them unless `--set participants.count` says otherwise; both runs end
with the same model, bit for bit, or this fails. Printed are the seconds of a round (the median, without the first),
their ratio, and what a round takes beyond the training of its slowest participant. On a machine with fewer cores than
processes the participants take turns, so the ratio says what messages, TLS and checks cost, not what machines gain.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

JOBS = {
    "msfusion": ["method.start=fresh"],
    "blocks": ["method.start=blocks", "participants.ratio=0.5"],
    "small": ["method.name=small"],
    "split": ["method.name=split", "model.name=convnet", "split.at=layers.3"],
}
COUNT = "participants.count="
COMMON = [f"{COUNT}3", "rounds=8", "run.workers=1", "evaluation.every=8"]


def main() -> None:
    """Run them, and print the seconds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="as of msfusion train"
    )
    arguments = parser.parse_args()
    found = {}
    for name, settings in JOBS.items():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = measured(Path(folder), [*COMMON, *settings, *arguments.set])
        if not arguments.json:
            print(name, found[name], flush=True)
    if arguments.json:
        print(json.dumps(found, indent=1))


def measured(folder: Path, settings: list[str]) -> dict[str, Any]:
    """The seconds of a round in one process and over the network."""
    options = [part for setting in settings for part in ("--set", setting)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "msfusion", *arguments, *options, "--quiet"]
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)

    (folder / "job.toml").write_text("seed = 0\n")
    ended(start("train", "job.toml", "--out", "here"))
    made = [sys.executable, "-m", "msfusion", "certificates", "--out", "keys", "--host", "127.0.0.1"]
    people = int(next(each for each in reversed(settings) if each.startswith(COUNT)).removeprefix(COUNT))
    made += ["--participants", str(people)]
    subprocess.run(made, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = ["job.toml", "--address", f"127.0.0.1:{free.getsockname()[1]}"]
    server = start("serve", *where, "--certificates", "keys/server", "--out", "there")
    participants = [
        start("join", *where, "--certificates", f"keys/participant-{each}", "--participant", str(each))
        for each in range(people)
    ]
    ended(server, *participants)
    models = [(folder / run / "model.safetensors").read_bytes() for run in ("here", "there")]
    if models[0] != models[1]:
        sys.exit("the models differ")
    here, there = seconds_of(folder / "here"), seconds_of(folder / "there")
    return {
        "one process": round(here, 4),
        "network": round(there, 4),
        "ratio": round(there / here, 2),
        "network, beyond the slowest's training": round(beyond_training(folder / "there"), 4),
        "same bits": True,
    }


def ended(*processes: subprocess.Popen[bytes]) -> None:
    """Wait for all of them. Exits where one of them fails."""
    for process in processes:
        if process.wait(600):
            for other in processes:
                other.kill()
            sys.exit(f"a command ended with exit code {process.returncode}")


def seconds_of(run: Path) -> float:
    """The median round, without the first, in which everybody comes."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["seconds"] for line in lines[1:])


def beyond_training(run: Path) -> float:
    """The same of what a round takes beyond the training of its slowest participant; they train at once."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["seconds"] - max(line["each"]["seconds"]) for line in lines[1:])


if __name__ == "__main__":
    main()
