"""Training that asks the server as it goes on: what a participant sends, what it is told, and who answers.

A method whose `train` is a generator converses:

    def train(self, task, data):                              where the participant is
        ...
        response = yield Request(tensors=...)                 as often as it likes
        ...
        return Update(...)

    class Mine(Conversation):                                 in the server, one object for each round
        def answer(self, turn):                               the requests of all that still go on, at once
            return [Response(...) for participant, request in turn]

An engine goes turn by turn: it takes a request of every participant that still goes on, in the order of the asks, has
all of them answered at once, and hands on the responses. So what the server does depends on the order of the asks
alone, never on who computes faster. A participant that fails, or whose request cannot be answered, is left out of the
round; the others go on.

Requests and responses can travel: bytes that a codec has made, tensors by name, and small metadata. What may leave in a
request is what `Method.outbound_request` declares.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from msfusion.errors import MsfusionError
from msfusion.federated.states import payload_bytes
from msfusion.width.groups import State

Scalar = float | int | str | bool


@dataclass(frozen=True)
class _Message:
    """`pieces` are bytes, as a codec makes them; `metadata` has JSON scalars."""

    pieces: tuple[bytes, ...] = ()
    tensors: State = field(default_factory=dict)
    metadata: Mapping[str, Scalar] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """The bytes of its pieces and of its tensors' entries; names, metadata and framing are not counted."""
        return sum(map(len, self.pieces)) + payload_bytes(self.tensors)


@dataclass(frozen=True)
class Request(_Message):
    """What a participant asks the server while it trains."""


@dataclass(frozen=True)
class Response(_Message):
    """What the server answers."""


Turn = Sequence[tuple[int, Request]]
"""The participants that still go on, each with its request, in the order of the asks."""


class Conversation(ABC):
    """The server's side of a round in which participants converse. `Method.conversation` makes one for each round.

    What the server learns in the round is kept here, never in the method.
    """

    one_by_one: bool = False
    """Whether each request of a turn may be answered by itself, in the order of the turn, without waiting for the
    others'.
    """

    def begin(self, examples: Mapping[int, int]) -> None:  # noqa: B027  # few need it
        """Before the first turn: how many examples each participant has, as was known when the run began."""

    @abstractmethod
    def answer(self, turn: Turn) -> Sequence[Response | MsfusionError]:
        """What each participant of a turn is told, in the order of the turn: it is up to the method whether the server
        takes a step for each request or one for all. An error is why a request cannot be answered: its participant
        is left out of the round.

        What is raised here is nobody's fault alone and ends the run.
        """

    def state(self) -> dict[str, Tensor]:
        """What the server has learned so far, as tensors of the global state: `fuse` finds them in its `state`."""
        return {}

    def figures(self) -> dict[str, float | int]:
        """Numbers of the round for its metrics, by names that stand in `Method.metrics`."""
        return {}
