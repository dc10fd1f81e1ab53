"""The process of the streams: it answers participants while the process that started it trains.

Python runs one thread at a time in a process. In the process that trains, every message would hold up the training,
and training every message. This one imports neither PyTorch nor anything that does. It is started anew rather than
forked, so it does not matter which threads the other has; standard input is the socket that joins the two. When the
other process ends, however it does, so does this one.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from msfusion.engines.grpc.access import Access
from msfusion.engines.stream.desk import Desk
from msfusion.engines.stream.link import LoopLink
from msfusion.engines.stream.service import Service
from msfusion.engines.stream.terms import Terms
from msfusion.errors import StreamError

_MOST_WAITING = 2**20
"""The bytes that may wait for the other process before it is no longer told of connections."""

_COMMAND = "import sys; sys.path[:] = sys.argv[1:]; from msfusion.engines.stream.process import main; sys.exit(main())"


def start(connection: socket.socket) -> subprocess.Popen[bytes]:
    """A new process of the streams, at the other end of this socket."""
    command = [sys.executable, "-c", _COMMAND, *filter(None, sys.path)]
    return subprocess.Popen(command, stdin=connection.fileno(), stdout=subprocess.DEVNULL)


def main() -> None:
    """Serve streams until the other process ends them, or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the other process, which tells us
    asyncio.run(_serve(socket.socket(fileno=os.dup(0))))


async def _serve(connection: socket.socket) -> None:
    link = LoopLink(connection)
    _, (terms, access, address, deadline, scratch) = await link.heard()

    def say(text: str) -> None:
        if link.waiting < _MOST_WAITING:
            link.tell("say", text)

    with closing(Desk(Terms(**terms), link.tell, scratch and Path(scratch))) as desk:
        service = Service(desk, address, Access(**access), deadline, say)
        try:
            link.tell("listens", await service.start())
        except StreamError as error:
            link.tell("failed", str(error), error.status)
        try:
            await _obey(link, desk)
        except (EOFError, OSError):
            os._exit(1)  # nobody trains any more: let the participants look for another server
        await service.stop()


async def _obey(link: LoopLink, desk: Desk) -> None:
    """Do what the round says, until it says that this is the end."""
    calls: dict[str, Callable[..., None]] = {
        "open_round": desk.open_round,
        "hand_out": desk.hand_out,
        "answer": desk.answer,
        "accept": desk.accept,
        "refuse": desk.refuse,
        "leave_out": desk.leave_out,
        "say_over": desk.say_over,
    }
    while True:
        name, values = await link.heard()
        if name == "end":
            desk.end(StreamError(*values))
            return
        calls[name](*values)
