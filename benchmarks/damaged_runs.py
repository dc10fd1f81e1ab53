"""Damage copies of run directories, one file in each, then resume them (and export those that had finished).

What comes of it must be the undamaged run's very model, or one sentence with exit code 2 that leaves the copy as it
was. Everything else is listed as wrong: another model, another figure, a traceback, a file half-written.

python benchmarks/damaged_runs.py --copies 200 --json
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from safetensors.torch import load_file
from typer.testing import CliRunner

from msfusion.cli.main import app
from msfusion.experiment.config import Config, load_config
from msfusion.experiment.grow import GrowRun
from msfusion.experiment.kinds import prepare
from msfusion.experiment.prepared import Prepared
from msfusion.experiment.train import Silent, train

QUICK = (
    "rounds=3",
    "data.max_train=60",
    "data.max_test=20",
    "participants.count=2",
    "training.local_epochs=1",
    "run.workers=1",
)
CONVNET = ("model.name=convnet", "model.options={widths=[8, 8], convolutions=[1, 1]}")
METHODS: dict[str, tuple[str, ...]] = {
    "msfusion": (*QUICK, *CONVNET, "method.contrastive_weight=1"),
    "split": (*QUICK, *CONVNET, "method.name=split", "split={at='layers.0'}"),
    "fedgrow": (
        *QUICK,
        "method.name=fedgrow",
        "model.name=transformers:vit",
        "model.options={hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, patch_size=4}",
        "grow.small=[{hidden_size=4, intermediate_size=4}]",
        "grow.intermediate={hidden_size=6, intermediate_size=6}",
        "grow.fit={steps=2}",
    ),
}
"""All that keep checkpoints, on the built-in digits; the first and the last keep something for participants in them."""
STOPPED_AFTER = 2
LAST, BEFORE = -1, -2


@dataclass(frozen=True)
class Case:
    """A copy of a run, and what is done to which of its files."""

    method: str
    finished: bool
    file: str
    damage: str


def find(run: Path, file: str) -> Path:
    """One of a run's files by what it is."""
    if file.startswith("checkpoint"):
        order = sorted((run / "checkpoints").iterdir())
        return order[BEFORE if "before" in file else LAST]
    return next((run / "tensorboard").iterdir()) if file == "tensorboard" else run / file


def cut(path: Path, other: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(1, len(content))])


def flip(path: Path, other: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 1, 8))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path, Path, random.Random], None]] = {
    "cut": cut,
    "emptied": lambda path, other, draw: path.write_bytes(b"") and None,
    "flipped": flip,
    "removed": lambda path, other, draw: path.unlink(),
    "swapped": lambda path, other, draw: shutil.copyfile(other, path) and None,
}
ALWAYS = (
    "config.toml",
    "fingerprint.json",
    "metrics.jsonl",
    "checkpoint",
    "checkpoint before",
    "tensorboard",
)
AT_THE_END = ("model.safetensors", "summary.json")


def cases(methods: Sequence[str], copies: int, draw: random.Random) -> list[Case]:
    """So many, each kind before any kind a second time."""
    kinds = [
        Case(method, finished, file, damage)
        for method, finished in itertools.product(methods, (True, False))
        for file in (*ALWAYS, *(AT_THE_END if finished else ()))
        for damage in DAMAGES
    ]
    chosen: list[Case] = []
    while len(chosen) < copies:
        chosen += draw.sample(kinds, min(len(kinds), copies - len(chosen)))
    return chosen


class Stopping(Silent):
    """Ends a run in the middle, as a power cut would."""

    def round(self, line: Mapping[str, Any]) -> None:
        """A round has ended."""
        if line["round"] == STOPPED_AFTER:
            raise KeyboardInterrupt


class Runs:
    """Undamaged runs of a method, made when they are first asked for."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.at = cache(self._made)
        self.expected = cache(self._expected)

    def _made(self, method: str, finished: bool, seed: int) -> Path:
        path = self.place / f"{method}-{'finished' if finished else 'interrupted'}-{seed}"
        with suppress(KeyboardInterrupt):
            train(config_of(method, seed), path, watcher=Silent() if finished else Stopping())
        return path

    def _expected(self, method: str) -> dict[str, Any]:
        """What an undamaged run ends with, and exports."""
        run = self.at(method, True, 0)
        out = self.place / f"{method}-exported"
        told = CliRunner().invoke(app, export_command(method, run, out))
        if told.exit_code:
            raise RuntimeError(f"an undamaged run of {method} cannot be exported: {told.output}")
        return {"resumed": result_of(run), "exported": digest(out / "model.safetensors")}


@contextmanager
def prepared_once() -> Iterator[None]:
    """Each configuration is prepared (loaded, traced, counted) once in this process and not for every command.

    What is prepared follows from the configuration alone, which every command reads for itself. The runs that the
    others are compared with are prepared anew.
    """
    known: dict[str, Prepared] = {}

    def once(make: Callable[[Config], Prepared], config: Config, parts: object = None) -> Prepared:
        key = config.to_toml()
        if key not in known:
            known[key] = make(config)
        return known[key]

    resumed = partial(train, preparing=partial(once, prepare))
    with (
        patch("msfusion.experiment.train.train", resumed),
        patch("msfusion.experiment.export.GrowRun", partial(once, GrowRun)),
    ):
        yield


def config_of(method: str, seed: int) -> Config:
    return load_config(None, [*METHODS[method], f"seed={seed}"])


def export_command(method: str, run: Path, out: Path) -> list[str]:
    return ["export", str(run), "--out", str(out), *(["--participant", "1"] if method == "fedgrow" else [])]


def digest(path: Path) -> str:
    """Of the tensors in a file, read without msfusion."""
    tensors = load_file(path)
    texts = (f"{name} {tensors[name].dtype} {tensors[name].tolist()}" for name in sorted(tensors))
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def result_of(run: Path) -> dict[str, Any]:
    """The model and all figures of a finished run but for how long it took."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    return {
        "model": digest(run / "model.safetensors"),
        "metrics": [{**line, "seconds": 0, "each": {**line["each"], "seconds": 0}} for line in lines],
        "summary": {
            **summary,
            "seconds": 0,
            "results": [{**row, "seconds": 0} for row in summary["results"]],
            "files": None,
            "sha256": None,
        },
    }


