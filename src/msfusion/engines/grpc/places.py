"""Who is there, and what each is to do. All of it belongs to the one thread of the streams.

A participant that asks what to do waits in its place until there is something. What it sends for its work is handed
to the engine, on another thread. If it goes away in between, it finds the same work when it comes back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from msfusion.engines.grpc.frames import FORMAT, Hello
from msfusion.engines.grpc.packing import Agreement, check_agreement
from msfusion.engines.grpc.responses import Responses
from msfusion.errors import StreamError
from msfusion.files import OPENING_SECONDS, too_many_are_open

TOO_LATE = "nobody waits for this task any more"

MOST_EXAMPLES = 10**7
"""As many as a participant may say that it has, unless the server allows more: what it says is its weight."""

SAVE_AGAIN_SECONDS = 0.2
"""How soon a response is brought to the disk again for which no file could be opened."""

Evict = Callable[[StreamError], None]
"""Ends the stream that has a place."""


@dataclass(frozen=True)
class Job:
    """A task for a participant as bytes.

    `largest` and `largest_request` are the most bytes of an update and of a request that it may send for it.
    """

    work: bytes
    task: bytes
    kept: int
    largest: int
    largest_request: int = 0


@dataclass
class Place:
    """A participant's. `session` is that of the process which has it, None while nobody does.

    `examples` is how many it has, None where only it knows and it has not come yet.
    """

    examples: int | None
    responses: Responses
    session: bytes | None = None
    evict: Evict | None = None
    job: Job | None = None
    waiting: asyncio.Future[Job | None] | None = None
    asked: bool = False  # a request is with the engine
    listening: asyncio.Future[bytes | str] | None = None  # for its response, or why there is none
    knows: bool = False  # that all rounds are done


class Places:
    """The places of all participants. `tell` passes on to the engine what happens.

    `examples` are how many each has, None where only the participant knows, which says it when it comes.
    What participants were answered in the middle of a task is kept in a file in `scratch`, for those that begin it
    again. `rounds_kept` is how many rounds a server that is started again may go back, `most_examples` the most that
    a participant may say that it has.
    """

    def __init__(
        self,
        examples: Sequence[int | None],
        agreement: Agreement,
        tell: Callable[..., None],
        scratch: Path | None = None,
        rounds_kept: int = 1,
        most_examples: int = MOST_EXAMPLES,
    ) -> None:
        self.rounds, self.rounds_kept = 0, rounds_kept
        self._places = [Place(each, Responses(scratch)) for each in examples]
        self._agreement, self._tell, self._most_examples = agreement, tell, most_examples
        self._over = False
        self._all_known = asyncio.Event()
        self._note_examples()
        self._closed: StreamError | None = None

    # What streams ask.

    def take(self, hello: Hello, evict: Evict) -> None:
        """Take a participant's place. Raises StreamError for whoever may not.

        A process that comes back on a new connection has its place still: the old stream is ended.
        """
        self._check_open()
        self._check_hello(hello)
        place = self._places[hello.participant]
        if place.evict is not None:
            place.evict(StreamError("the participant has connected anew", "ABORTED"))
        place.session, place.evict, place.waiting, place.listening = hello.session, evict, None, None
        if not self._all_known.is_set():  # until then it may come again with other data
            place.examples = hello.examples
            self._tell("has", hello.participant, hello.examples)
            self._note_examples()
        self._tell("came", hello.participant)

    async def examples_of_all(self) -> list[int]:
        """How many examples everybody has, once all have said it. Raises StreamError where the server ends before."""
        await self._all_known.wait()
        self._check_open()
        return [place.examples or 0 for place in self._places]

    def _note_examples(self) -> None:
        if all(place.examples is not None for place in self._places):
            self._all_known.set()

    def _check_hello(self, hello: Hello) -> None:
        check_agreement({"version of the streams": FORMAT}, {"version of the streams": hello.format})
        count = len(self._places)
        if hello.participant >= count:
            raise StreamError(
                f"there is no participant {hello.participant}: they are 0 to {count - 1}",
                "FAILED_PRECONDITION",
            )
        check_agreement(self._agreement, hello.agreement)
        place = self._places[hello.participant]
        if not self._all_known.is_set() and not 0 < hello.examples <= self._most_examples:
            raise StreamError(
                f"participant {hello.participant} has {hello.examples} examples: it must be from 1 to "
                f"{self._most_examples} (participants.max_examples of the server)",
                "FAILED_PRECONDITION",
            )
        if self._all_known.is_set() and hello.examples != place.examples:
            raise StreamError(
                f"participant {hello.participant} has {hello.examples} examples, and for the server {place.examples}: "
                "both need the same [data], and data of one's own stay the same for the whole run",
                "FAILED_PRECONDITION",
            )
        if place.session is not None and place.session != hello.session:
            raise StreamError(
                f"participant {hello.participant} is connected already: each number is for one participant; "
                "after a broken connection its place is free again within a minute",
                "ALREADY_EXISTS",
            )

    def leave(self, participant: int, evict: Evict) -> None:
        """The stream with this `evict` has ended: its place is free, unless another stream has it by now."""
        place = self._places[participant]
        if place.evict is evict:
            place.session, place.evict, place.waiting, place.listening = None, None, None, None
            self._tell("left", participant)

    async def next(self, participant: int) -> Job | None:
        """What a participant is to do, once there is something; None when all rounds are done. Raises StreamError."""
        self._check_open()
        place = self._places[participant]
        if place.job is None and not self._over:
            place.waiting = asyncio.get_running_loop().create_future()
            return await place.waiting
        return place.job

    def job_of(self, participant: int, work: bytes) -> Job | None:
        """The job that a participant says it has done; None where nobody waits for it any more."""
        job = self._places[participant].job
        return job if job is not None and job.work == work else None

    def answered(self, participant: int) -> int:
        """How many requests of a participant's task have been answered."""
        return len(self._places[participant].responses)

    def wants(self, participant: int, step: int) -> bool:
        """Whether the request of a step is waited for, rather than here or answered. Raises StreamError for one out of
        turn.
        """
        place = self._places[participant]
        if step > len(place.responses):
            raise StreamError(f"step {step} came where {len(place.responses)} are done")
        return step == len(place.responses) and not place.asked

    def say(self, participant: int, work: bytes, request: bytes) -> None:
        """A request has come, in the middle of a task."""
        if self.job_of(participant, work) is not None:
            self._places[participant].asked = True
            self._tell("said", participant, work, request)

    async def response(self, participant: int, work: bytes, step: int) -> bytes | str:
        """What the request of a step was answered, once it is; or why it is not. Raises StreamError."""
        self._check_open()
        place = self._places[participant]
        if self.job_of(participant, work) is None:  # it was taken back while the request was on its way
            return TOO_LATE
        if step < len(place.responses):
            return place.responses[step]
        place.listening = asyncio.get_running_loop().create_future()
        return await place.listening

    def done(self, participant: int, work: bytes, update: bytes | None) -> None:
        """An update for a job has come, or word that the participant could not do it (None)."""
        if self.job_of(participant, work) is not None:
            self._places[participant].job = None
            self._tell("done", participant, work, update)

    def refuse(self, participant: int, work: bytes, error: StreamError) -> None:
        """What came for a job is no update: the round goes on without it."""
        if self.job_of(participant, work) is not None:
            self._places[participant].job = None
            self._tell("refused", participant, work, str(error))

    def goodbye(self, participant: int) -> None:
        """The participant knows that all rounds are done, if they are."""
        self._places[participant].knows = self._over
        if all(place.knows for place in self._places):
            self._tell("all_know")

    def knows(self, participant: int) -> bool:
        """Whether a participant has heard that all rounds are done."""
        return self._places[participant].knows

    # What the engine says.

    def give(self, participant: int, job: Job | None) -> None:
        """Something to do, in place of what there was; None takes it back."""
        place = self._places[participant]
        self._forget(place)
        place.job = job
        if job is not None:
            self._settle(place, job)

    def respond(self, participant: int, response: bytes) -> None:
        """What a participant's request was answered; kept until it has another task."""
        place = self._places[participant]
        place.asked = False
        place.responses.append(response)
        self._hear(place, response)
        loop = asyncio.get_running_loop()
        loop.call_soon(self._save, place, loop.time() + OPENING_SECONDS)  # after it has been sent

    def _save(self, place: Place, end: float) -> None:
        """Bring a response to the disk; `end` is until when it may be tried while too many files are open.

        Tells the engine where there is no room for it: participants could not hear it again.
        """
        loop = asyncio.get_running_loop()
        try:
            place.responses.save()
        except OSError as error:
            if too_many_are_open(error) and loop.time() < end:
                loop.call_later(SAVE_AGAIN_SECONDS, self._save, place, end)
            else:
                self._tell("unwritable", error)

    def leave_unanswered(self, participant: int, why: str) -> None:
        """A participant's request is not answered, and its task is over."""
        place = self._places[participant]
        place.job = None
        self._hear(place, why)
        self._forget(place)

    def say_over(self, rounds: int) -> None:
        """Tell all participants that the rounds are done."""
        self._over, self.rounds = True, rounds
        for place in self._places:
            place.job = None
            self._forget(place)
            self._settle(place, None)

    def end(self, error: StreamError) -> None:
        """Whatever is asked from now on, this is the answer."""
        self._closed = error
        self._all_known.set()
        for place in self._places:
            for future in (place.waiting, place.listening):
                if future is not None and not future.done():
                    future.set_exception(error)
            place.waiting = place.listening = None

    def close(self) -> None:
        """Give back what the answers took."""
        for place in self._places:
            place.responses.clear()

    def _forget(self, place: Place) -> None:
        """What belongs to a task that is over. Whoever still listens hears that nobody waits for it."""
        self._hear(place, TOO_LATE)
        place.asked = False
        if len(place.responses):
            place.responses.clear()

    def _hear(self, place: Place, response: bytes | str) -> None:
        if place.listening is not None and not place.listening.done():
            place.listening.set_result(response)
        place.listening = None

    def _settle(self, place: Place, job: Job | None) -> None:
        if place.waiting is not None and not place.waiting.done():
            place.waiting.set_result(job)
        place.waiting = None

    def _check_open(self) -> None:
        if self._closed is not None:
            raise self._closed
