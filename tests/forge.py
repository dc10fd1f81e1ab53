"""Starts `msfusion` commands as processes, each in a moment: run as a script, it imports and traces once, then forks.

On standard input, a JSON list a line: the current folder, the files for what is said on standard output and standard
error, what the environment has besides, then the command's arguments. Each is answered by the number of the process;
when one has ended, by that number and its exit code.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any


class Forge:
    """The script as a process, seen from a test."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self._codes: dict[int, int] = {}

    def __enter__(self) -> Forge:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._process.wait()

    def start(
        self, said: Path, *arguments: str, out: Path | None = None, more: dict[str, str] | None = None
    ) -> int:
        """Start a command in the current folder; its process number. `out` is for standard output, if not `said`.

        `more` is what its environment has beside ours.
        """
        assert self._process.stdin is not None
        job = [str(Path.cwd()), str(out or said), str(said), more or {}, *arguments]
        print(json.dumps(job), file=self._process.stdin, flush=True)
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
        return self._codes.pop(number)  # numbers come again

    def _heard(self) -> tuple[str, int, int]:
        assert self._process.stdout is not None
        kind, number, code = json.loads(self._process.stdout.readline())
        return kind, number, code


def prepare_everything() -> None:
    """All that takes long is there afterwards: imports, the compiled loops, and the map of the model of quick jobs."""
    import torch
    from quick import QUICK_JOB, QUICK_SETTINGS
    from traced_once import trace_once_each

    import msfusion.experiment.network  # noqa: F401 - gRPC is there, and not started
    from msfusion.codecs import PROFILES
    from msfusion.experiment.config import load_config
    from msfusion.experiment.kinds import prepare

    trace_once_each(setattr)
    for overrides in ((*QUICK_JOB, "method.name=split", "split.at=layers.3"), QUICK_SETTINGS):
        prepare(load_config(None, overrides)).plan()
    for codec in PROFILES.values():
        codec.decode(codec.encode(torch.ones(8, 8)))
    gc.freeze()  # at its end, each process would look through all of this once more: two seconds


def begin(folder: str, out: str, said: str, more: dict[str, str], arguments: list[str]) -> None:
    """Be the command, in a process of its own. It does not return."""
    from msfusion.cli.main import app

    os.chdir(folder)
    os.environ |= more
    for number, path in ((0, os.devnull), (1, out), (2, said)):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
        os.dup2(os.open(path, flags, 0o600), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are deaf to Ctrl-C
    app(arguments)


def main() -> None:
    prepare_everything()

    def tell(*what: Any) -> None:
        print(json.dumps(what), flush=True)

    children: set[int] = set()
    while True:
        if select.select([sys.stdin], [], [], 0.02)[0]:
            line = sys.stdin.readline()
            if not line:
                for child in children:  # a test failed before it had ended them
                    os.kill(child, signal.SIGKILL)
                return
            folder, out, said, more, *arguments = json.loads(line)
            child = os.fork()
            if child == 0:
                begin(folder, out, said, more, arguments)
            children.add(child)
            tell("started", child, 0)
        for child in list(children):
            with suppress(ChildProcessError):
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    children.remove(child)
                    tell("ended", child, os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
