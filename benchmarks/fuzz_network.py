"""Hostile peers of a live server: strangers, and a participant that sends anything in place of what it is asked for.

Two honest participants train over real sockets meanwhile. At the end their model must be, bit for bit, that of a run
without the hostile ones; nothing may be raised but what refuses them; no round may wait for its deadline. From a seed,
so that it repeats; prints JSON, exit code 1 where something is wrong.

    python benchmarks/fuzz_network.py --rounds 300 --strangers 1000
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import resource
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import grpc
import msgpack
import torch
from peer import Peer
from torch import Tensor, nn

from msfusion.batch import Batch
from msfusion.engines.grpc.access import Access
from msfusion.engines.grpc.calling import Connecting
from msfusion.engines.grpc.frames import FORMAT, Done, Failed, Hello, Ready, Say
from msfusion.engines.grpc.listening import Listening
from msfusion.engines.grpc.messages import Gathering, read
from msfusion.engines.grpc.network import Network
from msfusion.engines.grpc.packing import Agreement, pack
from msfusion.engines.grpc.participant import take_part
from msfusion.errors import StreamError
from msfusion.experiment.environment import environment
from msfusion.federated.conversation import Conversation, Request, Response, Turn
from msfusion.federated.engine import Engine, InProcess
from msfusion.federated.messages import encode, request_message, task_of
from msfusion.federated.method import Answered, Method, Task, Training, Update
from msfusion.federated.participation import RoundSettings
from msfusion.federated.privacy import Outbound
from msfusion.federated.rounds import run_rounds
from msfusion.federated.screening import Screening
from msfusion.width.groups import State

HOSTILE = 2
AGREED: Agreement = {"model": "one number"}
DEADLINE = 60.0
SECONDS = 5.0  # that a hostile stream lasts
NUMBERS = (-1, 0, 1, 2, 255, 2**20, 2**31, 2**40, 2**63 - 1, 2**64 - 1)


class Sums(Conversation):
    """The sum of all numbers that honest participants have said."""

    def __init__(self, total: Tensor) -> None:
        self.total = total.clone()

    def answer(self, turn: Turn) -> list[Response]:
        """The sum so far, to each."""
        for who, request in turn:
            if who != HOSTILE:
                self.total += request.tensors["number"]
        return [Response((), {"total": self.total.clone()}) for _ in turn]


class Sum(Method):
    """Asks three times in a round. What the hostile participant says counts for nothing, if it is ever accepted."""

    name = "sum"
    model = nn.Linear(1, 1)

    def initial_state(self) -> dict[str, Tensor]:
        """A weight, and what was heard."""
        return {"weight": torch.ones(1), "heard": torch.zeros(4)}

    def assign(self, state: State, round_index: int, participant: int) -> Task:
        """What was heard so far."""
        return Task(participant, round_index, {"heard": state["heard"]})

    def train(self, task: Task, data: Batch) -> Training:
        """Say three numbers, each of which depends on what was answered."""
        assert isinstance(data.inputs, tuple)
        heard = task.tensors["heard"].clone()
        for step in range(3):
            response = yield Request((), {"number": data.inputs[0].mean().view(1) * step + heard[:1] / 7})
            heard += response.tensors["total"]
        return Update(task.participant, task.round_index, {"heard": heard.sin()}, len(data), 0.5)

    def conversation(self, state: State, round_index: int) -> Sums:
        """Who answers."""
        return Sums(state["weight"])

    def outbound_request(self, task: Task) -> Outbound:
        """One number."""
        return Outbound({"number": (torch.float32, (1,))})

    def fuse(self, state: State, answered: Answered) -> dict[str, Tensor]:
        """The mean of what honest participants have heard."""
        heard = {update.participant: update.tensors["heard"] for _, update in answered}
        honest = [heard[each] for each in sorted(heard) if each != HOSTILE]
        return {**state, "heard": torch.stack(honest).mean(0)}


DATA = [Batch((torch.full((8, 1), float(who)),), torch.zeros(8, dtype=torch.long)) for who in range(3)]


def final_state(rounds: int, engine: Engine, left_out: Counter[int]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    settings = RoundSettings(rounds)
    for result in run_rounds(Sum(), DATA, settings, engine=engine, screening=Screening()):
        state = dict(result.state)
        left_out.update(each.participant for each in result.left_out)
    return state


class Live(Engine):
    """The server, and the two honest participants as threads."""

    converses = True

    def __init__(self) -> None:
        self.address: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def open(self, data: Any, test: Any = None) -> None:
        """Listen, and have them come."""
        where = Listening("127.0.0.1:0", Access(), DEADLINE, DEADLINE, on_listening=self._listens)
        self.network = Network(where, [len(own) for own in data], AGREED)
        self.network.__enter__()

    def _listens(self, address: str) -> None:
        for who in (0, 1):
            self._threads.append(threading.Thread(target=self._take_part, args=(address, who)))
            self._threads[-1].start()
        self.address.put(address)

    def _take_part(self, address: str, who: int) -> None:
        with suppress(StreamError):  # that the run has ended
            take_part(Sum(), DATA[who], Connecting(address, Access()), participant=who, agreement=AGREED)

    def run(self, method: Method, asks: Any) -> Iterator[Any]:
        """As the network does."""
        yield from self.network.run(method, asks)

    def close(self) -> None:
        """End all streams."""
        error = StreamError("the run has ended")
        self.network.__exit__(StreamError, error, None)
        for each in self._threads:
            each.join()


def hello(participant: int, session: bytes) -> Hello:
    return Hello(FORMAT, participant, session, 8, AGREED)


def mutated(draws: random.Random, message: bytes) -> bytes:
    """A sound message with some bytes changed, cut off, repeated or added."""
    data = bytearray(message)
    for _ in range(draws.choice((1, 1, 2, 8))):
        at = draws.randrange(len(data) + 1)
        kind = draws.randrange(4)
        if kind == 0 and at < len(data):
            data[at] = draws.randrange(256)
        elif kind == 1:
            del data[at : at + draws.choice((1, 4, 100))]
        elif kind == 2:
            data[at:at] = draws.randbytes(draws.choice((1, 4, 100)))
        else:
            data += data[at : at + 50]
    return bytes(data)


def anything(draws: random.Random, work: bytes = b"w") -> bytes:
    """A frame: sound, with absurd numbers or other fields, mutated, or no frame at all."""
    number = draws.choice(NUMBERS)
    sound = [Ready(), Done(work, number), Say(work, number, draws.choice(NUMBERS)), Failed(b"x")]
    frame = msgpack.packb({"kind": type(each := draws.choice(sound)).__name__, **vars(each)})
    kind = draws.randrange(4)
    if kind == 0:
        return bytes(frame)
    if kind == 1:
        table = msgpack.unpackb(frame)
        table[draws.choice(["kind", "work", "size", "more"])] = draws.choice(
            [number, b"x", "y", None, [], {}]
        )
        return bytes(msgpack.packb(table))
    return mutated(draws, frame) if kind == 2 else draws.randbytes(draws.choice((0, 1, 100, 2**17)))


def stranger(address: str, draws: random.Random) -> str:
    """Somebody who is nobody here; how it ended."""
    peer = Peer(address, Access(), SECONDS)
    with closing(peer):
        first = draws.choice(
            [
                lambda: anything(draws),
                lambda: mutated(draws, pack(hello(draws.choice((0, 1, HOSTILE)), b"stranger"))),
                lambda: pack(hello(draws.choice((0, 1, 3, 2**40)), b"stranger")),
            ]
        )()
        try:
            peer.say(first, *(anything(draws) for _ in range(draws.randrange(3))))
            for _ in range(draws.randrange(1, 4)):
                peer.piece()
        except grpc.RpcError as error:
            return str(error.code().name)
        except StopIteration:
            return "ended"
    return "left"


def attack(address: str, draws: random.Random, session: bytes) -> str:
    """The hostile participant's part of a round: it takes its task, says something, and goes; how it ended."""
    peer = Peer(address, Access(), SECONDS)
    with closing(peer):
        try:
            peer.say(hello(HOSTILE, session))
            peer.piece()
            peer.say(Ready())
            table = msgpack.unpackb(peer.piece())
            if table["kind"] != "Work":
                return "over"
            gathering = Gathering(table["size"], 2**20)
            while gathering.missing:
                gathering.add(peer.piece())
            task = task_of(*read(gathering.message()))
            for said in _said(draws, table["work"], task):
                peer.say(said)
                peer.piece()
            return "left"
        except grpc.RpcError as error:
            return str(error.code().name)
        except StopIteration:
            return "ended"


