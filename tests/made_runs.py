"""Run directories made by hand, for the pages that show them: as a run would leave them, without any training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from msfusion.files import write_sealed_json


def line_of(number: int, participants: int, **more: Any) -> dict[str, Any]:
    """A line of metrics as `train` writes it; who is participant 1 takes a second, and so on."""
    everybody = list(range(participants))
    line = {
        "round": number,
        "participants": everybody,
        "training_loss": 2.0 / number,
        "loss": 3.0 / number,
        "accuracy": 1 - 0.8 / number,
        "bytes_down": 1000 * participants,
        "bytes_up": 500 * participants,
        "measuring_bytes": 0,
        "seconds": 2.0,
        "entry_coverage": min(1.0, number / 4),
        "each": {
            "loss": [1.0] * participants,
            "seconds": [float(each) for each in everybody],
            "bytes_down": [1000] * participants,
            "bytes_up": [500] * participants,
        },
    }
    return {**line, **more}


def made_run(
    path: Path,
    *,
    rounds: int = 4,
    participants: int = 3,
    finished: bool = True,
    method: str = "msfusion",
    seed: int = 0,
    planned: int | None = None,
    lines: list[dict[str, Any]] | None = None,
    about: dict[str, Any] | None = None,
) -> Path:
    """Fill a directory with the files of a run, and return it."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.toml").write_text(
        f"seed = {seed}\nrounds = {planned or rounds}\nparticipants.count = {participants}\n"
        f'method.name = "{method}"\ndata.source = "elsewhere"\n'
    )
    write_sealed_json(path / "fingerprint.json", {"config": "c0ffee", "data": {"test": "beef"}, "code": {}})
    made = lines if lines is not None else [line_of(each, participants) for each in range(1, rounds + 1)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in made))
    noted = {
        "environment": {"python": "3.11.7", "torch": "2.13.0"},
        "task": "classification",
        "classes": 10,
        "examples_per_round": [10 * (each + 1) for each in range(participants)],
        **(about or {}),
    }
    (path / "about.json").write_text(json.dumps(noted))
    if finished:
        write_sealed_json(path / "summary.json", summary_of(method, len(made), participants))
    return path


def summary_of(method: str, rounds: int, participants: int) -> dict[str, Any]:
    """The final figures of such a run."""
    costs = {"parameters": 100, "share": 0.25, "flops_per_example": 1000, "bytes_down": 1000, "bytes_up": 500}
    return {
        "method": method,
        "rounds": rounds,
        "data": "pictures",
        "accuracy": 0.8,
        "loss": 0.5,
        "entry_coverage": 1.0,
        "participants": [
            {"participant": each, "examples": 10, "ratio": 0.25, "peak_memory": 10**6 + each, **costs}
            for each in range(participants)
        ],
        "results": [
            {
                "participant": each,
                "rounds": rounds,
                "loss": 1.0,
                "seconds": 1.0,
                "bytes_down": 1,
                "bytes_up": 2,
            }
            for each in range(participants)
        ],
        "full_model": {"parameters": 400, "peak_memory": 4 * 10**6, **{**costs, "share": 1.0}},
    }


def windows_by_hand(rounds: int, participants: int, units: int, name: str = "layers.0") -> dict[str, Any]:
    """As `about.windows_of` notes them: participant p holds unit (p + round) modulo the number of units alone."""
    import base64

    sets = []
    for unit in range(units):
        bits = bytearray(math.ceil(units / 8))
        bits[unit // 8] |= 128 >> (unit % 8)
        sets.append(base64.b64encode(bytes(bits)).decode())
    held = [[(each + number) % units for each in range(participants)] for number in range(rounds)]
    return {
        "rounds": rounds,
        "groups": [{"name": name, "units": units, "sets": sets, "held": held}],
        "coverage": [{"layer": "layers.0", "shares": [min(1.0, (each + 1) / 4) for each in range(rounds)]}],
    }
