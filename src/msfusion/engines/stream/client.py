"""A participant on its own machine: it goes through all rounds, and comes back whenever the connection is lost.

It keeps nothing on its disk. If it is killed and started again, the server sends the first layers as they were
before the round and the answers to the steps that it had done; it does those again by itself, and goes on.
"""

from __future__ import annotations

import os
import queue
import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import numpy as np

from msfusion.batch import Batch
from msfusion.engines.grpc.access import METHOD, Access, speaks_tls, why_refused
from msfusion.engines.grpc.packing import Agreement, pack, unpack
from msfusion.engines.stream.contract import Contract, layers_message
from msfusion.engines.stream.frames import (
    FORMAT,
    Again,
    Answer,
    Begin,
    Down,
    Finish,
    Goodbye,
    Hello,
    Layers,
    Over,
    Step,
    Thanks,
    Up,
    Welcome,
)
from msfusion.engines.stream.service import KEEPALIVE_SECONDS
from msfusion.errors import ConfigError, StreamError
from msfusion.federated.engine import threads_set
from msfusion.federated.participation import RoundSettings
from msfusion.federated.states import state_of
from msfusion.federated.training import TrainingSettings, round_batches
from msfusion.methods.split.rounds import SplitSettings, client_optimizer
from msfusion.methods.split.sides import Participant, draw_of
from msfusion.width.cut import Cut

D = TypeVar("D", bound=Down)

_PASSING = ("UNAVAILABLE", "CANCELLED", "DEADLINE_EXCEEDED", "UNKNOWN", "INTERNAL")
"""How a stream ends that may be taken up again."""

_LONGEST_PAUSE = 5.0


@dataclass(frozen=True)
class Connecting:
    """Where the server is, and for how many seconds to look for it whenever it is away.

    `on_event` is told what happens to the connection, `on_step` the round, how many of how many of its steps are
    done, and the loss of the last.
    """

    address: str
    access: Access
    patience: float = 600.0
    on_event: Callable[[str], None] = lambda _: None
    on_step: Callable[[int, int, int, float], None] = lambda *_: None

    def __post_init__(self) -> None:
        self.access.check_address(self.address)
        if not self.patience > 0:
            raise ConfigError(f"patience is {self.patience}: it must be above 0")


class Lost(Exception):
    """The connection is lost, and may be found again."""


def join_split_rounds(
    parts: Cut,
    data: Batch,
    settings: SplitSettings,
    training: TrainingSettings,
    rounds: RoundSettings,
    connecting: Connecting,
    *,
    participant: int,
    participants: int,
    threads: int = 1,
    meaning: Agreement | None = None,
) -> int:
    """Take part in all rounds of a server with `participants` participants, as one of them; how many there were.

    Only what `frames` lists leaves this machine: never an example, nor the first layers within a round. Raises
    StreamError where the server refuses us, for whatever reason, and where it is away for too long; CodecError
    for gradients that are not those of our activations.
    """
    contract = Contract(parts, settings, training, rounds, participants, meaning=meaning)
    if not 0 <= participant < participants:
        raise ConfigError(f"there is no participant {participant}: they are 0 to {participants - 1}")
    trainee = _Trainee(parts, data, contract, participant, connecting)
    with threads_set(threads):
        return _Persistent(connecting, contract, trainee).run()


