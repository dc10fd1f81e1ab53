"""`msfusion` commands as processes that are forked from one which has imported everything, so that 50 of them fit.

A participant forked here notes each training that it begins, for the goodput.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

LARGEST = 2**16
"""The most bytes of a word between the two processes."""


class Forge:
    """A process that forks others, made before this one has any thread."""

    def __init__(self, folder: Path, warm: Callable[[], None]) -> None:
        self._socket, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.process = os.fork()
        if self.process == 0:
            self._socket.close()
            os.chdir(folder)
            warm()
            gc.freeze()  # or each child would look through all of this once more, and own a copy of it
            _fork_on_demand(its)
            os._exit(0)
        its.close()
        self._ended: dict[int, int] = {}

    def start(self, said: str, *arguments: str, trained: str = "", epochs: int = 1) -> int:
        """Start a command; its process number. What it says is added to the file `said`, its trainings to `trained`."""
        self._socket.send(json.dumps([said, trained, epochs, *arguments]).encode())
        while True:
            kind, number, code = json.loads(self._socket.recv(LARGEST))
            if kind == "started":
                return int(number)
            self._ended[number] = code

    def ended(self) -> dict[int, int]:
        """Who has ended since this was asked last, with its exit code: negative after a signal."""
        while select.select([self._socket], [], [], 0)[0]:
            _, number, code = json.loads(self._socket.recv(LARGEST))
            self._ended[number] = code
        ended, self._ended = self._ended, {}
        return ended

    def close(self) -> None:
        """End it, and all processes that are still there."""
        self._socket.close()
        os.waitpid(self.process, 0)


def _fork_on_demand(asked: socket.socket) -> None:
    children: set[int] = set()
    while True:
        if select.select([asked], [], [], 0.02)[0]:
            word = b""
            with suppress(ConnectionResetError):
                word = asked.recv(LARGEST)
            if not word:
                for child in children:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                return
            child = os.fork()
            if child == 0:
                asked.close()
                _be(*json.loads(word))
            children.add(child)
            asked.send(json.dumps(["started", child, 0]).encode())
        for child in list(children):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                children.remove(child)
                with suppress(BrokenPipeError):
                    asked.send(json.dumps(["ended", child, os.waitstatus_to_exitcode(status)]).encode())


def _be(said: str, trained: str, epochs: int, *arguments: str) -> None:
    """Be the command. It does not return."""
    code: Any = 1
    try:
        out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for number, opened in ((0, os.open(os.devnull, os.O_RDONLY)), (1, out), (2, out)):
            os.dup2(opened, number)
        if trained:
            note_trainings(Path(trained), epochs)
        from msfusion.cli.main import app

        app(list(arguments))
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def note_trainings(path: Path, epochs: int) -> None:
    """Have this process write a line whenever it begins to train: the round, and how many examples it goes through."""
    from msfusion.engines.grpc import participant

    perform = participant.perform

    def noted(method: Any, kind: str, tasks: Any, data: Any, *rest: Any, **more: Any) -> Any:
        if kind == "train":
            for task in tasks:
                line = {"round": task.round_index + 1, "examples": epochs * len(data[task.participant])}
                with path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
        return perform(method, kind, tasks, data, *rest, **more)

    participant.perform = noted  # type: ignore[assignment]


def warm(jobs: list[list[str]]) -> None:
    """What a process would do before it connects is done before it is forked: imports, data, the model's map.

    No thread of gRPC's is there.
    """
    import msfusion.experiment.network  # noqa: F401
    from msfusion.cli import main  # noqa: F401
    from msfusion.experiment import remote
    from msfusion.experiment.config import load_config

    prepare, made = remote.prepared_for_network, dict[str, Any]()

    def prepared(config: Any, parts: Any) -> Any:
        text = config.to_toml()
        if text not in made:
            made[text] = prepare(config, parts)
        return made[text]

    remote.prepared_for_network = prepared
    for settings in jobs:
        run = prepared(load_config(None, settings).pinned(), None)
        run.plan()


def finish(forge: Forge, said: str, folder: Path, *arguments: str) -> None:
    """Run a command to its end. Raises RuntimeError where it fails."""
    process = forge.start(said, *arguments)
    while True:
        ended = forge.ended()
        if process in ended:
            break
        time.sleep(0.01)
    if ended[process]:
        raise RuntimeError(f"{arguments[0]} ended with {ended[process]}: {(folder / said).read_text()}")


def memory_of(processes: list[int]) -> int:
    """The bytes that these processes have, what they share counted once (proportional set size)."""
    total = 0
    for each in processes:
        with suppress(OSError):
            for line in Path(f"/proc/{each}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += 1024 * int(line.split()[1])
    return total
