"""The process of the streams: it dies without a hang, and leaves nobody behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from streaming import NOTHING, Hand, Job, Running, Served, digits, first_step, same, served

from msfusion.codecs import Identity
from msfusion.engines.stream import process
from msfusion.engines.stream.client import Connecting
from msfusion.engines.stream.frames import Begin, Layers, pack, unpack
from msfusion.engines.stream.service import Listening
from msfusion.errors import StreamError
from msfusion.methods.split.rounds import SplitSettings

pytestmark = pytest.mark.slow

SERVER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started deaf to it
sys.path.insert(0, {tests!r})
from streaming import Job, Served, NOTHING
from msfusion.engines.stream import process
from msfusion.engines.stream.service import Listening

start = process.start

def told(connection):
    started = start(connection)
    print(started.pid, flush=True)
    return started

process.start = told
server = Served(Job(), Listening({address!r}, NOTHING))
print(server.address, flush=True)
server.thread.join()
"""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes of streams that were started."""
    found, start = list[subprocess.Popen[bytes]](), process.start

    def noted(connection: socket.socket) -> subprocess.Popen[bytes]:
        found.append(start(connection))
        return found[-1]

    monkeypatch.setattr(process, "start", noted)
    return found


def gone(number: int, seconds: float = 20.0) -> bool:
    """Whether a process ends within some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        status = Path(f"/proc/{number}/stat")
        try:
            if status.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


def test_it_does_without_pytorch() -> None:
    script = "import sys, msfusion.engines.stream.process; sys.exit(sorted({'torch', 'numpy'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr.strip()) == ("", "[]")


def test_it_ends_with_the_rounds(started: list[subprocess.Popen[bytes]]) -> None:
    job = Job(data=[digits(20)])
    with served(job) as server:
        assert job.join(0, Connecting(server.address, NOTHING)) == 2
    assert [each.returncode for each in started] == [0]


@pytest.mark.timeout(120)
def test_a_killed_process_of_the_streams_is_an_error_and_no_hang(
    started: list[subprocess.Popen[bytes]],
) -> None:
    """The same command goes on, and its participants with it."""
    job, seen = Job(), list[int]()
    server = Served(job, Listening("127.0.0.1:0", NOTHING))
    where = Connecting(server.address, NOTHING, on_step=lambda at, *_: seen.append(at))
    participants = [Running(job.join, each, where) for each in range(3)]
    while 1 not in seen:
        time.sleep(0.002)
    started[0].kill()
    with pytest.raises(StreamError, match="the process of the streams was killed by signal 9"):
        server.thread.wait()
    assert len(server.rounds) == 1
    second = Job(first_round=1, state=server.rounds[0].state)
    with served(second, address=server.address) as again:
        assert [each.wait() for each in participants] == [2, 2, 2]
    same(job.in_process(), server.rounds + again.rounds)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.release)],
    ids=["SIGKILL", "Ctrl-C"],
)
def test_a_server_that_ends_leaves_nobody_behind(number: int) -> None:
    """And its port is free: the next server has it, however soon it comes."""

    def serve(address: str) -> tuple[subprocess.Popen[str], int, str]:
        script = SERVER.format(tests=str(Path(__file__).parent), address=address)
        command = [sys.executable, "-c", script]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert server.stdout is not None
        return server, int(server.stdout.readline()), server.stdout.readline().strip()

    server, streams, address = serve("127.0.0.1:0")
    with server:
        assert not gone(streams, 0.1)
        for each in (server.pid, streams) if number == signal.SIGINT else (server.pid,):
            os.kill(each, number)
        assert server.wait(20) != 0
    with served(Job(data=[digits(20)]), address=address) as second:
        Job(data=[digits(20)]).join(0, Connecting(second.address, NOTHING))
    assert gone(streams)


def test_what_somebody_left_behind_is_not_trained_on() -> None:
    """One sends a bad mini-batch and does not wait; another had other data before everybody had come."""
    job = Job(data=[digits(20), digits(12, 100)], settings=SplitSettings("layers.3", Identity(), Identity()))
    with served(job) as server:

        def wait_until_gone(times: int) -> None:
            while sum("participant 0 has gone" in event for event in server.events) < times:
                time.sleep(0.005)

        with Hand(server) as hand:
            hand.greet(job, examples=19)
            good = first_step(job, unpack(hand.say(pack(Begin())), Layers))
            hand.leave(pack(good))
        wait_until_gone(1)
        other = Running(job.join, 1, Connecting(server.address, NOTHING))
        for times in range(2, 7):
            with Hand(server) as hand:
                hand.begin(job)
                hand.leave(pack(replace(good, targets=b"\xff" * 64)))
            wait_until_gone(times)
        assert job.join(0, Connecting(server.address, NOTHING)) == 2
        other.wait()
    same(job.in_process(), server.rounds)
