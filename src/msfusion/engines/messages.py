"""Tasks and updates as bytes: JSON for what is small, safetensors for the tensors. Nothing is pickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any, Literal

import safetensors.torch
from torch import Tensor

from msfusion.methods.base import Task, Update
from msfusion.width.groups import State

Header = dict[str, Any]
Message = tuple[bytes, bytes]
Kind = Literal["train", "measure"]


def payload_bytes(tensors: State) -> int:
    """How many bytes the entries of some tensors take up: a message without its names and framing."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def encode(header: Mapping[str, Any], tensors: State) -> Message:
    """A message as bytes: header, tensors."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return json.dumps(header).encode(), safetensors.torch.save(contiguous)


def send(connection: Connection, message: Message) -> None:
    """Write one message. Raises OSError where nobody reads any more."""
    for part in message:
        connection.send_bytes(part)


def receive(connection: Connection) -> tuple[Header, dict[str, Tensor]]:
    """Read one message. Raises EOFError or OSError where nobody writes any more."""
    header: Header = json.loads(connection.recv_bytes())
    return header, safetensors.torch.load(connection.recv_bytes())


def task_message(kind: Kind, task: Task) -> Message:
    """A task and what is to be done with it."""
    header = {
        "kind": kind,
        "participant": task.participant,
        "round_index": task.round_index,
        "metadata": dict(task.metadata),
    }
    return encode(header, task.tensors)


def receive_task(connection: Connection) -> tuple[Kind, Task]:
    """Read a `task_message`."""
    header, tensors = receive(connection)
    return header["kind"], Task(header["participant"], header["round_index"], tensors, header["metadata"])


def update_message(update: Update, seconds: float) -> Message:
    """An update and the seconds that it took."""
    header = {
        "participant": update.participant,
        "round_index": update.round_index,
        "examples": update.examples,
        "loss": update.loss,
        "metadata": dict(update.metadata),
        "seconds": seconds,
    }
    return encode(header, update.tensors)


def update_of(header: Header, tensors: dict[str, Tensor]) -> tuple[Update, float]:
    """The update, and its seconds, in an `update_message`."""
    seconds = header.pop("seconds")
    return Update(tensors=tensors, **header), seconds