def contents(run: Path) -> dict[str, bytes]:
    files = (path for path in run.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def outcome_of(command: list[str], run: Path, same: Callable[[], bool]) -> str:
    """`identical`, `refused`, or what is wrong. The command runs in this process, as a new one would run it."""
    before = contents(run)
    told = CliRunner().invoke(app, command)
    if told.exit_code == 0:
        return "identical" if same() else "SILENT: another result"
    sentence = told.stderr.strip()
    if told.exit_code != 2 or not sentence.startswith("msfusion: ") or "\n" in sentence:
        return f"exit code {told.exit_code}: {told.exception!r}"
    return "refused" if contents(run) == before else f"refused, but the files have changed: {sentence}"


def examine(case: Case, runs: Runs, draw: random.Random) -> dict[str, str]:
    """What came of each command on a damaged copy."""
    expected = runs.expected(case.method)
    run, out = runs.place / "copy", runs.place / "exported"
    shutil.copytree(runs.at(case.method, case.finished, 0), run)
    try:
        other = find(runs.at(case.method, case.finished, 1), case.file)
        DAMAGES[case.damage](find(run, case.file), other, draw)
        outcomes = {}
        if case.finished:
            command = export_command(case.method, run, out)
            outcomes["export"] = outcome_of(
                command, run, lambda: digest(out / "model.safetensors") == expected["exported"]
            )
        # The configuration is named, as its own copy may be what is missing; half of the time where it is not.
        named = (
            []
            if (run / "config.toml").exists() and draw.random() < 0.5
            else [str(runs.place / "config.toml")]
        )
        (runs.place / "config.toml").write_text(config_of(case.method, 0).to_toml())
        command = ["train", *named, "--quiet", "--resume", "--out", str(run)]
        outcomes["resume"] = outcome_of(command, run, lambda: result_of(run) == expected["resumed"])
        return outcomes
    finally:
        shutil.rmtree(run)
        shutil.rmtree(out, ignore_errors=True)


def measure(copies: int, seed: int, place: Path, methods: Sequence[str] = tuple(METHODS)) -> dict[str, Any]:
    """All cases; `wrong` has those that came to anything but the same result or a sentence."""
    draw, runs, begin = random.Random(seed), Runs(place), time.perf_counter()
    counts: dict[str, Counter[str]] = {"export": Counter(), "resume": Counter()}
    by_file: dict[str, Counter[str]] = {}
    wrong = []
    with prepared_once():
        examined = [(case, examine(case, runs, draw)) for case in cases(methods, copies, draw)]
    for case, outcomes in examined:
        for command, outcome in outcomes.items():
            counts[command][outcome if outcome in ("identical", "refused") else "wrong"] += 1
            state = "finished" if case.finished else "interrupted"
            by_file.setdefault(f"{state}: {case.file}, {case.damage}", Counter())[f"{command} {outcome}"] += 1
            if outcome not in ("identical", "refused"):
                wrong.append({**vars(case), "command": command, "outcome": outcome})
    return {
        "copies": copies,
        "seed": seed,
        "methods": list(methods),
        **{command: dict(count) for command, count in counts.items()},
        "wrong": wrong,
        "by_file": {name: dict(sorted(by_file[name].items())) for name in sorted(by_file)},
        "seconds": round(time.perf_counter() - begin, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--copies", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the damages")
    parser.add_argument("--method", action="append", choices=[*METHODS], help="several times; default: all")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        result = measure(given.copies, given.seed, Path(place), given.method or tuple(METHODS))
    if given.json:
        print(json.dumps(result, indent=2))
    else:
        print(
            f"{given.copies} damaged copies: {result['resume']} resumed, {result['export']} exported, "
            f"{len(result['wrong'])} wrong"
        )
    sys.exit(bool(result["wrong"]))


if __name__ == "__main__":
    main()
