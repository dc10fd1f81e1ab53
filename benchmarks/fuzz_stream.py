"""Hostile messages to a live server while honest participants train: from a seed, so that they repeat.

The server is a process of its own, over TLS. Participant 0 is honest throughout; the others are honest in turns, for a
step, and otherwise hostile: without the token, in place of a greeting, after one, and in place of a mini-batch. A
mutated mini-batch that is sound (another number in place of a number) would be trained on, so it is not sent.

Every stream must end with a status and one sentence, the server stay alive and no larger, and the final tensors be
those of the run in one process; the exit code is 1 otherwise.

    python benchmarks/fuzz_stream.py --messages 100000
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import grpc
import safetensors.torch
import torch
from fuzz_codecs import MUTATIONS, lie

import msfusion
from msfusion.batch import Batch
from msfusion.codecs import PROFILES
from msfusion.engines.grpc.access import METHOD, Access
from msfusion.engines.grpc.certificates import make_certificates
from msfusion.engines.grpc.listening import Listening
from msfusion.engines.grpc.packing import pack, unpack
from msfusion.engines.stream.client import Connecting, join_split_rounds
from msfusion.engines.stream.contract import Contract
from msfusion.engines.stream.federation import serve_split_rounds
from msfusion.engines.stream.frames import FORMAT, Again, Begin, Finish, Hello, Layers, Step
from msfusion.errors import MsfusionError
from msfusion.experiment.environment import environment
from msfusion.federated.participation import RoundSettings
from msfusion.federated.states import state_of
from msfusion.federated.training import TrainingSettings
from msfusion.methods.split.rounds import SplitSettings, run_split_rounds
from msfusion.models.convolutional import ConvNet

PARTICIPANTS, ROUNDS, BATCH = 4, 2, 8
SETTINGS = SplitSettings("layers.3", PROFILES["small"], PROFILES["accurate"])
TRAINING = TrainingSettings(learning_rate=0.05, batch_size=BATCH)
ASKED = RoundSettings(ROUNDS)
SECONDS = 300.0
"""A stream that has not ended by then hangs."""


class Job:
    """A small model and everybody's data, the same in every process."""

    def __init__(self, steps: int) -> None:
        torch.manual_seed(0)
        self.model = ConvNet(1, 10, image_size=8, widths=(8, 8))
        self.width_map = msfusion.trace(self.model, (torch.randn(2, 1, 8, 8),))
        self.data = [
            Batch((torch.randn(BATCH * steps, 1, 8, 8),), torch.randint(10, (BATCH * steps,)))
            for _ in range(PARTICIPANTS)
        ]

    def parts(self) -> msfusion.Cut:
        """New ones."""
        return msfusion.cut(self.model, self.width_map, SETTINGS.at)


def serve(job: Job, place: Path) -> None:
    """The server's process: prints its address, and leaves the final tensors."""
    state: dict[str, Any] = {}
    for done in serve_split_rounds(
        job.parts(),
        job.model,
        SETTINGS,
        TRAINING,
        ASKED,
        Listening(
            "127.0.0.1:0",
            Access.of_server(place / "keys"),
            patience=7200.0,
            on_listening=lambda where: print(where, flush=True),
        ),
        participants=PARTICIPANTS,
        state=state_of(job.model),
    ):
        state = done.state
    safetensors.torch.save_file(state, place / "served.safetensors")


class Paused(Exception):
    """An honest participant has done what it should for now."""


