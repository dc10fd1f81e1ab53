"""What is said on a stream: msgpack maps with a fixed schema. Anything else is a StreamError; nothing is executed.

Up, from a participant, each but the last answered by one frame down:

    Hello     who I am and what I count on             Welcome
    Begin     I am ready for a round                   Layers, or Over
    Again     I lost the answer to a step              Answer
    Step      a mini-batch                             Answer
    Finish    the first layers after the round         Thanks
    Goodbye   I have heard that it is over             (the end of the stream)
"""

from __future__ import annotations

from dataclasses import dataclass

from msfusion.engines.grpc.packing import Agreement

FORMAT = 1
"""The version of the conversation: both sides must have the same."""

LARGEST_HELLO = 2**16
"""The most bytes of a Hello: whoever says it is not known yet."""

OVERHEAD = 2**12
"""The most bytes that a frame has besides those of its tensors."""


@dataclass(frozen=True)
class Hello:
    """Who connects: its number, how many examples it has, and everything on which both must agree.

    `session` tells a process that has lost its connection from another that takes its number; `attempt` is the
    round that it is in the middle of, if any.
    """

    format: int
    participant: int
    session: bytes
    examples: int
    attempt: bytes
    agreement: Agreement


@dataclass(frozen=True)
class Begin:
    """Ready for a round."""


@dataclass(frozen=True)
class Again:
    """Asks for the answer to a step that was answered before."""

    round: int
    step: int


@dataclass(frozen=True)
class Step:
    """A mini-batch: what the first layers made of it, and its targets (64 bit integers, little-endian)."""

    round: int
    step: int
    pieces: list[bytes]
    targets: bytes


@dataclass(frozen=True)
class Finish:
    """The first layers after the round's last step, as safetensors."""

    round: int
    layers: bytes


@dataclass(frozen=True)
class Goodbye:
    """All rounds are done, and the participant knows it: a stream that just ends may have been cut."""


@dataclass(frozen=True)
class Welcome:
    """Whether the round is still in progress in the middle of which the participant is."""

    resumes: bool


@dataclass(frozen=True)
class Layers:
    """A round begins: the first layers before it, and how many of this participant's steps were answered already.

    `attempt` is new whenever a round is begun, also for the second time.
    """

    round: int
    attempt: bytes
    answered: int
    layers: bytes


@dataclass(frozen=True)
class Answer:
    """The gradients of a step, and its loss."""

    round: int
    step: int
    pieces: list[bytes]
    loss: float


@dataclass(frozen=True)
class Thanks:
    """The first layers have arrived."""

    round: int


@dataclass(frozen=True)
class Over:
    """All rounds are done."""

    rounds: int


Up = Hello | Begin | Again | Step | Finish | Goodbye
Down = Welcome | Layers | Answer | Thanks | Over
