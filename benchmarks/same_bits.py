"""Whether a change of the code left every result as it was: the hashes of what two dozen short runs end with.

Each run goes through the command line: the built-in digits or the Python documentation, three participants, two to four
rounds, every method and every way of carrying it out. Of each run the script tells the SHA-256 of the final model's
tensors and of the metrics of all rounds, without the seconds that they took. A change that should move no bits shows
the same before and after it:

    python benchmarks/same_bits.py --json > before.json
    python benchmarks/same_bits.py --against before.json       # exit status 1 where something differs
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from safetensors.torch import load_file

DIGITS = (
    "rounds=3",
    "data.max_train=120",
    "data.max_test=60",
    "participants.count=3",
    "model.name=convnet",
    "run.workers=1",
)
TEXT = (
    "rounds=3",
    "data.source=python-docs",
    "data.partition=iid",
    "data.max_train=40",
    "data.max_test=16",
    "data.length=12",
    "participants.count=3",
    "model.name=decoder_lm",
    "model.options={features=16, heads=2, layers=2}",
    "run.workers=1",
)
FRESH = (*DIGITS, "method.start=fresh")
GROW = (
    *TEXT,
    "method.name=fedgrow",
    "grow.small=[{features=8, layers=1}, {features=12, layers=2}]",
    "grow.intermediate={features=12, layers=2}",
    "grow.fit={steps=3}",
    "grow.pretraining={optimizer='adamw', learning_rate=0.01}",
    "training.batch_size=8",
    "training.local_epochs=1",
)
SPLIT = (*DIGITS, "method.name=split", "split.at=layers.3")
LATE = (
    "network.machines=[{download_megabits=8, upload_megabits=4, gigaflops=0.5}, {download_megabits=8, "
    "upload_megabits=8, gigaflops=0.5}, {download_megabits=8, upload_megabits=8, gigaflops=2}]",
    "network.deadline=0.15",
    "network.late=downweight",
)

RUNS: Mapping[str, Sequence[str]] = {
    "msfusion, fresh": FRESH,
    "msfusion, two workers": (*FRESH, "run.workers=2"),
    "msfusion, together": (*FRESH, "run.together=3"),
    "msfusion, BatchNorm": (*FRESH, "model.name=same_bits:with_batch_norm"),
    "msfusion, copies, BatchNorm": (
        *DIGITS,
        "method.start=copies",
        "method.recalibrate=true",
        "model.name=same_bits:with_batch_norm",
    ),
    "msfusion, contrastive": (*FRESH, "method.contrastive_weight=0.5"),
    "msfusion, overlap by feedback": (
        *FRESH,
        "method.overlap={shape='feedback', start=0.3, target=0.2, gain=0.5}",
    ),
    "msfusion, falling overlap": (
        *FRESH,
        "method.overlap={shape='linear', start=0.5, end=0.0}",
        "participants.ratio=0.5",
    ),
    "msfusion, late updates": (*FRESH, "rounds=4", "participants.ratio=[1.0, 0.5, 0.25]", *LATE),
    "msfusion, unequal ratios": (*FRESH, "participants.ratio=[1.0, 0.5, 0.25]", "participants.dropout=0.3"),
    "msfusion, blocks": (*DIGITS, "rounds=4", "method.start=blocks", "method.blocks=2"),
    "msfusion, blocks, unequal": (
        *DIGITS,
        "rounds=4",
        "method.start=blocks",
        "participants.ratio=[0.5, 0.25, 0.25]",
        "run.workers=2",
    ),
    "msfusion, copies": (*DIGITS, "method.start=copies"),
    "msfusion, copies, late": (
        *DIGITS,
        "rounds=4",
        "method.start=copies",
        "participants.ratio=[1.0, 0.5, 0.25]",
        *LATE,
    ),
    "msfusion, copies, median": (*DIGITS, "method.start=copies", "method.average=median"),
    "msfusion, auto": DIGITS,
    "msfusion, language": (*TEXT, "method.start=fresh"),
    "msfusion, language, blocks": (*TEXT, "method.start=blocks", "method.blocks=2"),
    "small": (*DIGITS, "method.name=small"),
    "ensemble": (*DIGITS, "method.name=ensemble", "method.blocks=2"),
    "fedavg": (*DIGITS, "method.name=fedavg"),
    "fedrolex": (*DIGITS, "method.name=fedrolex"),
    "heterofl": (*DIGITS, "method.name=heterofl"),
    "feddropout": (*DIGITS, "method.name=feddropout"),
    "split, each": SPLIT,
    "split, joined": (*SPLIT, "split.server_step=joined"),
    "split, relayed": (*SPLIT, "split.clients=relayed"),
    "fedgrow": GROW,
    "fedgrow, two workers": (*GROW, "run.workers=2", "evaluation.own_labels=false"),
    "fedgrow, then the target": (*GROW, "grow.growth_rounds=2", "grow.further='federated'"),
}
"""By what it is about: the settings of each run."""

RESUMED = ("msfusion, fresh", "msfusion, blocks", "msfusion, copies, late", "split, each", "fedgrow")
"""The runs that are also killed after their first round and resumed: they end with the same hashes."""

_KEPT = ("round", "accuracy", "loss", "perplexity", "training_loss", "bytes_down", "bytes_up")
"""What is compared of a round's line of metrics."""

