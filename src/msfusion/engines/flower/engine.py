"""The engine of Flower: one message with a task to the node of each participant, and its update in the reply."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from flwr.app import Message
from flwr.serverapp import Grid

from msfusion.batch import Batch
from msfusion.engines.flower.frames import Done, Failed, Lost, Over, Work
from msfusion.engines.flower.nodes import GONE, Asked, Nodes, Waiting, told
from msfusion.engines.flower.post import Post
from msfusion.engines.flower.records import records_of, said_in
from msfusion.engines.grpc.messages import most_bytes, released_in, round_of
from msfusion.engines.grpc.packing import MOST_ENTRIES, Agreement, pack, unpack
from msfusion.engines.grpc.places import MOST_EXAMPLES
from msfusion.errors import MsfusionError, RunDirectoryError, StreamError, TrainingError
from msfusion.federated.compression import declared, keeps_something
from msfusion.federated.engine import Answer, Ask, Engine, answer_of
from msfusion.federated.messages import task_message
from msfusion.federated.method import Kind, Method, Released, Task
from msfusion.federated.privacy import Outbound
from msfusion.federated.states import payload_bytes
from msfusion.files import digest_of_json

MOST_TRIES = 3
"""How often a task is handed out at most while nodes go away with it."""

FAREWELL_SECONDS = 30.0
"""How long it may take to tell all participants that the rounds are done."""


@dataclass
class Owed:
    """A task, and what may come back for it. `number` is that of the message with which it is at its node."""

    task: Task
    message: bytes
    kept: int
    outbound: Outbound
    remembers: bool
    since: float = math.inf
    number: str | None = None
    node: int = 0
    tries: int = 0

    @property
    def source(self) -> str:
        """Whose task it is."""
        return f"participant {self.task.participant} in round {self.task.round_index + 1}"


class FlowerEngine(Engine):
    """Participants that are nodes of Flower, reached through the grid that a ServerApp is given.

    `examples` are how many each participant has, None where only it knows, and `agreement` is everything on which both
    sides must agree. `run` is a name of the run, the same when it goes on: participants keep apart what they keep in
    each. `rounds_kept` is how many rounds the run may go back when it is started again: participants keep
    for so long what they go on from. `most_examples` is the most that a participant may say that it has.
    """

    converses: ClassVar[bool] = False

    def __init__(
        self,
        grid: Grid,
        examples: Sequence[int | None],
        agreement: Agreement,
        waiting: Waiting | None = None,
        run: str = "",
        rounds_kept: int = 1,
        most_examples: int = MOST_EXAMPLES,
    ) -> None:
        self._waiting = waiting or Waiting()
        self._post: Post[object] = Post(grid)
        self._nodes = Nodes(self._post, examples, agreement, self._waiting, most_examples)
        self._agreement, self._rounds_kept = digest_of_json(agreement), rounds_kept
        self._run = digest_of_json(run)
        self._met: set[int] = set()  # who has had a task of this server

    def open(self, data: Sequence[Batch], test: Batch | None = None) -> None:
        """Wait for those who have not come yet, at most for their patience. Raises StreamError."""
        self._meet()

    def examples_of_all(self) -> list[int]:
        """How many examples each participant has, once all have come. Raises StreamError where one does not."""
        self._meet()
        for who, count in enumerate(self._nodes.examples):
            if count is None:
                raise self._nodes.why_missing(who)
        return [count or 0 for count in self._nodes.examples]

    def run(self, method: Method, asks: Sequence[Ask]) -> Iterator[Answer]:
        """Each participant gets its tasks one after the other; all work at the same time."""
        waiting: dict[int, deque[tuple[Kind, Task]]] = {}
        for ask in asks:
            for task in ask.tasks():
                waiting.setdefault(task.participant, deque()).append((ask.kind, task))
        owed = {each: _owed(method, *tasks.popleft()) for each, tasks in waiting.items()}
        while owed:
            self._nodes.look()
            self._hand_out(owed)
            ended = [*self._returned(owed)]
            answered = {participant for participant, _, _ in ended}
            ended += self._overdue({who: each for who, each in owed.items() if who not in answered})
            for participant, update, seconds in ended:
                done = owed.pop(participant)
                if waiting[participant]:
                    owed[participant] = _owed(method, *waiting[participant].popleft())
                crossed = payload_bytes(done.task.tensors), 0
                yield answer_of(participant, done.task.round_index, update, seconds, crossed)
            if owed and not ended:
                time.sleep(self._waiting.look_every)

    def say_over(self, rounds: int) -> None:
        """Tell all participants that are here that these rounds are done, and wait a moment until they know."""
        out = 0
        for who in range(len(self._nodes.examples)):
            node = self._nodes.node_of(who)
            if node is not None:
                content = records_of(pack(Over(self._run, rounds, who)))
                out += self._post.send(node, "query", content, FAREWELL_SECONDS, "", Over) is not None
        end = time.monotonic() + FAREWELL_SECONDS
        while out and time.monotonic() < end:
            out -= sum(each.tag is Over for each in self._post.replies())
            time.sleep(self._waiting.look_every)

    def _meet(self) -> None:
        """Wait until all have come, or their patience is over. Raises StreamError for nobody, or who does not fit."""
        while waited_for := self._nodes.awaited:
            self._nodes.look()
            for came in self._post.replies():
                if isinstance(came.tag, Asked):
                    self._nodes.heard(came.tag.node, came.message)
            until = self._nodes.until(waited_for[0])
            if until is not None and time.monotonic() > until:
                self._waiting.on_event(str(self._nodes.why_missing(waited_for[0])))
                break
            time.sleep(self._waiting.look_every)
        self._nodes.begin()

    def _hand_out(self, owed: Mapping[int, Owed]) -> None:
        """To those who are here, and have not got their task yet."""
        for participant, each in owed.items():
            node = self._nodes.node_of(participant)
            if each.number is not None or node is None:
                continue
            self._hand_to(node, each)

    def _hand_to(self, node: int, owed: Owed) -> None:
        who = owed.task.participant
        examples = self._nodes.examples
        everybodys = [count or 0 for count in examples] if len(examples) <= MOST_ENTRIES else []
        kept, count = owed.kept, examples[who] or 0
        work = Work(self._run, who, kept, self._rounds_kept, count, everybodys, self._agreement)
        content, round_ = records_of(pack(work), owed.message), str(owed.task.round_index + 1)
        owed.node, owed.tries = node, owed.tries + 1
        owed.since = min(owed.since, time.monotonic())
        owed.number = self._post.send(node, "train", content, self._waiting.deadline, round_, who)
        if owed.number is None:
            self._nodes.lost(node)

    def _returned(self, owed: Mapping[int, Owed]) -> Iterator[tuple[int, Released | MsfusionError, float]]:
        """Who has answered, what, and the seconds that it took. Raises RunDirectoryError."""
        for came in self._post.replies():
            if isinstance(came.tag, Asked):
                self._nodes.heard(came.tag.node, came.message)
            elif isinstance(came.tag, int):
                done = owed[came.tag]
                done.number = None
                answer = self._answer(done, came.message)
                if answer is not None:
                    self._met.add(came.tag)
                    yield came.tag, *answer

    def _answer(self, owed: Owed, reply: Message) -> tuple[Released | MsfusionError, float] | None:
        """What came back for a task, looked at; None where its node has gone away with it."""
        seconds = time.monotonic() - owed.since
        if reply.has_error():
            code, why = reply.error.code, told(reply.error.code, reply.error.reason)
            if code in GONE and owed.tries < MOST_TRIES:
                self._waiting.on_event(f"{owed.source} has lost its task ({why}); it gets it again")
                self._nodes.lost(owed.node)
                return None
            return TrainingError(f"{owed.source} did not answer ({why})"), seconds
        try:
            return self._update(owed, reply)
        except RunDirectoryError:
            raise
        except MsfusionError as error:
            return error, seconds

    def _update(self, owed: Owed, reply: Message) -> tuple[Released, float]:
        """The update in a reply. Raises MsfusionError; RunDirectoryError for what ends the run."""
        frame, body = said_in(reply.content)
        said = unpack(frame, Done, Failed, Lost)
        if isinstance(said, Failed):
            raise TrainingError(f"{owed.source} failed: why is told in the log of its SuperNode")
        if isinstance(said, Lost):
            why = (
                f"participant {owed.task.participant} has lost what it kept in round {owed.kept}: start its SuperNode "
                "with the folder 'keep' of its --node-config that it had, and the server with the out that it had, in "
                "the same place; without 'keep', begin anew with another out"
            )
            # at the beginning somebody can still mend it; later the others go on
            resumed = owed.kept > 0 and owed.task.participant not in self._met
            raise RunDirectoryError(why) if resumed else TrainingError(why)
        if len(body) > most_bytes(owed.outbound):
            raise StreamError(f"{owed.source} has sent {len(body)} bytes, which no update of it has")
        who, round_index = owed.task.participant, owed.task.round_index
        return released_in(body, owed.outbound, who, round_index, owed.remembers)

    def _overdue(self, owed: Mapping[int, Owed]) -> Iterator[tuple[int, MsfusionError, float]]:
        """Who is not waited for any more in this round. Raises StreamError where nobody has ever come."""
        now = time.monotonic()
        for participant, each in owed.items():
            deadline, until = each.since + self._waiting.deadline, self._nodes.until(participant)
            error: MsfusionError
            if now > deadline:
                if each.number is not None:
                    self._post.forget(each.number)
                error = StreamError(
                    f"participant {participant} has had its task for {self._waiting.deadline:g} seconds",
                    "DEADLINE_EXCEEDED",
                )
            elif each.number is None and until is not None and now > until:
                error = self._nodes.why_missing(participant)
            else:
                continue
            yield participant, error, max(0.0, now - each.since)


def _owed(method: Method, kind: Kind, task: Task) -> Owed:
    """A task that is to be handed out. What it is to go on from is on its machine; the server has a receipt."""
    outbound = declared(method, kind, task)
    return Owed(task, task_message(kind, task), round_of(task.memory), outbound, keeps_something(method))
