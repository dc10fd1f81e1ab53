"""What the stream costs: milliseconds for each mini-batch, and how busy ten participants keep the server.

The server is the real one, on one thread and over TLS. Participants are light, as those that hold a first layer on
machines of their own: all are threads of one other process and send mini-batches that were recorded.

- overhead: one participant alone. A round trip, from sending a mini-batch until its gradients have come, less the
  server's work on that very mini-batch (decode, forward, backward, step, encode), less a round trip of as many bytes
  over a plain socket. The median over all mini-batches, and the 10th percentile: what it is when nobody else wants
  the processor at that moment. Beside it, what a bare gRPC stream of as many bytes takes, with nothing of ours; and
  socket and stream with pauses as long as the server works (`references` says why). And, which a busy machine changes
  least, the processor time that the stream takes on both sides together: that of all three processes in a round, less
  that of the server's work.
- throughput: ten participants. Mini-batches a second in a round, over those of a plain loop around the same work;
  rounds and plain loops take turns in the same process. And the share of the round in which the server was at work.

    python benchmarks/stream.py
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import msgpack
import torch
from references import bare_stream, plain_socket

import msfusion
from msfusion.batch import Batch
from msfusion.codecs import PROFILES
from msfusion.engines.grpc.access import Access
from msfusion.engines.grpc.certificates import make_certificates
from msfusion.engines.grpc.listening import Listening
from msfusion.engines.stream import federation, process
from msfusion.engines.stream.contract import Contract
from msfusion.experiment.environment import environment
from msfusion.federated.participation import RoundSettings
from msfusion.federated.states import state_of
from msfusion.federated.training import TrainingSettings, build_optimizer
from msfusion.methods.split.rounds import SplitSettings
from msfusion.methods.split.sides import Participant, Request, Server
from msfusion.methods.split.wire import Message
from msfusion.models.convolutional import ConvNet

MODELS: dict[str, dict[str, Any]] = {
    "8x8 grey images, mini-batches of 16": {"channels": 1, "size": 8, "widths": (16, 32, 32), "batch": 16},
    "32x32 colour images, mini-batches of 32": {
        "channels": 3,
        "size": 32,
        "widths": (64, 128, 128),
        "batch": 32,
    },
}
RECORDED = 4


@contextmanager
def timed() -> Iterator[list[float]]:
    """The seconds of the server's work on each mini-batch, decoding and encoding included."""
    seconds: list[float] = []
    forward, update = federation._Round._forward, Server.update
    began = 0.0

    def timed_forward(self: Any, request: Request) -> Any:
        nonlocal began
        began = time.perf_counter()
        return forward(self, request)

    def timed_update(self: Any, forwards: Any) -> Any:
        answers = update(self, forwards)
        seconds.append(time.perf_counter() - began)
        return answers

    federation._Round._forward, Server.update = timed_forward, timed_update  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        federation._Round._forward, Server.update = forward, update  # type: ignore[method-assign]


@contextmanager
def processor_clock() -> Iterator[Callable[[], float]]:
    """The processor seconds so far of this process and that of the streams, whose clock goes by its number (Linux)."""
    clocks = [time.CLOCK_PROCESS_CPUTIME_ID]
    start = process.start

    def noted(connection: socket.socket) -> subprocess.Popen[bytes]:
        started = start(connection)
        clocks.append(~started.pid << 3 | 2)
        return started

    process.start = noted
    try:
        yield lambda: sum(map(time.clock_gettime, clocks))
    finally:
        process.start = start


class Bench:
    """A model, some recorded mini-batches, and a server part in a plain loop."""

    def __init__(self, channels: int, size: int, widths: tuple[int, ...], batch: int, codec: str) -> None:
        torch.manual_seed(0)
        self.model = ConvNet(channels, 10, image_size=size, widths=widths)
        images = torch.randn(RECORDED * batch, channels, size, size)
        width_map = msfusion.trace(self.model, (images[:2],))
        self.settings = SplitSettings("layers.3", PROFILES[codec], PROFILES["accurate"])
        self.parts = msfusion.cut(self.model, width_map, self.settings.at)
        self.training = TrainingSettings(learning_rate=1e-3, momentum=0.0, batch_size=batch)
        wire = self.settings.wire(self.parts)
        participant = Participant(self.parts.client, None, wire)
        data = Batch((images,), torch.randint(10, (len(images),)))
        self.requests = [Request(participant.send(each), each.targets) for each in data.split(batch)]
        own = msfusion.cut(self.model, width_map, self.settings.at).server
        self.server = Server(own, build_optimizer(own, self.training, 0), wire)
        self.answer: Message = self.server.step(self.requests[:1])[0][0]

    def loop(self, steps: int) -> list[float]:
        """The server's work alone: the seconds of each step."""
        seconds = []
        for step in range(steps):
            began = time.perf_counter()
            self.server.step([self.requests[step % RECORDED]])
            seconds.append(time.perf_counter() - began)
        return seconds

    @property
    def bytes_up(self) -> int:
        """Of a mini-batch, with its targets."""
        return sum(map(len, self.requests[0].message)) + self.requests[0].targets.nbytes

    @property
    def bytes_down(self) -> int:
        """Of its gradients."""
        return sum(map(len, self.answer))

    def record(self, path: Path, contract: Contract, steps: int) -> None:
        """What the light participants need."""
        recording = {
            "agreement": contract.terms.agreement,
            "examples": contract.training.batch_size * steps,
            "count": steps,
            "steps": [(each.message, each.targets.numpy().tobytes()) for each in self.requests],
        }
        path.write_bytes(msgpack.packb(recording))


