"""Which architectures msfusion can narrow, and whether the full-width sub-model is the user's own model.

Each architecture is traced, cut to a quarter, and compared with a model that msfusion never saw: outputs in both modes,
gradients, buffers and parameters after training steps, other numbers of examples and other lengths. The verdicts:

    mapped    the map was proved, and the comparison found no difference
    refused   a sentence says what cannot be done
    wrong     the sub-model differs from the model without a word
    crashed   any other exception, or no end within the time

Some must be refused, because no graph can hold what they do (`MUST_BE_REFUSED` in the catalogue). One of these that is
mapped, and equals its model, is counted as mapped all the same.

    python benchmarks/architectures.py --jobs 2              # all; writes benchmarks/results/architectures.json
    python benchmarks/architectures.py --only bert gpt2 --json
    python benchmarks/architectures.py --document            # writes docs/architectures.md from the results
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "architectures.json"
PAGE = HERE.parent / "docs" / "architectures.md"
SECONDS = 120
"""How long one architecture may take, where nothing else is said."""

Row = dict[str, Any]


def work(connection: Connection, loud: bool) -> None:
    """A process that measures one architecture after the other."""
    import torch
    from architectures.catalogue import CATALOGUE
    from architectures.comparison import measure

    torch.set_num_threads(1)
    if not loud:  # torch prints graphs of what it cannot export
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    while (name := connection.recv()) is not None:
        connection.send(measure(CATALOGUE[name]))


class Worker:
    """A process for one architecture at a time, started anew where one dies or does not end."""

    def __init__(self, limit: int, loud: bool) -> None:
        self.limit, self.loud = limit, loud
        self.start()

    def start(self) -> None:
        """Start the process."""
        spawn = multiprocessing.get_context("spawn")
        self.connection, other = spawn.Pipe()
        self.process = spawn.Process(target=work, args=(other, self.loud), daemon=True)
        self.process.start()
        other.close()

    def measure(self, name: str, kind: str, style: str) -> Row:
        """The row of an architecture, whatever happens to the process."""
        begin = time.perf_counter()
        self.connection.send(name)
        row: Row = {"name": name, "kind": kind, "style": style, "verdict": "crashed"}
        try:
            if self.connection.poll(self.limit):
                row = self.connection.recv()
            else:
                self.restart()
                row["words"] = f"no end within {self.limit} seconds"
        except (EOFError, OSError):
            self.process.join()
            row["words"] = f"the process ended with code {self.process.exitcode}"
            self.restart()
        return row | {"seconds": round(time.perf_counter() - begin, 1)}

    def restart(self) -> None:
        """End the process, and start another."""
        self.stop()
        self.start()

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def run(names: list[str], options: argparse.Namespace, done: Callable[[Row], None]) -> None:
    """Measure architectures in several processes; `done` hears each row as it comes."""
    from architectures.catalogue import CATALOGUE

    waiting = iter(names)  # shared: each thread takes the next one

    def several(_: int) -> None:
        worker = Worker(options.limit, options.loud)
        try:
            for name in waiting:
                each = CATALOGUE[name]
                done(worker.measure(name, each.kind, each.style))
        finally:
            worker.stop()

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(several, range(min(options.jobs, len(names)))))


def summary(rows: list[Row]) -> Row:
    """How many architectures got which verdict, and how many are narrowed for the most part."""
    from architectures.catalogue import MUST_BE_REFUSED

    verdicts = [row["verdict"] for row in rows]
    wide = [row["name"] for row in rows if row["verdict"] == "mapped" and row["reach"] >= 0.8]
    on_purpose = [row for row in rows if row["name"] in MUST_BE_REFUSED]
    return {
        "architectures": len(rows),
        **{verdict: verdicts.count(verdict) for verdict in ("mapped", "refused", "wrong", "crashed")},
        "mapped_with_80_percent_narrowed": len(wide),
        "must_be_refused": len(on_purpose),
        "refused_on_purpose": sum(row["verdict"] == "refused" for row in on_purpose),
        "can_be_mapped_with_80_percent_narrowed": sum(name not in MUST_BE_REFUSED for name in wide),
    }


def save(path: Path, result: Row) -> None:
    """Write the results, all or nothing."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    part.replace(path)


def sources() -> str:
    """A digest of msfusion's own code, and of the catalogue."""
    import msfusion

    digest = hashlib.sha256()
    for root in (Path(msfusion.__file__).parent, HERE / "architectures"):
        for path in sorted(root.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def earlier(path: Path, digest: str) -> dict[str, Row]:
    """The rows of a run that was cut off, of the same sources."""
    result = json.loads(path.read_text()) if path.is_file() else {}
    return {row["name"]: row for row in result["rows"]} if result.get("sources") == digest else {}


def measure_all(options: argparse.Namespace) -> Row:
    """Measure what was asked for, and save each row as it comes where all were asked for."""
    from architectures.catalogue import CATALOGUE

    from msfusion.experiment.environment import environment

    machine, digest = environment(), sources()
    if find_spec("peft"):
        machine["peft"] = version("peft")
    rows = earlier(options.out, digest) if options.resume and not options.only else {}
    names = options.only or [name for name in CATALOGUE if name not in rows]

    def result() -> Row:
        ordered = [rows[name] for name in CATALOGUE if name in rows]
        return {"machine": machine, "sources": digest, "summary": summary(ordered), "rows": ordered}

    alone = threading.Lock()

    def done(row: Row) -> None:
        with alone:
            rows[row["name"]] = row
            if not options.only:
                save(options.out, result())
            if not options.json:
                print(line(row), flush=True)

    run(names, options, done)
    return result()


def line(row: Row) -> str:
    """A row in words."""
    figures = (
        f"narrowed {row['reach']:.2f}, kept {row.get('kept', float('nan')):.2f}" if "reach" in row else ""
    )
    return f"{row['name']:32} {row['verdict']:8} {row['seconds']:5.1f} s  {figures}  {row['words']}"


def main() -> None:
    """Measure all architectures, or those named; or write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these alone; nothing is saved")
    parser.add_argument("--jobs", type=int, default=1, help="how many processes")
    parser.add_argument(
        "--limit", type=int, default=SECONDS, help=f"seconds for each; {SECONDS} if not given"
    )
    parser.add_argument("--resume", action="store_true", help="keep the rows that the same sources gave")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the rows are saved")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--loud", action="store_true", help="let the libraries write to the terminal")
    parser.add_argument("--list", action="store_true", help="print the names")
    parser.add_argument(
        "--document", action="store_true", help="write docs/architectures.md from the results"
    )
    options = parser.parse_args()
    from architectures.catalogue import CATALOGUE

    if unknown := set(options.only or ()) - set(CATALOGUE):
        sys.exit(f"there is no architecture named {', '.join(sorted(unknown))}; --list prints all names")
    if options.list:
        print("\n".join(CATALOGUE))
        return
    if options.document:
        from architectures_page import page

        PAGE.write_text(page(json.loads(options.out.read_text())))
        return
    result = measure_all(options)
    print(json.dumps(result, indent=1) if options.json else json.dumps(result["summary"]))


if __name__ == "__main__":
    main()
