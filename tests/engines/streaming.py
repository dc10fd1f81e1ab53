"""A server and participants over real sockets, in threads of this process; and hand-made ones that misbehave."""

from __future__ import annotations

import ctypes
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import grpc
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import msfusion
from msfusion.batch import Batch
from msfusion.codecs import PROFILES
from msfusion.engines.grpc.access import METHOD, Access
from msfusion.engines.grpc.listening import Listening
from msfusion.engines.grpc.packing import pack, unpack
from msfusion.engines.stream.client import Connecting, join_split_rounds
from msfusion.engines.stream.contract import Contract
from msfusion.engines.stream.federation import serve_split_rounds
from msfusion.engines.stream.frames import FORMAT, Begin, Hello, Layers, Step, Welcome
from msfusion.federated.participation import RoundSettings
from msfusion.federated.states import state_of
from msfusion.federated.training import TrainingSettings, round_batches
from msfusion.methods.split.rounds import SplitRound, SplitSettings, run_split_rounds
from msfusion.methods.split.sides import Participant
from msfusion.models.convolutional import ConvNet
from msfusion.width.cut import Cut
from msfusion.width.groups import WidthMap

TRAINING = TrainingSettings(optimizer="adamw", learning_rate=0.01, batch_size=8)
SETTINGS = SplitSettings("layers.3", PROFILES["small"], PROFILES["accurate"])
NOTHING = Access()


def digits(count: int, first: int = 0) -> Batch:
    pixels, labels = load_digits(return_X_y=True)
    chosen = slice(first, first + count)
    images = torch.tensor(pixels[chosen], dtype=torch.float32).view(-1, 1, 8, 8) / 16 - 0.3
    return Batch((images,), torch.tensor(labels[chosen]))


@cache
def untraced() -> nn.Module:
    """A small network. Nothing may change it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ConvNet(1, 10, image_size=8, widths=(8, 8))


@cache
def network() -> tuple[nn.Module, WidthMap]:
    """The small network and its map."""
    return untraced(), msfusion.trace(untraced(), digits(2).inputs)


@dataclass
class Job:
    """What a server and its participants work on. Nothing is traced to make one: a test's module may hold it."""

    data: list[Batch] = field(default_factory=lambda: [digits(20), digits(12, 100), digits(17, 200)])
    settings: SplitSettings = SETTINGS
    training: TrainingSettings = TRAINING
    rounds: RoundSettings = field(default_factory=lambda: RoundSettings(2))
    first_round: int = 0
    state: dict[str, Tensor] = field(default_factory=lambda: state_of(untraced()))

    def parts(self) -> Cut:
        return msfusion.cut(*network(), self.settings.at)

    def contract(self) -> Contract:
        return Contract(self.parts(), self.settings, self.training, self.rounds, len(self.data))

    def in_process(self) -> list[SplitRound]:
        more = {"state": self.state, "first_round": self.first_round}
        return list(
            run_split_rounds(
                self.parts(), network()[0], self.data, self.settings, self.training, self.rounds, **more
            )
        )

    def join(self, participant: int, connecting: Connecting) -> int:
        return join_split_rounds(
            self.parts(),
            self.data[participant],
            self.settings,
            self.training,
            self.rounds,
            connecting,
            participant=participant,
            participants=len(self.data),
        )