def measure(bench: Bench, participants: int, rounds: int, steps: int, place: Path) -> dict[str, list[Any]]:
    """Rounds and plain loops in turns: the rates of both, and for participant 0 every round trip."""
    asked = RoundSettings(rounds + 1)  # the first to warm up
    contract = Contract(bench.parts, bench.settings, bench.training, asked, participants)
    recording, keys = place / f"recording-{participants}", place / f"keys-{participants}"
    bench.record(recording, contract, steps)
    make_certificates(keys, ["127.0.0.1"])
    others: list[subprocess.Popen[str]] = []

    def start(address: str) -> None:
        script = Path(__file__).with_name("streaming_participants.py")
        command = [sys.executable, str(script), str(recording), address, str(keys), str(participants)]
        others.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))

    served, alone, work, busy, processor = [], [], [], [], []
    with timed() as seconds, processor_clock() as processor_seconds:
        before = processor_seconds()
        for done in federation.serve_split_rounds(
            bench.parts,
            bench.model,
            bench.settings,
            bench.training,
            asked,
            Listening("127.0.0.1:0", Access.of_server(keys), on_listening=start),
            participants=participants,
            state=state_of(bench.model),
        ):
            count, in_round = participants * steps, processor_seconds() - before
            served.append(count / done.seconds)
            busy.append(sum(seconds) / done.seconds)
            work.append(list(seconds))
            before = processor_seconds()
            loop = bench.loop(count)
            alone.append(count / sum(loop))
            processor.append((in_round - (processor_seconds() - before)) / count)
            seconds.clear()
            before = processor_seconds()
    theirs = json.loads(others[0].communicate(timeout=60)[0])
    processor = [ours + each / steps for ours, each in zip(processor, theirs["processor"], strict=True)]
    found = {"served": served, "alone": alone, "work": work, "busy": busy, "processor": processor}
    found["trips"] = theirs["trips"]
    return {name: rounds[1:] for name, rounds in found.items()}


def compare(name: str, codec: str, rounds: int, steps: int) -> dict[str, Any]:
    bench = Bench(**MODELS[name], codec=codec)
    with tempfile.TemporaryDirectory() as place:
        one = measure(bench, 1, rounds, steps, Path(place))
        ten = measure(bench, 10, rounds, max(1, steps // 10), Path(place))
    sizes = bench.bytes_up, bench.bytes_down
    pause = statistics.median(chain(*one["work"]))
    wire = plain_socket(*sizes)
    references = {
        "plain_socket_after_pauses_ms": 1e3 * plain_socket(*sizes, pause, 100),
        "bare_stream_ms": 1e3 * bare_stream(*sizes),
        "bare_stream_after_pauses_ms": 1e3 * bare_stream(*sizes, pause, 100),
    }
    trips, work = list(chain(*one["trips"])), list(chain(*one["work"]))
    overheads = [trip - own - wire for trip, own in zip(trips, work, strict=True)]
    ratios = [served / alone for served, alone in zip(ten["served"], ten["alone"], strict=True)]
    return {
        "model": name,
        "activations": codec,
        "bytes_up": bench.bytes_up,
        "bytes_down": bench.bytes_down,
        "one_participant": {
            "round_trip_ms": 1e3 * statistics.median(trips),
            "server_work_ms": 1e3 * statistics.median(work),
            "plain_socket_ms": 1e3 * wire,
            **references,
            "overhead_ms": 1e3 * statistics.median(overheads),
            "processor_time_ms": 1e3 * statistics.median(one["processor"]),
            "overhead_10th_percentile_ms": 1e3 * statistics.quantiles(overheads, n=10)[0],
        },
        "ten_participants": {
            "mini_batches_per_second": statistics.median(ten["served"]),
            "plain_loop_per_second": statistics.median(ten["alone"]),
            "ratio": statistics.median(ratios),
            "ratio_of_each_round": ratios,
            "share_at_work": statistics.median(ten["busy"]),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=200, help="mini-batches in a round, of all together")
    parser.add_argument("--codec", choices=list(PROFILES), default="paper", help="of the activations")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = [compare(name, arguments.codec, arguments.rounds, arguments.steps) for name in MODELS]
    print(json.dumps({"machine": environment(), "load": os.getloadavg(), "results": found}, indent=2))


if __name__ == "__main__":
    main()
