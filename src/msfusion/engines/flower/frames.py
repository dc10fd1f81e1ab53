"""What server and participants say to each other, as msgpack with a fixed schema.

    Meet    who are you?                    Here, or Unfit
    Work    do this task                    Done and an update, or Failed, or Lost
    Over    all rounds are done             Thanks

A task or an update goes beside its frame, as bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from msfusion.engines.grpc.packing import Agreement, unpack
from msfusion.errors import MsfusionError, StreamError
from msfusion.imports import in_one_line

FORMAT = 2
"""The version of what is said: both sides must have the same."""

LARGEST_FRAME = 2**17
"""The most bytes of a frame."""


@dataclass(frozen=True)
class Meet:
    """Which participant are you, and what do you count on?"""

    format: int


@dataclass(frozen=True)
class Here:
    """A participant: its number, how many examples it has, and everything on which both sides must agree."""

    format: int
    participant: int
    examples: int
    agreement: Agreement


@dataclass(frozen=True)
class Unfit:
    """The node cannot take part: why, as far as that may be told. `spare`: there are enough others."""

    why: str
    spare: bool


@dataclass(frozen=True)
class Work:
    """Something to do; the task is the message's body.

    `kept` is the round, counted from 1, in which the participant kept what it is to go on from; 0 where it is nothing.
    `rounds_kept` is how many rounds the server may go back when it is started again. `examples` is how many the
    participant has said that it has, and `agreement` a digest of what was agreed on: where its data have changed since,
    it does nothing. `everybodys` are how many everybody has, where participants have data of their own. `run` is a
    digest of which of the server's runs this is: two of one configuration may be at work at the same time.
    """

    run: str
    participant: int
    kept: int
    rounds_kept: int
    examples: int
    everybodys: list[int]
    agreement: str


@dataclass(frozen=True)
class Done:
    """A task is done; the update is the message's body."""


@dataclass(frozen=True)
class Failed:
    """A task could not be done. Why is told on the participant's own machine: the reason may quote its data."""


@dataclass(frozen=True)
class Lost:
    """What the participant kept in this round is not there any more, so it cannot go on."""

    number: int


@dataclass(frozen=True)
class Over:
    """All rounds are done: nobody goes on from what was kept in this run."""

    run: str
    rounds: int
    participant: int


@dataclass(frozen=True)
class Thanks:
    """It is known."""


def excuse(
    frame: bytes, why: str = "why is told in the log of its SuperNode", *, spare: bool = False
) -> object:
    """What the server is told where a message cannot be answered: as an answer to what was asked."""
    try:
        unpack(frame, Meet)
    except StreamError:
        return Failed()
    return Unfit(why, spare)


def told_here(error: Exception) -> str:
    """An error in a sentence, for the log of the participant's own machine."""
    return str(error) if isinstance(error, MsfusionError) else f"{type(error).__name__}: {in_one_line(error)}"
