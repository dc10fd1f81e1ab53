"""Flower's grid in one process: a node answers a message as soon as it is looked for, through Flower's own bytes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from msfusion.batch import Batch
from msfusion.engines.flower.nodes import Waiting
from msfusion.engines.flower.participant import Participant, respond
from msfusion.engines.flower.records import keep_in, kept_in, records_of, said_in
from msfusion.federated.method import Method

Answering = Callable[[Message, Context], Message]
"""What a ClientApp does."""

# messages are made as in a ServerApp's process, which knows its own number
TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1

AGREED: dict[str, Any] = {"model": "small"}

QUICK = Waiting(patience=5.0, deadline=5.0, look_every=0.001)


class Node:
    """A SuperNode: its --node-config, the ClientApp there, and the context that it keeps for that.

    `mute` says of how many messages no answer ever comes, `away` how often it is looked for before it is there again.
    """

    def __init__(self, app: Answering, config: Mapping[str, Any] | None = None) -> None:
        self.app, self.config, self.state = app, dict(config or {}), RecordDict()
        self.mute, self.away = 0, 0

    def answer(self, message: Message) -> Message:
        context = Context(1, message.metadata.dst_node_id, self.config, self.state, {})
        answer = self.app(message, context)
        self.state = context.state
        return answer


class FakeGrid(Grid):
    """Nodes by their numbers. `told` are all messages that reached a node, with what it answered."""

    def __init__(self, nodes: Mapping[int, Node]) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = (
            1,
            1,
            1,
        )  # as in a ServerApp's process
        self.nodes, self.told = dict(nodes), list[tuple[Message, Message]]()
        self.before: Callable[[Message], None] = lambda _: None
        self._out: dict[str, Message] = {}
        self._numbers = itertools.count()

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any: ...

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=number) for number in self.get_node_ids()]

    def get_node_ids(self) -> Iterable[int]:
        for node in self.nodes.values():
            node.away -= node.away > 0
        return [number for number, node in self.nodes.items() if not node.away]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        for message in messages:  # Flower's own, in a deployment, goes through them twice
            assert message.has_content()
        numbers = []
        for message in messages:
            number = f"message-{next(self._numbers)}"
            message.metadata.__dict__["_message_id"] = number
            self._out[number] = through_bytes(message)
            numbers.append(number)
        return numbers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for number in sorted(message_ids):
            if number not in self._out:
                continue
            message = self._out[number]
            self.before(message)
            node = self.nodes.get(message.metadata.dst_node_id)
            if node is None or node.away:
                replies.append(Message(Error(5, "Node Unavailable"), reply_to=self._out.pop(number)))
            elif node.mute:
                node.mute -= 1
                del self._out[number]
            else:
                reply = through_bytes(node.answer(self._out.pop(number)))
                self.told.append((message, reply))
                replies.append(reply)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(list(self.push_messages(messages)))


def through_bytes(message: Message) -> Message:
    return message_from_proto(message_to_proto(message))


def participant(method: Callable[[], Method], number: int, data: Batch, **more: Any) -> Node:
    """A node that answers as a participant."""
    present = Participant(number, data, AGREED, lambda _: method(), **more)

    def app(message: Message, context: Context) -> Message:
        kept = kept_in(context.state)
        answer = respond(*said_in(message.content), kept, lambda: present, lambda _: None)
        keep_in(context.state, kept)
        return Message(records_of(*answer), reply_to=message)

    return Node(app)