class _Persistent:
    """Connects, and connects again."""

    def __init__(self, connecting: Connecting, contract: Contract, trainee: _Trainee) -> None:
        self._connecting, self._contract, self._trainee = connecting, contract, trainee

    def run(self) -> int:
        """Until all rounds are done."""
        where, patience = self._connecting.address, self._connecting.patience
        self._connecting.on_event(f"looking for the server at {where}, for at most {patience:g} seconds")
        pause, last = 0.1, time.monotonic()
        draws = random.Random()  # what a model or data draw must not depend on the connection
        while True:
            conversation = Conversation(self._connecting, self._contract)
            try:
                return self._trainee.converse(conversation)
            except Lost as error:
                if conversation.heard:
                    pause, last = 0.1, time.monotonic()
                    self._connecting.on_event("the connection is lost; looking for the server")
                elif (wrong := self._what_is_wrong()) is not None:
                    raise StreamError(
                        f"the server at {self._connecting.address} cannot be used: {wrong}"
                    ) from error
                if time.monotonic() - last > self._connecting.patience:
                    raise StreamError(
                        f"no server was found at {self._connecting.address} for {self._connecting.patience:g} "
                        f"seconds: {error}",
                        "UNAVAILABLE",
                    ) from error
            finally:
                conversation.close()
            time.sleep(pause * draws.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _what_is_wrong(self) -> str | None:
        """Why waiting will not help."""
        access, address = self._connecting.access, self._connecting.address
        if access.is_plain:
            return "it wants TLS: give the certificates" if speaks_tls(address) else None
        return why_refused(access, address)


class Conversation:
    """One stream: a question, an answer, and so on."""

    def __init__(self, connecting: Connecting, contract: Contract) -> None:
        options = [
            ("grpc.max_receive_message_length", contract.terms.largest_down),
            ("grpc.max_send_message_length", contract.terms.largest_up),
            ("grpc.compression_enabled_algorithms_bitset", 1),
            ("grpc.use_local_subchannel_pool", 1),  # a new channel tries at once
            ("grpc.keepalive_time_ms", 1000 * KEEPALIVE_SECONDS),
            ("grpc.keepalive_timeout_ms", 1000 * KEEPALIVE_SECONDS),
        ]
        self.heard = False
        self._questions: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._channel = connecting.access.channel(connecting.address, options)
        stream = self._channel.stream_stream(METHOD)
        self._answers = stream(iter(self._questions.get, None), metadata=connecting.access.metadata)

    @overload
    def ask(self, question: Up, expected: type[D], /) -> D: ...

    @overload
    def ask(self, question: Up, /, *expected: type[Down]) -> Any: ...

    def ask(self, question: Up, /, *expected: Any) -> Any:
        """Say something and wait for the answer. Raises Lost, or StreamError where the server refuses it."""
        import grpc

        self._questions.put(pack(question))
        try:
            answer = next(self._answers)
        except StopIteration:
            raise Lost("the server ended the conversation") from None
        except grpc.RpcError as error:
            status, details = error.code().name, " ".join((error.details() or "").split())
            busy = status == "RESOURCE_EXHAUSTED" and "larger than max" not in details
            if status in _PASSING or busy:
                raise Lost(details) from error
            raise StreamError(f"the server refuses: {details}", status) from error
        self.heard = True
        return unpack(answer, *expected)

    def say_goodbye(self) -> None:
        """Let the server know that its last answer has come."""
        import grpc

        self._questions.put(pack(Goodbye()))
        with suppress(StopIteration, grpc.RpcError):
            next(self._answers)

    def close(self) -> None:
        """End it."""
        self._answers.cancel()
        self._questions.put(None)
        self._channel.close()


class _Trainee:
    """A participant's work, which outlives connections."""

    def __init__(
        self, parts: Cut, data: Batch, contract: Contract, participant: int, connecting: Connecting
    ) -> None:
        self._parts, self._data, self._contract = parts, data, contract
        self._number, self._connecting = participant, connecting
        self._session = os.urandom(16)
        self._round: _Round | None = None

    def converse(self, conversation: Conversation) -> int:
        """Go through the rounds until all are done; how many there were. Raises Lost, and can be called again."""
        attempt = b"" if self._round is None else self._round.attempt
        hello = Hello(
            FORMAT, self._number, self._session, len(self._data), attempt, self._contract.terms.agreement
        )
        if not conversation.ask(hello, Welcome).resumes:
            self._round = None
        others = self._contract.participants - 1
        waits = (
            ""
            if self._round
            else f"; a round begins when all are there ({others} others), or back from the last"
        )
        self._connecting.on_event(f"connected{waits}")
        while True:
            if self._round is None:
                begun: Layers | Over = conversation.ask(Begin(), Layers, Over)
                if isinstance(begun, Over):
                    conversation.say_goodbye()
                    return begun.rounds
                self._round = self._begin(begun)
            self._round.go_on(conversation)
            self._round = None

    def _begin(self, begun: Layers) -> _Round:
        part, training = self._parts.copy_of_client(), self._contract.training
        part.load_state_dict(self._contract.layers_of(begun.layers))
        part.train()
        optimizer = client_optimizer(part, training, begun.round)
        participant = Participant(part, optimizer, self._contract.wire, training.clip_norm)
        return _Round(participant, self._data, self._contract, self._number, begun, self._connecting)


class _Round:
    """A round in training; what was asked last is kept until it is answered."""

    def __init__(
        self,
        participant: Participant,
        data: Batch,
        contract: Contract,
        number: int,
        begun: Layers,
        connecting: Connecting,
    ) -> None:
        self.attempt = begun.attempt
        self._participant, self._contract, self._number, self._begun = participant, contract, number, begun
        self._on_step = connecting.on_step
        self._batches = round_batches(
            data,
            contract.training,
            seed=contract.rounds.seed,
            round_index=begun.round,
            participant=number,
        )
        self._steps, self._done = contract.terms.steps(len(data)), 0
        self._pending: Again | Step | None = None

    def go_on(self, conversation: Conversation) -> None:
        """Do the steps that are left, and hand in the first layers. Raises Lost, and can be called again."""
        while self._done < self._steps:
            if self._pending is None:
                self._pending = self._next()
            answer = conversation.ask(self._pending, Answer)
            if (answer.round, answer.step) != (self._begun.round, self._done):
                raise StreamError(f"the answer to step {answer.step} came where step {self._done} was asked")
            self._participant.receive(answer.pieces)
            self._pending = None
            self._done += 1
            self._on_step(self._begun.round, self._done, self._steps, answer.loss)
        layers = layers_message(state_of(self._participant.part))
        conversation.ask(Finish(self._begun.round, layers), Thanks)

    def _next(self) -> Again | Step:
        """The first layers run on the next mini-batch; one that was answered before need not travel again."""
        step, round_index = self._done, self._begun.round
        batch = next(self._batches)
        message = self._participant.send(
            batch, draw_of(self._contract.rounds.seed, round_index, self._number, step)
        )
        if step < self._begun.answered:
            return Again(round_index, step)
        targets = batch.targets.contiguous().numpy().astype(np.dtype("<i8")).tobytes()
        return Step(round_index, step, message, targets)
