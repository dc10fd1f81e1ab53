"""The engine of a network: participants are machines of their own, each with its data, and come over gRPC streams.

It hands out tasks as bytes and brings back updates, whatever the method. The streams have a thread of their own; tasks
are made, and updates read and checked, on the thread that runs the rounds.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, ClassVar

from msfusion.engines.grpc.clock import BEAT_SECONDS, Clock
from msfusion.engines.grpc.frames import PASSING
from msfusion.engines.grpc.listening import Listening
from msfusion.engines.grpc.messages import most_bytes, released_in, request_in, round_of
from msfusion.engines.grpc.packing import Agreement
from msfusion.engines.grpc.places import MOST_EXAMPLES, Job, Places
from msfusion.engines.grpc.service import Service
from msfusion.errors import MsfusionError, RunDirectoryError, StreamError, TrainingError
from msfusion.federated.compression import declared, keeps_something
from msfusion.federated.conversation import Response
from msfusion.federated.engine import Answer, Ask, Engine, answer_of, turn_by_turn
from msfusion.federated.messages import response_message, task_message
from msfusion.federated.method import Kind, Method, Task
from msfusion.federated.privacy import Outbound
from msfusion.federated.states import payload_bytes
from msfusion.federated.work import Finished, Said, Told

END_SECONDS = 10.0
"""How long the streams may take to end: they have two seconds to do so by themselves."""

LONGEST_WAIT = 5.0
"""For how long one look at what participants say may take; a deadline may be longer, or without end."""

FIRST_WORD, WORDS_APART = 10.0, 60.0
"""After how many seconds it is said who has not come yet, and how often who is waited for."""

MOST_NAMED = 20
"""How many of them are named."""

LARGEST_REQUEST = 2**28
"""The most bytes of a request in the middle of a task. Room is taken as bytes arrive."""


@dataclass(frozen=True)
class Owed:
    """A task that is with a participant, what may come back for it, and since when it is there."""

    job: Job
    participant: int
    round_index: int
    outbound: Outbound
    outbound_request: Outbound
    remembers: bool
    bytes_down: int
    since: float


class Network(Engine):
    """Participants that come over the network; to be used in a `with`, which ends all streams.

    `examples` are how many each participant has, None where only it knows (see `examples_of_all`), and `agreement` is
    everything on which both sides must agree. A participant that has been away for `listening.patience` seconds, or has
    a task for longer than `listening.deadline`, is left out of the round (or ends the run, as `Screening.bad_update`
    says); those that have not come yet have `listening.begin_after` seconds. `rounds_kept` is how many rounds the run
    may go back when it is started again: participants keep for so long what they go on from.
    `most_examples` is the most that a participant may say that it has.
    """

    converses: ClassVar[bool] = True

    def __init__(
        self,
        listening: Listening,
        examples: Sequence[int | None],
        agreement: Agreement,
        rounds_kept: int = 1,
        most_examples: int = MOST_EXAMPLES,
    ) -> None:
        self._listening, self._count = listening, len(examples)
        self._events: queue.SimpleQueue[tuple[str, float, tuple[Any, ...]]] = queue.SimpleQueue()
        self._clock = Clock()
        self._places = Places(
            list(examples),
            agreement,
            self._tell,
            listening.scratch,
            rounds_kept,
            most_examples,
        )
        self._examples = list(examples)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._away: dict[int, float] = {}  # since when
        self._unseen: set[int] = set()  # who has not come yet
        self._next_word = math.inf  # when it is said who is waited for
        self._sent, self._received = 0, 0  # bytes
        self._came: dict[bytes, float] = {}  # when somebody was first there for its task
        self._early: dict[int, tuple[str, bytes, Any]] = {}  # what somebody said that was not listened to
        self._all_know = False

    def __enter__(self) -> Network:
        """Listen. Raises StreamError where the address cannot be had."""
        self._thread.start()
        name, now, values = self._events.get()
        if name == "failed":
            self._thread.join()
            raise values[0]
        self._away = dict.fromkeys(range(self._count), now)
        self._unseen, self._next_word = set(self._away), now + FIRST_WORD
        self._listening.on_listening(values[0])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End all streams. Participants look for the server again, unless it would end in the same way again."""
        told = f": {error}" if isinstance(error, MsfusionError) else ""
        status = "UNAVAILABLE" if _may_pass(error) else "ABORTED"
        self._call(self._places.end, StreamError(f"the server has stopped{told}", status))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(END_SECONDS)

    def say_over(self, rounds: int) -> None:
        """Tell all participants that these rounds are done, and wait a moment for those that are not there."""
        self._call(self._places.say_over, rounds)
        end = time.monotonic() + self._listening.farewell
        while not self._all_know and (left := end - time.monotonic()) > 0:
            with suppress(queue.Empty):
                self._note(*self._events.get(timeout=left))

    def examples_of_all(self) -> list[int]:
        """How many examples each participant has, once all have come. Raises StreamError where one does not."""
        while unknown := [who for who, count in enumerate(self._examples) if count is None]:
            self._say_who_is_waited_for(unknown)
            if self._clock.now() - min(self._away.values(), default=math.inf) > self._listening.begin_after:
                raise StreamError(
                    f"participant {unknown[0]} has not come for {self._listening.begin_after:g} seconds, and only it "
                    "knows how many examples it has: start it, or leave it out of participants.count and data.own",
                    "UNAVAILABLE",
                )
            with suppress(queue.Empty):
                self._note(*self._events.get(timeout=BEAT_SECONDS))
        return [count or 0 for count in self._examples]

    def run(self, method: Method, asks: Sequence[Ask]) -> Iterator[Answer]:
        """Each participant gets its tasks one after the other; all work at the same time."""
        self._came.clear()
        self._early.clear()
        if not self._unseen:
            self._next_word = self._clock.now() + WORDS_APART
        if any(ask.conversation for ask in asks):
            yield from self._turn_by_turn(method, asks)
            return
        waiting: dict[int, deque[tuple[Kind, Task]]] = {}
        for ask in asks:
            for task in ask.tasks():
                waiting.setdefault(task.participant, deque()).append((ask.kind, task))
        owed = {each: self._hand_out(method, *tasks.popleft()) for each, tasks in waiting.items()}
        while owed:
            participant, said = self._next(owed)
            done = owed.pop(participant)
            if waiting[participant]:
                owed[participant] = self._hand_out(method, *waiting[participant].popleft())
            assert isinstance(said, Finished)  # it was asked outside of any conversation
            crossed = done.bytes_down, 0
            yield answer_of(participant, done.round_index, said.answer, said.seconds, crossed)

    def _turn_by_turn(self, method: Method, asks: Sequence[Ask]) -> Iterator[Answer]:
        """All go on side by side, and the server answers what they ask."""
        owed: dict[int, Owed] = {}
        refused: dict[int, MsfusionError] = {}

        def tell(who: int, word: Task | Told) -> None:
            if isinstance(word, Task):
                owed[who] = self._hand_out(method, "train", word, converses=True)
            elif isinstance(word, Response):
                response = response_message(word)
                self._sent += len(response)
                self._call(self._places.respond, who, response)
                owed[who] = replace(owed[who], since=self._clock.now())
            else:
                self._call(self._places.leave_unanswered, who, str(word))
                refused[who] = word

        def hear(among: Sequence[int]) -> tuple[int, Said]:
            for who in among:
                if who in refused:
                    return who, Finished(refused[who], self._seconds(owed[who]))
            return self._next({who: owed[who] for who in among})

        yield from turn_by_turn(asks, tell, hear)

    def _hand_out(self, method: Method, kind: Kind, task: Task, converses: bool = False) -> Owed:
        """Give a participant its task. What it is to go on from is on its machine; the server has a receipt."""
        message, kept = task_message(kind, task, converses=converses), round_of(task.memory)
        outbound, outbound_request = declared(method, kind, task), method.outbound_request(task)
        work = hashlib.sha256(message)
        work.update(str(kept).encode())
        job = Job(work.digest()[:16], message, kept, most_bytes(outbound), _most_of_request(outbound_request))
        self._call(self._places.give, task.participant, job)
        self._sent += len(message)
        down = payload_bytes(task.tensors)
        now = self._clock.now()
        may_leave = outbound, outbound_request, keeps_something(method)
        return Owed(job, task.participant, task.round_index, *may_leave, down, now)

    def _next(self, owed: Mapping[int, Owed]) -> tuple[int, Said]:
        """What one of these participants says next; or that it stays away, or takes too long.

        What others say is for when they are listened to: that one has failed while its request was being answered.
        """
        while True:
            for participant in owed.keys() & self._early.keys():
                name, work, what = self._early.pop(participant)
                if owed[participant].job.work == work:
                    return participant, self._heard(name, owed[participant], what)
            self._say_who_is_waited_for(owed)
            until, late = min((self._until(each, owed[each]), each) for each in owed)
            left = until - self._clock.now()
            waits = left > 0 or self._clock.interrupted
            seconds = min(max(left, BEAT_SECONDS), LONGEST_WAIT) if waits else 0.0
            try:
                name, when, values = self._events.get(timeout=seconds)
            except queue.Empty:
                if waits:
                    continue
                self._call(self._places.give, late, None)
                return late, self._missing(owed[late])
            self._note(name, when, values)
            if name in ("done", "said", "refused"):
                participant, work, what = values
                self._received += len(what) if isinstance(what, bytes) else 0
                self._early[participant] = name, work, what

    def _heard(self, name: str, owed: Owed, what: Any) -> Said:
        said = self._said(name, owed, what)
        if isinstance(said, Finished) and name == "said":  # what it asks cannot be used
            self._call(self._places.leave_unanswered, owed.participant, str(said.answer))
        return said

    def _until(self, participant: int, owed: Owed) -> float:
        """When a participant is no longer waited for."""
        where = self._listening
        if participant in self._away:
            return self._away[participant] + self._patience(participant)
        # whoever was away when its task was made has its time from when it comes, but only once
        came = self._came.setdefault(owed.job.work, self._clock.now())
        return max(came, owed.since) + where.deadline

    def _patience(self, participant: int) -> float:
        """For how many seconds a participant is waited for while it is away, in all rounds together."""
        return self._listening.begin_after if participant in self._unseen else self._listening.patience

    def _missing(self, owed: Owed) -> Finished:
        """Of a participant that is away, or takes too long. Raises StreamError where nobody has ever come."""
        who, patience = f"participant {owed.participant}", self._patience(owed.participant)
        if len(self._unseen) == self._count:
            raise StreamError(
                f"nobody has come for {patience:g} seconds: start the participants with 'msfusion join', and see that "
                f"they can reach {self._listening.address}",
                "UNAVAILABLE",
            )
        if owed.participant in self._unseen:
            error = StreamError(f"{who} has not come for {patience:g} seconds", "UNAVAILABLE")
        elif owed.participant in self._away:
            error = StreamError(f"{who} has been away for {patience:g} seconds", "UNAVAILABLE")
        else:
            deadline = self._listening.deadline
            error = StreamError(f"{who} has had its task for {deadline:g} seconds", "DEADLINE_EXCEEDED")
        return Finished(error, self._seconds(owed))

    def _seconds(self, owed: Owed) -> float:
        """For how long a task has been with its participant."""
        return self._clock.now() - owed.since

    def _say_who_is_waited_for(self, waited_for: Iterable[int]) -> None:
        """Now and then: who is awaited, and why it is not here yet; and what has crossed."""
        now = self._clock.now()
        if now < self._next_word:
            return
        self._next_word = now + WORDS_APART
        by_state: dict[str, list[int]] = {}
        for who in sorted(waited_for):
            by_state.setdefault(self._state(who), []).append(who)
        told = ", ".join(f"{_named(people)} ({state})" for state, people in by_state.items())
        here = self._count - len(self._away)
        crossed = f"{self._sent / 1e6:,.1f} MB sent, {self._received / 1e6:,.1f} MB received"
        self._listening.on_event(f"{here} of {self._count} are here; waiting for {told}; {crossed}")

    def _state(self, participant: int) -> str:
        if participant in self._unseen:
            return "not come yet"
        return "away" if participant in self._away else "at work"

    def _said(self, name: str, owed: Owed, what: Any) -> Said:
        """What a participant has sent for its task, looked at."""
        source = f"participant {owed.participant} in round {owed.round_index + 1}"
        try:
            if name == "refused":
                raise StreamError(what)
            if name == "said":
                return request_in(what, owed.outbound_request, source)
            if what is None:
                raise TrainingError(f"{source} failed: why is told on its own machine")
            update, seconds = released_in(
                what, owed.outbound, owed.participant, owed.round_index, owed.remembers
            )
        except MsfusionError as error:
            return Finished(error, self._seconds(owed))
        return Finished(update, seconds)

    def _note(self, name: str, when: float, values: tuple[Any, ...]) -> None:
        """What happens to connections."""
        if name == "came":
            self._away.pop(values[0], None)
            self._unseen.discard(values[0])
        elif name == "has":
            self._examples[values[0]] = values[1]
        elif name == "left":
            self._away[values[0]] = when
        elif name == "all_know":
            self._all_know = True
        elif name == "unwritable":
            error, where = values[0], self._listening.scratch or "the folder for temporary files"
            raise OSError(error.errno, f"{error.strerror} (for the answers of this round)", str(where))

    # The thread of the streams.

    def _tell(self, name: str, *values: Any) -> None:
        self._events.put((name, self._clock.now(), values))

    def _call(self, function: Callable[..., None], *values: Any) -> None:
        self._loop.call_soon_threadsafe(function, *values)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        service = Service(self._places, self._count, self._listening)
        beats = self._loop.create_task(self._clock.run())
        try:
            address = self._loop.run_until_complete(service.start())
        except StreamError as error:
            self._tell("failed", error)
        else:
            self._tell("listens", address)
            self._loop.run_forever()
            self._loop.run_until_complete(service.stop())
        finally:
            beats.cancel()
            self._places.close()
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()


def _named(participants: Sequence[int]) -> str:
    """Their numbers, or as many as can be read."""
    more = f" and {len(participants) - MOST_NAMED} more" if len(participants) > MOST_NAMED else ""
    return ", ".join(map(str, participants[:MOST_NAMED])) + more


def _may_pass(error: BaseException | None) -> bool:
    """Whether the run may go on when the server is started again, after an error that has ended it.

    A disk can be emptied, a server that was interrupted started again, and participants that were late or away come
    back. With a configuration that cannot be run, or in a training that diverges, it would end in the same way.
    """
    while isinstance(error, TrainingError) and error.__cause__ is not None:  # a round's error names its cause
        error = error.__cause__
    if isinstance(error, StreamError):
        return error.status in PASSING
    return isinstance(error, RunDirectoryError) or not isinstance(error, MsfusionError)


def _most_of_request(outbound: Outbound) -> int:
    known = outbound.most_bytes
    return LARGEST_REQUEST if known is None else known + most_bytes(replace(outbound, tensors={}))