class Attacker:
    """One participant's number: mostly hostile, now and then honest."""

    def __init__(self, job: Job, number: int, address: str, access: Access, seed: int) -> None:
        self.job, self.number, self.address, self.access = job, number, address, access
        self.rng, self.counts = random.Random(f"{seed} {number}"), Counter[str]()
        self.wrong: list[str] = []
        self.parts = job.parts()
        self.contract = Contract(self.parts, SETTINGS, TRAINING, ASKED, PARTICIPANTS)
        options = [("grpc.max_send_message_length", 2**30), ("grpc.use_local_subchannel_pool", 1)]
        self.stream = access.channel(address, options).stream_stream(METHOD)
        self.done = (-1, 0)
        crossing = self.parts.client(*job.data[number].take(slice(0, BATCH)).inputs)
        self.message = self.contract.wire.up(crossing)
        self.targets = job.data[number].targets[:BATCH].numpy().tobytes()
        self.hello = Hello(
            FORMAT, number, bytes([number]), len(job.data[number]), b"", self.contract.terms.agreement
        )

    def honest(self, steps: int | None = None) -> None:
        """Train for some more steps, or to the end."""
        fresh = 0

        def count(round_index: int, done: int, total: int, loss: float) -> None:
            nonlocal fresh
            if (round_index, done) > self.done:
                self.done, fresh = (round_index, done), fresh + 1
            if fresh == steps:
                raise Paused

        connecting = Connecting(self.address, self.access, on_step=count)
        with suppress(Paused):
            join_split_rounds(
                self.parts,
                self.job.data[self.number],
                SETTINGS,
                TRAINING,
                ASKED,
                connecting,
                participant=self.number,
                participants=PARTICIPANTS,
            )

    @property
    def sent(self) -> int:
        """Hostile messages so far."""
        return self.counts.total() - self.counts["sound, so not sent"]

    def attack(self) -> None:
        """One hostile message, in a stream of its own; how that ended is counted."""
        kind = self.rng.choice(
            (self.stranger, self.greeting, self.greeting, self.question, self.step, self.step)
        )
        kind()

    def stranger(self) -> None:
        """Whatever is said without the token."""
        token = self.rng.choice(("", "x", self.access.token[:-1], self.access.token + "x"))
        data = self.rng.choice((b"", pack(self.hello), self.rng.randbytes(100)))
        self.say("no token", [data], replace(self.access, token=token), {"UNAUTHENTICATED"})

    def greeting(self) -> None:
        """A greeting that lies, is damaged, or is none."""
        lies: dict[str, Any] = {
            "participant": (PARTICIPANTS, 2**62, 0),
            "examples": (0, 2**62, 1),
            "format": (0, 2),
            "session": (self.rng.randbytes(60_000), self.rng.randbytes(70_000)),
            "agreement": ({}, {"seed": 1}, {**self.hello.agreement, "x" * 5000: 1}),
        }
        name = self.rng.choice(list(lies))
        lying = pack(replace(self.hello, **{name: self.rng.choice(lies[name])}))
        data = self.rng.choice((lying, self.mutated(pack(self.hello)), self.garbage()))
        sound = _is(data, Hello) and unpack(data, Hello).agreement == self.hello.agreement
        if sound and unpack(data, Hello).participant in range(PARTICIPANTS) and unpack(data, Hello).examples:
            self.counts["sound, so not sent"] += 1
            return
        self.say("greeting", [data], self.access)

    def question(self) -> None:
        """After a good greeting something that may not come then."""
        bad = self.rng.choice(
            (
                self.garbage(),
                self.mutated(pack(Begin())),
                pack(self.hello),
                pack(Again(self.rng.choice((0, 1, 2**62)), self.rng.choice((1000, 2**62)))),
                pack(Finish(self.rng.choice((7, 2**62)), self.rng.randbytes(1000))),
            )
        )
        if not _is(bad, Begin):
            self.say("question", [pack(self.hello), bad], self.access)

    def step(self) -> None:
        """A mini-batch that lies: at a place that is next, as far as it can be known."""
        self.say("mini-batch", [pack(self.hello), pack(Begin()), self.lying_step], self.access)

    def lying_step(self, begun: bytes) -> bytes | None:
        """None where it turned out sound."""
        layers = unpack(begun, Layers)
        good = Step(layers.round, layers.answered, self.message, self.targets)
        kind = self.rng.randrange(5)
        if kind == 0:
            return pack(replace(good, step=self.rng.choice((layers.answered + 1, 2**62)), pieces=[b""]))
        if kind == 1:
            data = self.mutated(pack(good))
            return None if self.sound(data) else data
        if kind == 2:
            return pack(replace(good, targets=self.rng.randbytes(len(self.targets))))
        piece = bytearray(self.message[0])
        (lie if kind == 3 else self.rng.choice(MUTATIONS))(piece, self.rng)
        data = pack(replace(good, pieces=[bytes(piece)]))
        return None if self.sound(data) else data

    def sound(self, data: bytes) -> bool:
        """Whether the server would take a mini-batch for one."""
        try:
            step = unpack(data, Step)
            self.contract.check_message(step.pieces, BATCH)
            self.contract.targets_of(step.targets, BATCH)
            self.contract.check_received(self.contract.wire.received(step.pieces), BATCH)
        except MsfusionError:
            return False
        return True

    def garbage(self) -> bytes:
        """Bytes from anywhere, some of them the beginning of something huge."""
        size = self.rng.choice(
            (0, 1, 10, 1000, 70_000, self.contract.terms.largest_up, self.contract.terms.largest_up + 1)
        )
        start = self.rng.choice(
            (b"", b"\xdf\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff")
        )
        return (start + self.rng.choice((self.rng.randbytes, bytes, lambda n: b"\x91" * n))(size))[:size]

    def mutated(self, data: bytes) -> bytes:
        """A few bytes of it are others, missing or too many."""
        changed = bytearray(data)
        for _ in range(self.rng.choice((1, 1, 2, 4))):
            if changed:
                self.rng.choice(MUTATIONS)(changed, self.rng)
        return bytes(changed)

    def say(
        self,
        kind: str,
        messages: list[bytes | Callable[[bytes], bytes | None]],
        access: Access,
        wanted: set[str] | None = None,
    ) -> None:
        """Say one after the other, waiting for answers; sometimes all at once, compressed, or leaving early."""
        said: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        manner = self.rng.random()
        compression = grpc.Compression.Gzip if manner < 0.02 else None
        answers = self.stream(
            iter(said.get, None), metadata=access.metadata, timeout=SECONDS, compression=compression
        )
        answer = b""
        try:
            for message in messages:
                data = message(answer) if callable(message) else message
                if data is None:
                    self.counts["sound, so not sent"] += 1
                    return
                said.put(data)
                if manner > 0.98:
                    self.counts[f"{kind}: not waited for"] += 1
                    return
                if manner > 0.95:
                    said.put(data)  # and once more
                answer = next(answers)
            self.counts[f"{kind}: taken"] += 1
            self.wrong.append(f"{kind} was taken")
        except StopIteration:
            self.counts[f"{kind}: ended"] += 1
        except grpc.RpcError as error:
            status, details = error.code().name, error.details() or ""
            self.counts[f"{kind}: {status}"] += 1
            expected = (wanted or EXPECTED) | ({"UNIMPLEMENTED"} if compression else set())
            if status not in expected or "\n" in details or not details:
                self.wrong.append(f"{kind}: {status} {details}")
        finally:
            answers.cancel()
            said.put(None)

    def run(self, messages: float, turns: int) -> None:
        """So many hostile messages, with a step of honest training after every share of them; then to the end."""
        for turn in range(turns):
            while self.sent < messages * (turn + 1) / turns:
                self.attack()
            self.honest(1)
        self.honest()