class Running(threading.Thread):
    """A function in a thread; what it returned or raised."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        super().__init__(daemon=True)
        self._function, self._arguments = function, arguments
        self.result: Any = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self._function(*self._arguments)
        except BaseException as error:
            self.error = error

    def wait(self, seconds: float = 60.0) -> Any:
        self.join(seconds)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error
        return self.result


class Served:
    """A server in a thread."""

    def __init__(self, job: Job, listening: Listening) -> None:
        self.job, self.rounds, self.events = job, list[SplitRound](), list[str]()
        self.address, self._up = "", threading.Event()
        self._listening = replace(listening, on_listening=self._listens, on_event=self.events.append)
        self.thread = Running(self._run)
        assert self._up.wait(30)

    def _listens(self, address: str) -> None:
        self.address = address
        self._up.set()

    def _run(self) -> None:
        job = self.job
        try:
            for done in serve_split_rounds(
                job.parts(),
                network()[0],
                job.settings,
                job.training,
                job.rounds,
                self._listening,
                participants=len(job.data),
                state=job.state,
                first_round=job.first_round,
            ):
                self.rounds.append(done)
        finally:
            self._up.set()

    def kill(self) -> None:
        """End it in the middle of whatever it does, as an interrupt would."""
        number = ctypes.c_ulong(self.thread.ident or 0)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(number, ctypes.py_object(KeyboardInterrupt))


@contextmanager
def served(job: Job, access: Access = NOTHING, **listening: Any) -> Iterator[Served]:
    """A server, at the end of which nothing is left."""
    settings = {"address": "127.0.0.1:0", "patience": 20.0, "deadline": 20.0, "farewell": 5.0, **listening}
    server = Served(job, Listening(access=access, **settings))
    yield server
    server.thread.join(30)
    assert not server.thread.is_alive()


class Hand:
    """A participant made by hand, that can say anything."""

    def __init__(
        self, server: Served, access: Access = NOTHING, compression: grpc.Compression | None = None
    ) -> None:
        self._said: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._channel = access.channel(server.address, [("grpc.use_local_subchannel_pool", 1)])
        stream = self._channel.stream_stream(METHOD)
        self._answers = stream(
            iter(self._said.get, None), metadata=access.metadata, timeout=30, compression=compression
        )

    def __enter__(self) -> Hand:
        return self

    def __exit__(self, *_: object) -> None:
        self._said.put(None)
        self._channel.close()

    def say(self, what: bytes) -> bytes:
        """Raises grpc.RpcError where the stream has ended."""
        self._said.put(what)
        return next(self._answers)  # type: ignore[no-any-return]

    def leave(self, what: bytes) -> None:
        """Say something and do not wait for the answer."""
        self._said.put(what)
        self._said.put(None)

    def greet(self, job: Job, participant: int = 0, **changes: Any) -> None:
        unpack(self.say(pack(hello(job, participant, **changes))), Welcome)

    def begin(self, job: Job, participant: int = 0) -> Layers:
        self.greet(job, participant)
        return unpack(self.say(pack(Begin())), Layers)

    def ended(self) -> str:
        """Say nothing until the stream ends; its status."""
        return self._status(self._answers)[0]

    def refused(self, what: bytes) -> tuple[str, str]:
        """The status and the sentence with which the stream ends."""
        self._said.put(what)
        return self._status(self._answers)

    @staticmethod
    def _status(answers: Iterator[bytes]) -> tuple[str, str]:
        try:
            next(answers)
        except grpc.RpcError as error:
            return error.code().name, error.details()
        raise AssertionError("the server went on")


def hello(job: Job, participant: int = 0, **changes: Any) -> Hello:
    known = {"session": b"by hand", "examples": len(job.data[participant]), "attempt": b""}
    agreement = job.contract().terms.agreement | changes.pop("agreement", {})
    return Hello(**{"format": FORMAT, "participant": participant, **known, "agreement": agreement, **changes})


def first_step(job: Job, begun: Layers, participant: int = 0) -> Step:
    """What an honest participant says first in a round."""
    contract = job.contract()
    part = job.parts().client
    part.load_state_dict(contract.layers_of(begun.layers))
    part.train()
    batch = next(
        iter(
            round_batches(
                job.data[participant], job.training, seed=0, round_index=begun.round, participant=participant
            )
        )
    )
    message = Participant(part, None, contract.wire).send(batch)
    return Step(begun.round, 0, message, batch.targets.numpy().tobytes())


def certificates(directory: Path) -> tuple[Access, Access]:
    """The server's and a participant's side of new certificates."""
    from msfusion.engines.grpc.certificates import make_certificates

    make_certificates(directory, ["localhost", "127.0.0.1"])
    return Access.of_server(directory), Access.of_participant(directory)


def same(ours: list[SplitRound], theirs: list[SplitRound]) -> None:
    """The very same numbers, bit for bit."""
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(tensor, other.state[name]) for name, tensor in one.state.items())
        assert one.traffic == other.traffic
        assert [each.loss for each in one.participants] == [each.loss for each in other.participants]
        assert one.round_index == other.round_index
