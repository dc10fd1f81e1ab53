"""What is said on a stream between a participant and the server.

Up, from a participant, each but the last answered by one frame down:

    Hello     who I am and what I count on             Welcome
    HowMany   how many examples has everybody?         Examples
    Ready     what am I to do?                         Work and a task, or Over
    Done      I have done it                           Send, then an update up, then Thanks; or Thanks at once
    Failed    I could not do it                        Thanks
    Say       I ask this, in the middle of it          Send, then a request up, then Reply and a response, or
                                                       Unanswered; Reply at once to what was answered before
    Goodbye   I have heard that it is over             (the end of the stream)

A task or an update follows its frame as bytes, in pieces (`messages`).
"""

from __future__ import annotations

from dataclasses import dataclass

from msfusion.engines.grpc.packing import Agreement

METHOD = "/msfusion.Federation/TakePart"

FORMAT = 2
"""The version of the conversation: both sides must have the same."""

PASSING = ("UNAVAILABLE", "CANCELLED", "DEADLINE_EXCEEDED", "UNKNOWN", "INTERNAL")
"""How a stream ends that may be taken up again: the names of gRPC's statuses."""

LARGEST_HELLO = 2**17
"""The most bytes of a Hello: whoever says it is not known yet."""


@dataclass(frozen=True)
class Hello:
    """Who connects: its number, how many examples it has, and everything on which both must agree.

    `session` tells a process that has lost its connection from another that takes its number.
    """

    format: int
    participant: int
    session: bytes
    examples: int
    agreement: Agreement


@dataclass(frozen=True)
class HowMany:
    """How many examples has everybody? Asked where participants have data of their own, before anything else."""


@dataclass(frozen=True)
class Ready:
    """Ready for whatever is to be done next."""


@dataclass(frozen=True)
class Done:
    """A task is done; there is an update of `size` bytes. `work` says which task it was."""

    work: bytes
    size: int


@dataclass(frozen=True)
class Failed:
    """A task could not be done. Why is told on the participant's own machine: the reason may quote its data."""

    work: bytes


@dataclass(frozen=True)
class Say:
    """In the middle of a task, the participant asks something in a request of `size` bytes. Steps count from 0."""

    work: bytes
    step: int
    size: int


@dataclass(frozen=True)
class Goodbye:
    """All rounds are done, and the participant knows it: a stream that just ends may have been cut."""


@dataclass(frozen=True)
class Welcome:
    """The participant is known. `rounds_kept` is how many rounds the server may go back when it is started again."""

    rounds_kept: int


@dataclass(frozen=True)
class Examples:
    """How many examples each participant has. It is said when all have come."""

    counts: list[int]


@dataclass(frozen=True)
class Work:
    """Something to do; a task of `size` bytes follows.

    `work` is a digest of all that decides what comes of it: whoever has done the very same need not do it again.
    `kept` is the round, counted from 1, in which the participant kept what it is to go on from; 0 where it is nothing.
    `answered` is how many of its requests have been answered: all of them the server still has.
    """

    work: bytes
    size: int
    kept: int
    answered: int


@dataclass(frozen=True)
class Send:
    """The update, or the request, is waited for."""


@dataclass(frozen=True)
class Reply:
    """What a step's request was answered; a response of `size` bytes follows."""

    step: int
    size: int


@dataclass(frozen=True)
class Unanswered:
    """The request is not answered, and the task is over: why."""

    why: str


@dataclass(frozen=True)
class Thanks:
    """It has arrived, or nobody waits for it any more."""


@dataclass(frozen=True)
class Over:
    """All rounds are done."""

    rounds: int