EXPECTED = {"INVALID_ARGUMENT", "FAILED_PRECONDITION", "ALREADY_EXISTS", "RESOURCE_EXHAUSTED"}


def _is(data: bytes, kind: type[Any]) -> bool:
    try:
        unpack(data, kind)
    except MsfusionError:
        return False
    return True


def memory(server: int) -> dict[str, float]:
    """Of the server's two processes together, now and at most so far, in MB."""
    children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    lines = [
        dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
        for process in (server, *children)
    ]
    now, peak = (sum(int(each[name].split()[0]) / 1024 for each in lines) for name in ("VmRSS", "VmHWM"))
    return {"now": now, "peak": peak}


def fuzz(messages: int, seed: int, steps: int, place: Path) -> dict[str, Any]:
    job = Job(steps)
    make_certificates(place / "keys", ["127.0.0.1"])
    *_, last = run_split_rounds(
        job.parts(), job.model, job.data, SETTINGS, TRAINING, ASKED, state=state_of(job.model)
    )
    command = [sys.executable, __file__, "--serve", str(place), "--steps", str(steps)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    address, access = server.stdout.readline().strip(), Access.of_participant(place / "keys")
    attackers = [Attacker(job, number, address, access, seed) for number in range(PARTICIPANTS)]
    turns = steps * ROUNDS - 3
    honest = threading.Thread(target=attackers[0].honest)
    first = [threading.Thread(target=each.honest, args=(2,)) for each in attackers[1:]]
    hostile = [
        threading.Thread(target=each.run, args=(messages / (PARTICIPANTS - 1), turns))
        for each in attackers[1:]
    ]
    honest.start()
    for thread in first:  # memory is measured once the server has trained
        thread.start()
    for thread in first:
        thread.join()
    over_time, began = [memory(server.pid)], time.perf_counter()
    for thread in hostile:
        thread.start()
    while any(thread.is_alive() for thread in (honest, *hostile)):
        time.sleep(0.2)
        with suppress(OSError, KeyError):  # it has ended meanwhile
            over_time.append(memory(server.pid))
    code = server.wait(60)
    served = safetensors.torch.load_file(place / "served.safetensors") if code == 0 else {}
    same = served.keys() == last.state.keys() and all(
        torch.equal(tensor, served[name]) for name, tensor in last.state.items()
    )
    counts = sum((each.counts for each in attackers), Counter[str]())
    return {
        "hostile_messages": sum(each.sent for each in attackers),
        "seconds": time.perf_counter() - began,
        "counts": dict(sorted(counts.items())),
        "server_exit_code": code,
        "memory_mb": {
            "before": over_time[0],
            "after": over_time[-1],
            "over_time": [each["now"] for each in over_time[:: max(1, len(over_time) // 12)]],
        },
        "honest_result_is_that_of_one_process": same,
        "wrong": [wrong for each in attackers for wrong in each.wrong][:20],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20, help="honest steps in each of the rounds")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.serve is not None:
        serve(Job(arguments.steps), arguments.serve)
        return
    with tempfile.TemporaryDirectory() as place:
        found = fuzz(arguments.messages, arguments.seed, arguments.steps, Path(place))
    print(json.dumps({"machine": environment(), "seed": arguments.seed, **found}, indent=2))
    sound = found["server_exit_code"] == 0 and found["honest_result_is_that_of_one_process"]
    sys.exit(not sound or bool(found["wrong"]))


if __name__ == "__main__":
    main()
