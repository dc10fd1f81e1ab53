"""What run directories hold, for a page. Nothing in them is believed, and what is damaged or missing is said in words.

A directory may come from anybody: files may be of any size and any shape, be links to elsewhere, or have no end.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msfusion.errors import RunDirectoryError
from msfusion.files import digest_of_json
from msfusion.quoting import short

MOST_BYTES = 64 * 2**20
"""Of one file: the metrics of a thousand rounds with a thousand participants."""
MOST_RUNS = 200
"""On one page."""
MOST_IN_ALL = 256 * 2**20
"""Bytes of all runs together: what they hold takes about ten times as much memory."""
_SEED = re.compile(r"(.+)-seed\d+")


@dataclass
class Run:
    """One run, as far as its files can be read.

    `table` is its configuration as its file has it, unchecked, and `lines` one object for each round; `about` and
    `summary` are empty where the run has not written them. `problems` says in sentences what is damaged or missing.
    `label` is what the run is called beside others of the same comparison.
    """

    path: Path
    name: str
    label: str = ""
    bytes_read: int = 0
    table: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    lines: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    fingerprint: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def method(self) -> str:
        """The method's name, as the configuration or else the summary has it."""
        named = item(self.table, "method", "name") or self.summary.get("method")
        return short(named) if isinstance(named, str) else "unknown method"

    @property
    def seed(self) -> int | None:
        """What everything random was drawn from."""
        return whole(self.table.get("seed"))

    @property
    def planned(self) -> int | None:
        """How many rounds there are to be."""
        return whole(self.table.get("rounds"))

    @property
    def count(self) -> int:
        """How many participants there are, as far as anything says so."""
        asked = whole(item(self.table, "participants", "count"))
        seen = [who for line in self.lines for who in participants_of(line)]
        return max(asked or 0, max(seen, default=-1) + 1, len(rows_of(self.summary, "participants")))

    def series(self, key: str) -> list[float | None]:
        """A figure of each round; None where the round has none, or one that is not finite."""
        return [number(line.get(key)) for line in self.lines]

    def not_finite(self, key: str) -> list[int]:
        """The rounds whose figure is there, and no finite number: JSON has null for it."""
        return [line["round"] for line in self.lines if key in line and number(line[key]) is None]


def number(value: object) -> float | None:
    """A finite number, or None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def whole(value: object) -> int | None:
    """A whole number that is not negative and not absurd, or None."""
    found = number(value)
    return int(found) if found is not None and found == int(found) and 0 <= found < 2**53 else None


def item(value: object, *keys: str) -> Any:
    """What stands under keys within keys; None where any of them is missing."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def tested_on(runs: Sequence[Run]) -> str:
    """What the figures of some runs are of: the test data, or the examples that took their place."""
    kinds = {item(run.table, "data", "validation_share") is not None for run in runs}
    if len(kinds) > 1:
        return "the test or validation data"
    return "the validation data" if True in kinds else "the test data"


def rows_of(value: object, key: str) -> list[dict[str, Any]]:
    """The objects of a list that stands under a key; none where there is no such list."""
    found = item(value, key)
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def participants_of(line: Mapping[str, Any], key: str = "participants") -> list[int]:
    """The numbers of participants that a line of metrics lists under a key."""
    found = line.get(key)
    numbers = [whole(each) for each in found] if isinstance(found, list) else []
    return [each for each in numbers if each is not None and each < 10**6]


def read_runs(paths: Sequence[Path], *, may_be_empty: bool = False) -> list[Run]:
    """The runs in some directories, each of which is that of one run or of several (`compare`).

    Raises RunDirectoryError where there is none, unless that may be.
    """
    runs: list[Run] = []
    for path in {each.resolve(): each for each in paths}.values():  # each once, whoever names it twice
        found = [path] if _is_run(path) else [each for each in _folders(path) if _is_run(each)]
        if not found and not may_be_empty:
            raise RunDirectoryError(
                f"there is no run in {path}: name the directory of a run, or of a comparison of several"
            )
        labels = _labels(path) if found != [path] else {}
        order = list(labels)  # first those of compare.json: the first method leads
        found.sort(key=lambda each: order.index(each.name) if each.name in labels else 0)
        for each in found[: MOST_RUNS - len(runs)]:
            left = MOST_IN_ALL - sum(run.bytes_read for run in runs)
            runs.append(_read(each, labels.get(each.name, ""), left))
    return runs


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in ("config.toml", "metrics.jsonl", "summary.json"))


def _folders(path: Path) -> Iterator[Path]:
    """The folders in a directory by their names; what is elsewhere, and only linked to, is not in it."""
    try:
        found = sorted(each for each in path.iterdir() if not each.is_symlink() and each.is_dir())
    except OSError:
        return iter(())
    return iter(found)


