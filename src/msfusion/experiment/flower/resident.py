"""A participant's process that stays from one message to the next, and answers what ClientApps hand on to it.

It is on the same machine, of the same user, and behind a socket in a folder that only that user may enter. It ends with
the rounds, with the process that starts the ClientApps, and when nothing has come for a while; then the next ClientApp
starts another. Where there can be none (Flower's simulation, Windows), the ClientApp's own process answers.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msfusion.engines.flower.frames import Over
from msfusion.engines.grpc.packing import pack, unpack
from msfusion.errors import StreamError

if TYPE_CHECKING:
    from msfusion.engines.flower.participant import Participant

LINGER_SECONDS = 900.0
"""How long it waits for the next message."""

STARTING_SECONDS = 120.0
"""How long it may take to start: it imports torch first."""

OLD_SECONDS = 2 * 86400.0
"""After which a socket is taken for one that a killed process has left; where it was not, another is started."""

LONGEST_ADDRESS = 100
"""The most letters of the name of a socket."""


@dataclass(frozen=True)
class Asked:
    """A message to a participant: its SuperNode's --node-config as JSON, the message, and what it has kept by round."""

    node: str
    frame: bytes
    body: bytes
    rounds: list[int]
    kept: list[bytes]


@dataclass(frozen=True)
class Answered:
    """What it answers, and what it keeps from now on."""

    frame: bytes
    body: bytes
    rounds: list[int]
    kept: list[bytes]


def hand_on(asked: Asked, config: Path, run_id: int, node_id: int) -> Answered:
    """The answer of the process that stays, which is started where there is none. Raises StreamError where it dies."""
    address = _address(config, run_id, node_id, asked.node)
    if address is None:
        return answered(asked, config)
    connection = _connected(address) or _started(address, config)
    if connection is None:
        return answered(asked, config)
    with connection:
        try:
            connection.send_bytes(pack(asked))
            return unpack(connection.recv_bytes(), Answered)
        except (OSError, EOFError) as error:
            raise StreamError("the participant's process has died in the middle of its work") from error


def answered(asked: Asked, config: Path) -> Answered:
    """The answer, worked out in this process."""
    from msfusion.engines.flower.participant import respond

    kept = dict(zip(asked.rounds, asked.kept, strict=True))
    who = _name(asked.node)

    def say(text: str) -> None:
        print(f"msfusion: participant {who}: {text}", flush=True)

    frame, body = respond(asked.frame, asked.body, kept, lambda: _present(config, asked.node), say)
    return Answered(frame, body, list(kept), list(kept.values()))


@cache
def _present(config: Path, node: str) -> Participant:
    """What is here, loaded once: the app's files do not change, as their digest is in their path."""
    from msfusion.experiment.config import load_config
    from msfusion.experiment.flower.participant import participant_of

    return participant_of(load_config(config), json.loads(node))


def _name(node: str) -> str:
    from msfusion.experiment.flower.client import NUMBERS

    config = json.loads(node)
    return next((str(config[key]) for key in NUMBERS if key in config), "?")


def _address(config: Path, run_id: int, node_id: int, node: str) -> Path | None:
    """Where the process for this node and run is found; None where there can be none."""
    if not hasattr(socket, "AF_UNIX") or "ray" in sys.modules:
        return None
    try:
        folder = Path(tempfile.gettempdir()) / f"msfusion-{os.getuid()}"
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        there = folder.lstat()
    except OSError:  # nothing can be written there
        return None
    if there.st_uid != os.getuid() or there.st_mode & 0o077 or folder.is_symlink():
        return None
    told = json.dumps([str(config), run_id, node_id, node, os.getppid()])
    address = folder / hashlib.sha256(told.encode()).hexdigest()[:24]
    return address if len(str(address)) <= LONGEST_ADDRESS else None


def _connected(address: Path) -> Connection[Any, Any] | None:
    try:
        return Client(str(address), "AF_UNIX")
    except OSError:
        return None


def _started(address: Path, config: Path) -> Connection[Any, Any] | None:
    """A connection to a new process; None where none can be started."""
    command = [sys.executable, "-m", __name__, str(address), str(config), str(os.getppid())]
    nothing = (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)
    try:  # what it has to tell goes where this process tells it: to the SuperNode's log
        address.unlink(missing_ok=True)
        _tidy(address.parent)
        process = os.posix_spawn(sys.executable, command, os.environ, file_actions=[nothing])
    except OSError:
        return None
    end = time.monotonic() + STARTING_SECONDS
    while os.waitpid(process, os.WNOHANG) == (0, 0) and time.monotonic() < end:
        if connection := _connected(address):
            return connection
        time.sleep(0.02)
    return None


def _tidy(folder: Path) -> None:
    """Remove the sockets of processes that were killed."""
    for each in folder.iterdir():
        with suppress(OSError):  # another ClientApp may have removed it
            if time.time() - each.stat().st_mtime > OLD_SECONDS:
                each.unlink()


def stay(address: Path, config: Path, parent: int) -> None:
    """Answer what comes, until the rounds are done, the parent process is gone, or nothing comes any more."""
    sys.path.insert(0, str(config.parent.parent))  # the app, in which the user's own modules are
    since = [time.monotonic()]

    def watch() -> None:
        while _is_there(parent) and time.monotonic() - since[0] < LINGER_SECONDS:
            time.sleep(0.5)
        address.unlink(missing_ok=True)
        os._exit(0)

    with Listener(str(address), "AF_UNIX") as listener:
        threading.Thread(target=watch, daemon=True).start()
        over = False
        while not over:
            with listener.accept() as connection, suppress(OSError, EOFError):
                asked = unpack(connection.recv_bytes(), Asked)
                since[0] = float("inf")
                connection.send_bytes(pack(answered(asked, config)))
                over = _is_over(asked.frame)
            since[0] = time.monotonic()


def _is_over(frame: bytes) -> bool:
    with suppress(StreamError):
        return isinstance(unpack(frame, Over), Over)
    return False


def _is_there(process: int) -> bool:
    """Whether a process is at work. One that has ended stays until its parent asks after it, which may be never."""
    with suppress(OSError):  # on Linux
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


if __name__ == "__main__":
    _, given_address, given_config, given_parent = sys.argv
    stay(Path(given_address), Path(given_config), int(given_parent))
