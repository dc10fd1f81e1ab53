"""Where streams meet the round in training: one seat for each participant, one question at a time on it.

The desk is in the process of the streams, on their one thread, and has no tensors. What a participant asks waits on
its seat for the answer. Steps and first layers are passed on to the round, which is another process (`office`), one
thing of each participant at a time. The answers to steps are kept on the disk until the round is over, so that a
participant that comes back finds what it has missed.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from msfusion.engines.grpc.answers import Answers
from msfusion.engines.grpc.packing import check_agreement, pack
from msfusion.engines.stream.frames import Again, Begin, Finish, Hello, Layers, Over, Step, Thanks
from msfusion.engines.stream.terms import Terms
from msfusion.errors import StreamError

Asked = Begin | Again | Step | Finish
Evict = Callable[[StreamError], None]
"""Ends the stream that has a seat."""


@dataclass(eq=False)
class Question:
    """What a participant asked, also as it came, and where the answer is waited for."""

    asked: Asked
    data: bytes
    answered: asyncio.Future[bytes]

    def settle(self, result: bytes | StreamError) -> None:
        """Give the answer to whoever still waits for it."""
        if self.answered.done():  # its stream has ended
            return
        if isinstance(result, StreamError):
            self.answered.set_exception(result)
        else:
            self.answered.set_result(result)


@dataclass
class Seat:
    """A participant's place. `session` is that of the process which has it, None while nobody does.

    `with_round` is what the round has been given and has not answered yet: usually what is asked, but whoever
    asked it may have gone since.
    """

    answers: Answers
    session: bytes | None = None
    examples: int | None = None
    layers: bytes | None = None
    asked: Question | None = None
    with_round: Question | None = None
    finished: bool = False
    knows: bool = False  # that all rounds are done
    evict: Evict | None = None

    def settle(self, result: bytes | StreamError) -> None:
        """Answer what is asked here."""
        asked, self.asked = self.asked, None
        if asked is not None:
            asked.settle(result)


class Desk:
    """The seats of all participants; `tell` passes a call on to the round's side, `office.Office`."""

    def __init__(self, terms: Terms, tell: Callable[..., None], scratch: Path | None = None) -> None:
        self.terms, self._tell = terms, tell
        self._seats = [Seat(Answers(scratch)) for _ in range(terms.participants)]
        self._round, self._attempt = -1, b""
        self._counted = self._over = False
        self._closed: StreamError | None = None

    # What streams ask.

    def sit(self, hello: Hello, evict: Evict) -> bool:
        """Take the seat of a participant; whether it can go on where it was. Raises StreamError.

        A process that comes back on a new connection has its seat still: the old stream is ended.
        """
        self._check_open()
        self._check_hello(hello)
        seat = self._seats[hello.participant]
        if seat.evict is not None:
            seat.evict(StreamError("the participant has connected anew", "ABORTED"))
        seat.session, seat.examples, seat.evict = hello.session, hello.examples, evict
        seat.asked = None
        self._tell("came", hello.participant)
        self._count()
        return bool(self._attempt) and hello.attempt == self._attempt

    def _check_hello(self, hello: Hello) -> None:
        check_agreement(self.terms.agreement, hello.agreement)
        if hello.participant >= self.terms.participants:
            raise StreamError(
                f"there is no participant {hello.participant}: they are 0 to {self.terms.participants - 1}",
                "FAILED_PRECONDITION",
            )
        self.terms.check_examples(hello.participant, hello.examples)
        seat = self._seats[hello.participant]
        if seat.session is not None and seat.session != hello.session:
            raise StreamError(
                f"participant {hello.participant} is connected already: each number is for one participant; "
                "after a broken connection its seat is free again within a minute",
                "ALREADY_EXISTS",
            )
        if seat.examples not in (None, hello.examples):
            raise StreamError(
                f"participant {hello.participant} has {hello.examples} examples, and had {seat.examples} before",
                "FAILED_PRECONDITION",
            )

    def _count(self) -> None:
        """Once all are there, each has as many examples as it said, for good."""
        examples = [seat.examples for seat in self._seats]
        if not self._counted and None not in examples:
            self._counted = True
            self._tell("counted", examples)
            for participant in range(self.terms.participants):
                self._pass_on(participant)

    def goodbye(self, participant: int) -> None:
        """The participant knows that all rounds are done, if they are."""
        self._seats[participant].knows = self._over
        if all(seat.knows for seat in self._seats):
            self._tell("all_know")

    def leave(self, participant: int, evict: Evict) -> None:
        """The stream with this `evict` has ended: its seat is free, unless another stream has it by now."""
        seat = self._seats[participant]
        if seat.evict is evict:
            seat.session, seat.evict, seat.asked = None, None, None
            if not self._counted:  # whoever comes in its place may have other data
                seat.examples = None
            self._tell("left", participant, time.monotonic())

    def ask(self, participant: int, asked: Asked, data: bytes) -> asyncio.Future[bytes]:
        """The answer, once there is one; `data` is the question as it came.

        Raises StreamError for what may not be asked now.
        """
        self._check_open()
        seat = self._seats[participant]
        self._check(seat, asked)
        seat.asked = Question(asked, data, asyncio.get_running_loop().create_future())
        answered = seat.asked.answered
        self._settle(seat)
        self._pass_on(participant)
        return answered

    def _check(self, seat: Seat, asked: Asked) -> None:
        """StreamError where a question is not one of this moment."""
        if isinstance(asked, Begin):
            return
        assert seat.examples is not None
        if asked.round != self._round or seat.layers is None:
            raise StreamError(f"round {asked.round} is not in progress", "FAILED_PRECONDITION")
        steps, known = self.terms.steps(seat.examples), len(seat.answers)
        if isinstance(asked, Finish):
            if known < steps:
                raise StreamError(f"the round has {steps} steps, and ended after {known}")
        elif asked.step > known - isinstance(asked, Again) or asked.step >= steps:
            raise StreamError(f"step {asked.step} came where {known} of {steps} are done")

    def _settle(self, seat: Seat) -> None:
        """Answer what is asked on a seat, if the answer is there."""
        reply = None if seat.asked is None else self._reply(seat, seat.asked.asked)
        if reply is not None:
            seat.settle(reply)

    def _reply(self, seat: Seat, asked: Asked) -> bytes | None:
        if isinstance(asked, Begin):
            if self._over:
                return pack(Over(self.terms.rounds))
            if seat.layers is None or seat.finished:
                return None  # its turn has not come, or it waits for the next round
            return pack(Layers(self._round, self._attempt, len(seat.answers), seat.layers))
        if isinstance(asked, Finish):
            return pack(Thanks(self._round)) if seat.finished else None
        return seat.answers[asked.step] if asked.step < len(seat.answers) else None

    def _pass_on(self, participant: int) -> None:
        """Give the round what is asked, unless it still has something of this participant, or does not know yet
        how many examples each has.
        """
        seat = self._seats[participant]
        question = seat.asked
        if not self._counted or seat.with_round is not None or question is None:
            return
        if isinstance(question.asked, Step | Finish):
            seat.with_round = question
            self._tell("asked", participant, question.data)

    # What the round says.

    def open_round(self, round_index: int) -> None:
        """A round begins. Its participants get the first layers by `hand_out`."""
        self._round, self._attempt = round_index, os.urandom(16)
        for seat in self._seats:
            seat.layers, seat.finished = None, False
            seat.answers.clear()

    def hand_out(self, participant: int, layers: bytes) -> None:
        """The participant begins the round with these first layers."""
        self._seats[participant].layers = layers
        self._settle(self._seats[participant])

    def answer(self, participant: int, answer: bytes) -> None:
        """What a participant's step came to."""
        seat = self._seats[participant]
        seat.with_round = None
        seat.answers.append(answer)
        self._settle(seat)
        asyncio.get_running_loop().call_soon(seat.answers.save)  # after it has been sent

    def accept(self, participant: int) -> None:
        """A participant's first layers are good: it is done with the round."""
        seat = self._seats[participant]
        seat.with_round, seat.finished = None, True
        self._settle(seat)

    def refuse(self, participant: int, why: str, status: str) -> None:
        """What the round has of a participant is no good: its stream ends, and the round waits for another."""
        seat = self._seats[participant]
        refused, seat.with_round = seat.with_round, None
        if seat.asked is refused:
            seat.settle(StreamError(why, status))
        else:  # whoever asked that has gone, and this is another
            self._pass_on(participant)

    def leave_out(self, participant: int, why: str) -> None:
        """The round goes on without a participant, which may take part in the next."""
        seat = self._seats[participant]
        seat.with_round, seat.layers = None, None
        if seat.asked is not None and not isinstance(seat.asked.asked, Begin):
            seat.settle(StreamError(why))

    def say_over(self) -> None:
        """Tell all participants that the rounds are done."""
        self._over = True
        for seat in self._seats:
            self._settle(seat)

    def end(self, error: StreamError) -> None:
        """Whatever is asked from now on, this is the answer."""
        self._closed = error
        for seat in self._seats:
            seat.settle(error)

    def close(self) -> None:
        """Give back what the answers took."""
        for seat in self._seats:
            seat.answers.close()

    def _check_open(self) -> None:
        if self._closed is not None:
            raise self._closed
