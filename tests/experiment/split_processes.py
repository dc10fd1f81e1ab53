"""Starts `msfusion` commands as processes, each in a moment: run as a script, it imports and traces once, then forks.

On standard input, a JSON list a line: the file for what is said, then the command's arguments. Each is answered by
the number of the process; when one has ended, by that number and its exit code.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any


class Forge:
    """The script as a process, seen from a test."""

    def __init__(self, overrides: list[str], environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, *overrides],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self._codes: dict[int, int] = {}

    def __enter__(self) -> Forge:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._process.wait()

    def start(self, said: Path, *arguments: str) -> int:
        """Start a command; its process number."""
        assert self._process.stdin is not None
        print(json.dumps([str(said), *arguments]), file=self._process.stdin, flush=True)
        while True:
            kind, number, code = self._heard()
            if kind == "started":
                return number
            self._codes[number] = code

    def code(self, number: int) -> int:
        """Wait for the end of a command: its exit code, negative after a signal."""
        while number not in self._codes:
            _, ended, code = self._heard()
            self._codes[ended] = code
        return self._codes[number]

    def _heard(self) -> tuple[str, int, int]:
        assert self._process.stdout is not None
        kind, number, code = json.loads(self._process.stdout.readline())
        return kind, number, code


def main(overrides: list[str]) -> None:
    from msfusion.cli.main import app
    from msfusion.experiment.config import load_config
    from msfusion.experiment.kinds import prepare

    prepare(load_config(None, overrides)).plan()  # all that takes long is there now, and gRPC not started

    def tell(*what: Any) -> None:
        print(json.dumps(what), flush=True)

    children: set[int] = set()
    while True:
        if select.select([sys.stdin], [], [], 0.02)[0]:
            line = sys.stdin.readline()
            if not line:
                return
            said, *arguments = json.loads(line)
            child = os.fork()
            if child == 0:
                with Path(said).open("ab", buffering=0) as file:
                    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                    os.dup2(file.fileno(), 1)
                    os.dup2(file.fileno(), 2)
                app(arguments)  # which exits
            children.add(child)
            tell("started", child, 0)
        for child in list(children):
            with suppress(ChildProcessError):
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    children.remove(child)
                    tell("ended", child, os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main(sys.argv[1:])