def _read(path: Path, label: str, most: int) -> Run:
    """A run, of whose files no more than so many bytes are read."""
    run = Run(path, short(path.resolve().name or str(path)), label)
    run.config_text = _told(run, most, "config.toml", lambda content: content.decode(), "")
    try:
        run.table = tomllib.loads(run.config_text)
    except (ValueError, RecursionError):
        run.problems.append("config.toml is damaged: it is no TOML")
        run.config_text = ""
    run.lines = _told(run, most, "metrics.jsonl", lambda content: _lines(run, content), [])
    run.summary = _told(run, most, "summary.json", _sealed, {}, needed=False)
    run.fingerprint = _told(run, most, "fingerprint.json", _sealed, {})
    run.about = _told(run, most, "about.json", _object, {}, needed=False)
    return run


def _told(
    run: Run, most: int, name: str, made: Callable[[bytes], Any], otherwise: Any, *, needed: bool = True
) -> Any:
    """What is made of a file's content; where it is damaged or missing, the run's problems say so.

    `most` is how many bytes of the whole run may be read.
    """
    try:
        content = read_inside(run.path, name, min(MOST_BYTES, max(0, most - run.bytes_read)))
        if content is not None:
            run.bytes_read += len(content)
            return made(content)
        if needed:
            run.problems.append(f"{name} is missing")
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else short(error)
        run.problems.append(f"{name} is damaged: {reason or type(error).__name__}")
    return otherwise


def read_inside(folder: Path, name: str, most: int = MOST_BYTES) -> bytes | None:
    """The content of a file that lies in a folder itself; None where there is no such file.

    A link is not followed: it could lead to what is not to be shown. Raises OSError, ValueError for what is too long.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(folder / name, flags | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is no file")
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most} bytes, and is not read")
    return content


def _lines(run: Run, content: bytes) -> list[dict[str, Any]]:
    """The rounds up to the first line that is damaged. A last line without its end is still being written."""
    lines: list[dict[str, Any]] = []
    texts = content.split(b"\n")
    for place, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text.decode())
        except (ValueError, RecursionError):
            line = None
        if not isinstance(line, dict) or line.get("round") != len(lines) + 1:
            if place < len(texts):
                run.problems.append(f"metrics.jsonl is damaged in line {place}: what follows is left out")
            break
        lines.append(line)
    return lines


def _object(content: bytes) -> dict[str, Any]:
    value = json.loads(content.decode())
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    return value


def _sealed(content: bytes) -> dict[str, Any]:
    """An object with a digest of itself, as `files.write_sealed_json` writes it."""
    value = _object(content)
    if value.pop("sha256", None) != digest_of_json(value):
        raise ValueError("it is not what was written there")
    return value


def _labels(path: Path) -> dict[str, str]:
    """What the runs of a comparison are called, by the names of their folders."""
    try:
        content = read_inside(path, "compare.json")
        table = {} if content is None else _object(content)
    except (OSError, ValueError, RecursionError):
        table = {}
    labels: dict[str, str] = {}
    for cell in rows_of(table, "cells"):
        named = [cell.get("method"), cell.get("variant"), cell.get("ratio_label")]
        words = [short(each, 60) for each in named if isinstance(each, str) and each not in ("", "-")]
        for run in rows_of(cell, "runs"):
            if isinstance(run.get("directory"), str):
                labels[run["directory"]] = ", ".join(words)
    for each in _folders(path):
        match = _SEED.fullmatch(each.name)
        labels.setdefault(each.name, short(match[1] if match else each.name))
    return labels


@dataclass
class Cell:
    """Runs that differ in their seed alone, and what they are called on the page."""

    name: str
    runs: list[Run]


def cells_of(runs: Sequence[Run]) -> list[Cell]:
    """The runs, those of equal configuration but for the seed together. No two cells have the same name.

    A run with the seed of another is none more to take a mean of: it stands by itself.
    """
    alike: dict[str, list[Run]] = {}
    for run in runs:
        known = {key: value for key, value in run.table.items() if key not in ("seed", "run", "comparison")}
        key = json.dumps([run.label, known], sort_keys=True, default=str) if known else str(run.path)
        while run.seed is not None and run.seed in [each.seed for each in alike.get(key, ())]:
            key += " again"
        alike.setdefault(key, []).append(run)
    several = len({run.method for run in runs}) < len(alike)
    cells: list[Cell] = []
    taken: set[str] = set()
    for group in alike.values():
        first = group[0]
        name = first.label or (f"{first.method} ({first.name})" if several else first.method)
        while name in taken:
            name += " *"
        taken.add(name)
        cells.append(Cell(name, group))
    return cells
