"""Which of Flower's nodes is which participant: they are asked when they come, and looked for when they have gone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flwr.app import Message

from msfusion.engines.flower.frames import FORMAT, Here, Meet, Unfit
from msfusion.engines.flower.post import Post
from msfusion.engines.flower.records import records_of, said_in
from msfusion.engines.grpc.listening import seconds_of
from msfusion.engines.grpc.packing import Agreement, check_agreement, pack, unpack
from msfusion.engines.grpc.places import MOST_EXAMPLES
from msfusion.errors import MsfusionError, StreamError
from msfusion.quoting import MOST_OF_A_WORD, short
from msfusion.setting import check

LOOK_SECONDS = 1.0
"""How often it is asked which nodes are connected."""

MOST_ASKED = 3
"""How often a node is asked at most who it is while Flower says that it could not answer, as where a process died."""

START = "start its SuperNode, with --node-config 'partition-id={}'"
"""What is to be done about a participant that has not come."""


@dataclass(frozen=True)
class Waiting:
    """How patient a server is. Raises ConfigError for impossible values.

    A participant that takes longer than `deadline` seconds for its task is not waited for in this round, nor is one
    that has not come, or has been away, for `patience` seconds, in this round and in those after it, until it comes.
    `look_every` is how often replies are looked for. `on_event` is told what happens to nodes.
    """

    patience: float = seconds_of(600.0, "for which somebody who is away is waited for")
    deadline: float = seconds_of(3600.0, "which a participant may take")
    look_every: float = seconds_of(0.25, "after which replies are looked for again")
    on_event: Callable[[str], None] = lambda _: None

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Asked:
    """A node was asked who it is."""

    node: int


class Nodes:
    """The nodes of all participants. `examples` are how many each has, None where only it knows and has not come.

    While the run has not begun, a node that differs in what must be agreed on ends it; later it is let be.
    """

    def __init__(
        self,
        post: Post[object],
        examples: Sequence[int | None],
        agreement: Agreement,
        waiting: Waiting,
        most_examples: int = MOST_EXAMPLES,
    ) -> None:
        self.examples = list(examples)
        self._post, self._agreement, self._waiting, self._most = post, agreement, waiting, most_examples
        self._nodes: dict[int, int] = {}  # by participant
        self._connected: set[int] = set()
        self._known: set[int] = set()  # who has been asked since it came
        self._failed: dict[int, int] = {}  # how often a node could not answer
        self._later: dict[int, tuple[int, Here]] = {}  # who has come for a number that another node has
        self._away = dict.fromkeys(range(len(examples)), time.monotonic())  # since when
        self._unseen = set(self._away)
        self._next_look = 0.0
        self._begun = False

    @property
    def awaited(self) -> list[int]:
        """Who has not come yet."""
        return sorted(self._unseen)

    def node_of(self, participant: int) -> int | None:
        """Its node, if that is connected."""
        return None if participant in self._away else self._nodes[participant]

    def until(self, participant: int) -> float | None:
        """When a participant that is away is no longer waited for; None while it is here."""
        since = self._away.get(participant)
        return None if since is None else since + self._waiting.patience

    def why_missing(self, participant: int) -> StreamError:
        """Of one that has been waited for. Raises StreamError where nobody has ever come."""
        patience = f"{self._waiting.patience:g} seconds"
        if len(self._unseen) == len(self.examples):
            raise StreamError(
                f"no participant has come for {patience}: start SuperNodes, each with its number, as in --node-config "
                "'partition-id=0'",
                "UNAVAILABLE",
            )
        if participant in self._unseen:
            start = START.format(participant)
            return StreamError(
                f"participant {participant} has not come for {patience}: {start}", "UNAVAILABLE"
            )
        return StreamError(f"participant {participant} has been away for {patience}", "UNAVAILABLE")

    def begin(self) -> None:
        """From now on, whoever comes and does not fit is let be."""
        self._begun = True

    def look(self) -> None:
        """See who is connected, and ask those who are new. Raises StreamError as `heard` does."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + LOOK_SECONDS
        self._connected = self._post.nodes()
        for node in self._known - self._connected:
            self.lost(node)
        for participant, (node, here) in list(self._later.items()):
            if self._nodes.get(participant) not in self._connected:
                del self._later[participant]
                self._take(node, here)
        for node in sorted(self._connected - self._known):
            self._known.add(node)
            seconds = self._waiting.patience
            if (
                self._post.send(node, "query", records_of(pack(Meet(FORMAT))), seconds, "0", Asked(node))
                is None
            ):
                self._known.discard(node)  # it is asked again at the next look

    def lost(self, node: int) -> None:
        """A node does not answer any more: if it is connected still, or again, it is asked anew."""
        self._known.discard(node)
        self._failed.pop(node, None)
        self._later = {who: each for who, each in self._later.items() if each[0] != node}
        for participant, its in self._nodes.items():
            if its == node and participant not in self._away:
                self._away[participant] = time.monotonic()
                self._waiting.on_event(f"participant {participant} has gone (node {node})")

    def heard(self, node: int, reply: Message) -> None:
        """What a node says it is. Raises StreamError where that does not fit, while the run has not begun."""
        if reply.has_error():
            self._has_failed(node, reply.error.code, told(reply.error.code, reply.error.reason))
            return
        try:
            here: Here | Unfit = unpack(said_in(reply.content)[0], Here, Unfit)
            if not isinstance(here, Unfit):
                self._take(node, here)
            elif here.spare:
                self._waiting.on_event(f"node {node} is let be: {in_a_line(here.why)}")
            else:
                raise StreamError(in_a_line(here.why))
        except MsfusionError as error:
            self._does_not_fit(node, error)

    def _has_failed(self, node: int, code: int, why: str) -> None:
        """Flower says that a node could not answer who it is. Raises StreamError as `heard`, where it never can."""
        self._waiting.on_event(f"node {node} could not be asked who it is ({why})")
        if code in GONE:
            self.lost(node)
            return
        self._failed[node] = self._failed.get(node, 0) + 1
        if self._failed[node] < MOST_ASKED:
            self._known.discard(node)  # it is asked again at the next look
        else:
            self._does_not_fit(node, StreamError(f"{why}; more is told in the log of its SuperNode"))

    def _does_not_fit(self, node: int, error: MsfusionError) -> None:
        """Raises StreamError while the run has not begun; later it is told, and the node is let be."""
        sentence = f"node {node} cannot take part: {error}"
        if not self._begun:
            raise StreamError(sentence, "FAILED_PRECONDITION") from error
        self._waiting.on_event(sentence)

    def _take(self, node: int, here: Here) -> None:
        """A node is a participant's from now on. Raises StreamError."""
        check_agreement({"version of the messages": FORMAT}, {"version of the messages": here.format})
        participant = here.participant
        if participant >= len(self.examples):
            raise StreamError(
                f"there is no participant {participant}: they are 0 to {len(self.examples) - 1}"
            )
        check_agreement(self._agreement, here.agreement)
        self._check_examples(here)
        before = self._nodes.get(participant)
        if before is not None and before != node and before in self._connected:
            if not self._begun:
                raise StreamError(
                    f"it is participant {participant}, and so is node {before}: give each SuperNode a number of its "
                    "own, as in --node-config 'partition-id=0'"
                )
            self._later[participant] = node, here
            return
        self.examples[participant] = here.examples
        self._nodes[participant] = node
        self._away.pop(participant, None)
        self._unseen.discard(participant)
        self._waiting.on_event(f"participant {participant} has come (node {node}, {here.examples} examples)")

    def _check_examples(self, here: Here) -> None:
        known = self.examples[here.participant]
        if known is None and not 0 < here.examples <= self._most:
            raise StreamError(
                f"participant {here.participant} has {here.examples} examples: it must be from 1 to {self._most} "
                "(participants.max_examples)"
            )
        if known is not None and known != here.examples:
            raise StreamError(
                f"participant {here.participant} has {here.examples} examples, and for the server {known}: both need "
                "the same [data], and data of one's own stay the same for the whole run"
            )


GONE = (3, 4, 5)
"""Flower's errors of a message that was lost, or of a node that went away; it may be sent again."""


def told(code: int, reason: str | None) -> str:
    """An error reply in words, which may be anybody's."""
    return f"Flower's error {code}" + (f": {in_a_line(reason)}" if reason else "")


def in_a_line(text: str) -> str:
    """What a node says, for a log: it begins no line of its own there, and commands no terminal."""
    return short(" ".join(text.split()), MOST_OF_A_WORD)