def _said(draws: random.Random, work: bytes, task: Task) -> list[bytes]:
    """What it says: an announcement, then what was announced, or anything else."""
    about = {
        "participant": HOSTILE,
        "round_index": task.round_index,
        "examples": 8,
        "loss": 0.5,
        "metadata": {},
    }
    update = encode({**about, "seconds": 0.1, "remembers": False}, dict(task.tensors))
    shared = Outbound({"number": (torch.float32, (1,))}).select({"number": torch.ones(1)}, {}, "it")
    request = request_message(Request((), shared))
    message = draws.choice((update, request))
    sent = mutated(draws, message) if draws.randrange(4) else message
    size = len(sent) if draws.randrange(3) else draws.choice(NUMBERS[1:])
    announced = Done(work, size) if message is update else Say(work, 0, size)
    if not draws.randrange(3):
        return [anything(draws, work) for _ in range(draws.randrange(1, 4))]
    return [pack(announced), sent, pack(Failed(work))]


def give_up(address: str, session: bytes) -> None:
    """Whatever became of its task, it says that it failed: the round can end."""
    peer = Peer(address, Access(), SECONDS)
    with closing(peer), suppress(grpc.RpcError, StopIteration):
        peer.say(hello(HOSTILE, session))
        peer.piece()
        peer.say(Ready())
        table = msgpack.unpackb(peer.piece())
        if table["kind"] == "Work":
            peer.say(Failed(table["work"]))
            received = 0
            while received < table["size"]:
                received += len(peer.piece())
            peer.piece()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--strangers", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    expected = final_state(options.rounds, InProcess(), Counter())

    engine, left_out, found, raised = Live(), Counter[int](), dict[str, Tensor](), list[str]()
    threading.excepthook = lambda given: raised.append(repr(given.exc_value))

    def serve() -> None:
        found.update(final_state(options.rounds, engine, left_out))

    server = threading.Thread(target=serve)
    begin = time.monotonic()
    server.start()
    address = engine.address.get(timeout=5)
    ends, strangers = Counter[str](), Counter[str]()

    def come() -> None:
        draws = random.Random(f"strangers {options.seed}")
        for _ in range(options.strangers):
            strangers[stranger(address, draws)] += 1

    others = threading.Thread(target=come)
    others.start()
    draws = random.Random(options.seed)
    while server.is_alive():
        ends[attack(address, draws, b"hostile")] += 1
        give_up(address, b"hostile")
    server.join()
    others.join()
    same = found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )
    seconds = time.monotonic() - begin
    waited = seconds > options.rounds * 0.5 + DEADLINE
    report = {
        "rounds": options.rounds,
        "same_model": same,
        "left_out": {str(who): count for who, count in sorted(left_out.items())},
        "attacks": dict(ends.most_common()),
        "strangers": dict(strangers.most_common()),
        "raised": raised,
        "seconds": round(seconds, 1),
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "environment": environment(),
    }
    print(json.dumps(report, indent=2))
    sys.exit(0 if same and not raised and not waited and not left_out.keys() - {HOSTILE} else 1)


if __name__ == "__main__":
    main()
