"""Messages to Flower's nodes, and the replies to them, as they come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

Tag = TypeVar("Tag")

MORE_SECONDS, MOST_SECONDS = 3600.0, 1e8
"""For how much longer than it is waited for Flower keeps a message, and for how long at most."""


@dataclass(frozen=True)
class Returned(Generic[Tag]):
    """A reply, and what was noted with the message that it replies to."""

    tag: Tag
    message: Message


class Post(Generic[Tag]):
    """A grid, and the messages that are with somebody. A reply to any other is let be."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._out: dict[str, Tag] = {}

    def nodes(self) -> set[int]:
        """The nodes that are connected, as far as the SuperLink knows: it misses a node that died within a minute."""
        return set(self._grid.get_node_ids())

    def send(
        self, node: int, kind: str, content: RecordDict, seconds: float, group: str, tag: Tag
    ) -> str | None:
        """Send a message that is waited for so many seconds; its number. None where the SuperLink does not take it."""
        message = Message(content, node, kind, ttl=min(seconds + MORE_SECONDS, MOST_SECONDS), group_id=group)
        numbers = list(self._grid.push_messages([message]))
        if len(numbers) != 1 or not numbers[0]:
            return None
        self._out[numbers[0]] = tag
        return numbers[0]

    def forget(self, number: str) -> None:
        """Nobody waits for the reply to this message any more."""
        self._out.pop(number, None)

    def replies(self) -> list[Returned[Tag]]:
        """What has come back since the last look."""
        if not self._out:
            return []
        came = []
        for message in self._grid.pull_messages(set(self._out)):
            number = message.metadata.reply_to_message_id
            if number in self._out:
                came.append(Returned(self._out.pop(number), message))
        return came