HERE = Path(__file__).resolve().parent


def with_batch_norm() -> Any:
    """A small convolutional network with running statistics, for `model.name = "same_bits:with_batch_norm"`."""
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def msfusion(*arguments: str, killed_after: Path | None = None) -> None:
    """Run the command line; kill it once the given file is there. Raises RuntimeError with what it said if it fails."""
    command = [sys.executable, "-m", "msfusion", *arguments]
    if killed_after is not None:
        process = subprocess.Popen(command, cwd=HERE, stdout=subprocess.DEVNULL)
        while process.poll() is None and not killed_after.exists():
            time.sleep(0.001)
        process.kill()
        process.wait()
        return
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"msfusion {' '.join(arguments)}:\n{done.stdout}{done.stderr}")


def settings_of(settings: Sequence[str]) -> list[str]:
    """As command-line arguments."""
    return [part for setting in settings for part in ("--set", setting)]


def hashes(directory: Path) -> dict[str, str]:
    """What a finished run ended with: its model, and the metrics of its rounds."""
    model = hashlib.sha256()
    for name, tensor in sorted(load_file(directory / "model.safetensors").items()):
        model.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        model.update(tensor.contiguous().view(-1).numpy().tobytes())
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: line.get(key) for key in _KEPT} for line in lines]
    metrics = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    return {"model": model.hexdigest()[:16], "metrics": metrics.hexdigest()[:16]}


def trained(settings: Sequence[str], killed: bool) -> dict[str, str]:
    """The hashes of a run; of one that was killed after its first round and resumed."""
    with tempfile.TemporaryDirectory() as folder:
        run, chosen = Path(folder) / "run", settings_of(settings)
        if killed:
            msfusion(
                "train",
                *chosen,
                "--out",
                str(run),
                killed_after=run / "checkpoints" / "round-000001.safetensors",
            )
            msfusion("train", *chosen, "--out", str(run), "--resume")
        else:
            msfusion("train", *chosen, "--out", str(run))
        return hashes(run)


def main() -> None:
    """Run them, print their hashes, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--against", type=Path, help="a file of hashes that these should equal")
    parser.add_argument("--only", help="the runs whose name has this in it")
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    for name, settings in RUNS.items():
        if arguments.only is not None and arguments.only not in name:
            continue
        ways = {name: False, f"{name}, resumed": True} if name in RESUMED else {name: False}
        for title, killed in ways.items():
            found[title] = trained(settings, killed)
            if not arguments.json:
                print(f"{title:36} {found[title]['model']} {found[title]['metrics']}", flush=True)
    if arguments.json:
        print(json.dumps(found, indent=1))
    if arguments.against is not None:
        before = json.loads(arguments.against.read_text())
        moved = [name for name in found if found[name] != before.get(name)]
        print(
            f"{len(found) - len(moved)} of {len(found)} as before{': not ' if moved else ''}{', '.join(moved)}"
        )
        sys.exit(1 if moved else 0)


if __name__ == "__main__":
    main()
