"""Where streams and the round in training meet: one seat for each participant, one question at a time on it.

Streams come and go on one thread, the round is trained on another. What a participant asks waits on its seat until
the round has the answer; the answers to steps are kept on the disk until the round is over, so that one that comes
back finds what it has missed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Condition

from torch import Tensor

from msfusion.engines.stream.answers import Answers
from msfusion.engines.stream.contract import Contract
from msfusion.engines.stream.frames import Again, Begin, Finish, Hello, Layers, Over, Step, Thanks, pack
from msfusion.errors import StreamError
from msfusion.methods.split import Request, draw_of

Asked = Begin | Again | Step | Finish
Answered = Future[bytes]
Evict = Callable[[StreamError], None]
"""Ends the stream that has a seat; called on the thread of the streams."""


@dataclass
class Seat:
    """A participant's place. `session` is that of the process which has it, None while nobody does."""

    answers: Answers
    session: bytes | None = None
    left: float = 0.0
    examples: int | None = None
    layers: bytes | None = None
    asked: tuple[Asked, Answered] | None = None
    request: Request | None = None
    finished: dict[str, Tensor] | None = None
    knows: bool = False  # that all rounds are done
    evict: Evict | None = None


class Desk:
    """The seats of all participants. Streams are all on one thread, and the round on another."""

    def __init__(self, contract: Contract, patience: float, scratch: Path | None = None) -> None:
        self.contract, self.patience = contract, patience
        now = time.monotonic()
        self._seats = [Seat(Answers(scratch), left=now) for _ in range(contract.participants)]
        self._changed = Condition()
        self._round, self._attempt = -1, b""
        self._counted = self._over = False
        self._closed: StreamError | None = None

    # What streams ask.

    def sit(self, hello: Hello, evict: Evict) -> bool:
        """Take the seat of a participant; whether it can go on where it was. Raises StreamError.

        A process that comes back on a new connection has its seat still: the old stream is ended.
        """
        self.contract.check_agreement(hello.agreement)
        if hello.participant >= self.contract.participants:
            raise StreamError(
                f"there is no participant {hello.participant}: they are 0 to {self.contract.participants - 1}",
                "FAILED_PRECONDITION",
            )
        if not self.contract.steps(hello.examples):
            raise StreamError("a participant needs examples", "FAILED_PRECONDITION")
        with self._changed:
            self._check_open()
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
            if seat.evict is not None:
                seat.evict(StreamError("the participant has connected anew", "ABORTED"))
            seat.session, seat.examples, seat.evict = hello.session, hello.examples, evict
            seat.asked, seat.request = None, None
            self._changed.notify_all()
            return bool(self._attempt) and hello.attempt == self._attempt

    def goodbye(self, participant: int) -> None:
        """The participant knows that all rounds are done, if they are."""
        with self._changed:
            self._seats[participant].knows = self._over
            self._changed.notify_all()

    def leave(self, participant: int, evict: Evict) -> None:
        """The stream with this `evict` has ended: its seat is free, unless another stream has it by now."""
        with self._changed:
            seat = self._seats[participant]
            if seat.evict is evict:
                seat.session, seat.evict, seat.left = None, None, time.monotonic()
                seat.asked, seat.request = None, None
                if not self._counted:  # whoever comes in its place may have other data
                    seat.examples = None
                self._changed.notify_all()

    def ask(self, participant: int, asked: Asked) -> Answered:
        """The answer, once there is one. Raises StreamError for what may not be asked now."""
        with self._changed:
            self._check_open()
            seat = self._seats[participant]
            answered: Answered = Future()
            self._check(seat, asked)
            if isinstance(asked, Step) and asked.step == len(seat.answers):
                seat.request = self._request(participant, seat, asked)
            if isinstance(asked, Finish) and seat.finished is None:
                seat.finished = self.contract.layers_of(asked.layers)
            seat.asked = (asked, answered)
            self._settle(seat)
            self._changed.notify_all()
            return answered

    def _check(self, seat: Seat, asked: Asked) -> None:
        """StreamError where a question is not one of this moment."""
        if isinstance(asked, Begin):
            return
        assert seat.examples is not None
        if asked.round != self._round or seat.layers is None:
            raise StreamError(f"round {asked.round} is not in progress", "FAILED_PRECONDITION")
        steps, known = self.contract.steps(seat.examples), len(seat.answers)
        if isinstance(asked, Finish):
            if known < steps:
                raise StreamError(f"the round has {steps} steps, and ended after {known}")
        elif asked.step > known - isinstance(asked, Again) or asked.step >= steps:
            raise StreamError(f"step {asked.step} came where {known} of {steps} are done")

    def _request(self, participant: int, seat: Seat, asked: Step) -> Request:
        """A mini-batch that has all the right sizes."""
        assert seat.examples is not None
        examples = self.contract.batch_size(seat.examples, asked.step)
        self.contract.check_message(asked.pieces, examples)
        targets = self.contract.targets_of(asked.targets, examples)
        draw = draw_of(self.contract.rounds.seed, self._round, participant, asked.step)
        return Request(asked.pieces, targets, draw)

    def _settle(self, seat: Seat) -> None:
        """Answer what is asked on a seat, if the answer is there."""
        if seat.asked is None:
            return
        asked, answered = seat.asked
        reply = self._reply(seat, asked)
        if reply is not None:
            seat.asked = None
            _settle(answered, reply)

    def _reply(self, seat: Seat, asked: Asked) -> bytes | None:
        if isinstance(asked, Begin):
            if self._over:
                return pack(Over(self.contract.rounds.rounds))
            if seat.layers is None or seat.finished is not None:
                return None  # its turn has not come, or it waits for the next round
            return pack(Layers(self._round, self._attempt, len(seat.answers), seat.layers))
        if isinstance(asked, Finish):
            return pack(Thanks(self._round))
        return seat.answers[asked.step] if asked.step < len(seat.answers) else None

    # What the round does.

    def open_round(self, round_index: int) -> None:
        """A round begins. Its participants get the first layers by `hand_out`."""
        with self._changed:
            self._round, self._attempt = round_index, os.urandom(16)
            for seat in self._seats:
                seat.layers, seat.finished, seat.request = None, None, None
                seat.answers.clear()

    def hand_out(self, participant: int, layers: bytes) -> None:
        """The participant begins the round with these first layers."""
        with self._changed:
            self._seats[participant].layers = layers
            self._settle(self._seats[participant])

    def examples(self) -> list[int]:
        """How many each has, from now on for good; waits for all. Raises StreamError as `request` does."""
        with self._changed:
            while not self._counted:
                for participant in range(len(self._seats)):
                    self._wait(participant, lambda seat: seat.examples is not None)
                self._counted = all(seat.examples is not None for seat in self._seats)
            return [seat.examples for seat in self._seats if seat.examples is not None]

    def request(self, participant: int, step: int) -> Request:
        """The mini-batch of a step, once it has come. Raises StreamError where the participant stays away."""
        with self._changed:
            seat = self._wait(participant, lambda seat: seat.request is not None)
            assert seat.request is not None
            assert len(seat.answers) == step
            return seat.request

    def answer(self, participant: int, answer: bytes) -> None:
        """What a participant's step came to."""
        with self._changed:
            seat = self._seats[participant]
            step, seat.request = len(seat.answers), None
            if seat.asked is not None and isinstance(seat.asked[0], Step) and seat.asked[0].step == step:
                _settle(seat.asked[1], answer)  # sent while it is being kept
                seat.asked = None
            seat.answers.append(answer)

    def refuse(self, participant: int, error: StreamError) -> None:
        """A participant's mini-batch was no good: its stream ends, and the step waits for another."""
        with self._changed:
            seat = self._seats[participant]
            seat.request = None
            if seat.asked is not None:
                _settle(seat.asked[1], error)
                seat.asked = None

    def finished(self, participant: int) -> dict[str, Tensor]:
        """A participant's first layers after the round. Raises StreamError as `request` does."""
        with self._changed:
            seat = self._wait(participant, lambda seat: seat.finished is not None)
            assert seat.finished is not None
            return seat.finished

    def say_over(self, seconds: float) -> None:
        """Tell all participants that the rounds are done; wait so long for those that are not there."""
        with self._changed:
            self._over = True
            for seat in self._seats:
                self._settle(seat)
            self._changed.wait_for(lambda: all(seat.knows for seat in self._seats), seconds)

    def close(self) -> None:
        """Give back what the answers took."""
        for seat in self._seats:
            seat.answers.close()

    def end(self, error: StreamError) -> None:
        """Whatever is asked from now on, this is the answer."""
        with self._changed:
            self._closed = error
            for seat in self._seats:
                if seat.asked is not None:
                    _settle(seat.asked[1], error)
                    seat.asked = None
            self._changed.notify_all()

    def _wait(self, participant: int, there: Callable[[Seat], bool]) -> Seat:
        """Wait at a participant's seat. Raises StreamError when nobody sat there for as long as patience lasts."""
        seat = self._seats[participant]
        while not there(seat):
            self._check_open()
            limit = None if seat.session is not None else seat.left + self.patience - time.monotonic()
            if limit is not None and limit <= 0:
                raise StreamError(
                    f"participant {participant} has been away for {self.patience:g} seconds; "
                    "the same command goes on from the last checkpoint",
                    "ABORTED",
                )
            self._changed.wait(limit)
        return seat

    def _check_open(self) -> None:
        if self._closed is not None:
            raise self._closed


def _settle(answered: Answered, result: bytes | StreamError) -> None:
    """Give an answer to whoever still waits for it."""
    if not answered.set_running_or_notify_cancel():
        return
    if isinstance(result, StreamError):
        answered.set_exception(result)
    else:
        answered.set_result(result)
