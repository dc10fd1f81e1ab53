"""What bytes cost without us, for benchmarks/stream.py: so many up and down, over a plain socket and a gRPC stream.

Once there is a pause between up and down, as long as the server works on a mini-batch: after a pause processors wake up
and their caches have forgotten, which makes the same bytes more expensive. The other side is a process of its own.
"""

from __future__ import annotations

import asyncio
import json
import queue
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from msfusion.engines.grpc.access import METHOD, Access
from msfusion.engines.grpc.certificates import make_certificates

LIMITS = [("grpc.max_receive_message_length", 2**30), ("grpc.max_send_message_length", 2**30)]


def plain_socket(up: int, down: int, pause: float = 0.0, times: int = 300) -> float:
    """The median seconds of a round trip over TCP on this machine, without the pause."""
    with _other_side("socket", down, pause, times, up) as other:
        address = ("127.0.0.1", int(_line(other)))
        trips, message = [], bytes(up)
        with socket.create_connection(address) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(times):
                began = time.perf_counter()
                connection.sendall(message)
                receive(connection, down)
                trips.append(time.perf_counter() - began)
        return _less_pauses(trips, other)


def bare_stream(up: int, down: int, pause: float = 0.0, times: int = 300) -> float:
    """As `plain_socket`, but over a gRPC stream with TLS, and with nothing of ours at its two ends."""
    with tempfile.TemporaryDirectory() as place:
        make_certificates(Path(place) / "keys", ["127.0.0.1"])
        with _other_side("stream", down, pause, times, up, Path(place) / "keys") as other:
            access = Access.of_participant(Path(place) / "keys")
            channel = access.channel(f"127.0.0.1:{_line(other)}", LIMITS)
            said: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
            answers = channel.stream_stream(METHOD)(iter(said.get, None))
            trips, message = [], bytes(up)
            for _ in range(times):
                began = time.perf_counter()
                said.put(message)
                next(answers)
                trips.append(time.perf_counter() - began)
            said.put(None)
            next(answers, None)
            channel.close()
            return _less_pauses(trips, other)


def receive(connection: socket.socket, count: int) -> None:
    while count:
        count -= len(connection.recv(min(count, 2**18)))


def _other_side(kind: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, kind, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _line(other: subprocess.Popen[str]) -> str:
    assert other.stdout is not None
    return other.stdout.readline().strip()


def _less_pauses(trips: list[float], other: subprocess.Popen[str]) -> float:
    pauses = json.loads(_line(other))
    return statistics.median(trip - pause for trip, pause in zip(trips, pauses, strict=True))


def _answer_over_a_socket(down: int, pause: float, times: int, up: int) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    pauses, message = [], bytes(down)
    for _ in range(times):
        receive(connection, up)
        came = time.perf_counter()
        time.sleep(pause)
        pauses.append(time.perf_counter() - came)
        connection.sendall(message)
    print(json.dumps(pauses), flush=True)


async def _answer_over_a_stream(down: int, pause: float, times: int, keys: Path) -> None:
    import grpc.aio

    pauses, message, done = list[float](), bytes(down), asyncio.Event()

    async def stream(_: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        for _ in range(times):
            await context.read()
            came = time.perf_counter()
            await asyncio.sleep(pause)
            pauses.append(time.perf_counter() - came)
            await context.write(message)
        done.set()

    server = grpc.aio.server(options=LIMITS)
    service, method = METHOD.removeprefix("/").split("/")
    handlers = {method: grpc.stream_stream_rpc_method_handler(stream)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    print(server.add_secure_port("127.0.0.1:0", Access.of_server(keys).server_credentials()), flush=True)
    await server.start()
    await done.wait()
    await server.stop(grace=2.0)
    print(json.dumps(pauses), flush=True)


def main() -> None:
    kind, down, pause, times, up, *more = sys.argv[1:]
    if kind == "socket":
        _answer_over_a_socket(int(down), float(pause), int(times), int(up))
    else:
        asyncio.run(_answer_over_a_stream(int(down), float(pause), int(times), Path(more[0])))


if __name__ == "__main__":
    main()
