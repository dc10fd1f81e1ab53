"""Tasks and updates as bytes: JSON for what is small, safetensors for the tensors. Nothing is pickled."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import accumulate, pairwise
from multiprocessing.connection import Connection
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from msfusion.errors import PrivacyError
from msfusion.federated.conversation import Request, Response
from msfusion.federated.method import Kind, Released, Task, Update
from msfusion.federated.privacy import Shared
from msfusion.federated.states import labelled, part
from msfusion.width.groups import State

Header = dict[str, Any]

HEADER = "header"
"""The name, among the flat tensors, of the one that holds the header's bytes; no type is called so."""


def encode(header: Mapping[str, Any], tensors: State) -> bytes:
    """A message as bytes: the tensors end to end, one flat tensor per type, and the header beside them.

    A few large tensors are packed several times faster than many small ones.
    """
    flat: dict[str, list[Tensor]] = {}
    for tensor in tensors.values():
        flat.setdefault(str(tensor.dtype), []).append(tensor.detach().reshape(-1))
    outline = [(name, str(tensor.dtype), tensor.shape) for name, tensor in tensors.items()]
    text = bytearray(json.dumps([header, outline]).encode())
    packed = {dtype: torch.cat(parts) for dtype, parts in flat.items()}
    return safetensors.torch.save({HEADER: torch.frombuffer(text, dtype=torch.uint8), **packed})


def decode(message: bytes) -> tuple[Header, dict[str, Tensor]]:
    """The opposite of `encode`. The tensors of one type are views of one flat tensor."""
    packed = safetensors.torch.load(message)
    header, outline = json.loads(packed.pop(HEADER).numpy().tobytes())
    sizes: dict[str, list[int]] = {}
    for _, dtype, shape in outline:
        sizes.setdefault(dtype, []).append(math.prod(shape))
    parts = {dtype: iter(torch.split(packed[dtype], lengths)) for dtype, lengths in sizes.items()}
    return header, {name: next(parts[dtype]).view(shape) for name, dtype, shape in outline}


def send(connection: Connection, message: bytes) -> None:
    """Write one message. Raises OSError where nobody reads any more."""
    connection.send_bytes(message)


def receive(connection: Connection) -> tuple[Header, dict[str, Tensor]]:
    """Read one message. Raises EOFError or OSError where nobody writes any more."""
    return decode(connection.recv_bytes())


def task_message(kind: Kind, task: Task, more: bool = False, converses: bool = False) -> bytes:
    """A task and what is to be done with it, but not the participant's memory, which no message to it has.

    With `more`, the next message is to be done together with it. With `converses`, the participant asks as it goes on.
    """
    header = {
        "kind": kind,
        "more": more,
        "converses": converses,
        "participant": task.participant,
        "round_index": task.round_index,
        "metadata": dict(task.metadata),
        "remembers": bool(task.memory),
    }
    return encode(header, task.tensors)


def task_of(header: Header, tensors: dict[str, Tensor], memory: State | None = None) -> Task:
    """The task in a `task_message`, with what the participant remembers."""
    return Task(header["participant"], header["round_index"], tensors, header["metadata"], memory or {})


def update_message(update: Released, seconds: float) -> bytes:
    """An update and the seconds that it took, without what the participant keeps.

    Raises PrivacyError where no declaration has let the update pass.
    """
    if not isinstance(update.tensors, Shared):
        raise PrivacyError(f"participant {update.participant} would send what no declaration has let pass")
    return encoded_update(update, seconds)


def encoded_update(update: Update, seconds: float, **more: Any) -> bytes:
    """The bytes of an update, wherever it is kept, with `more` in its header."""
    header = {
        "participant": update.participant,
        "round_index": update.round_index,
        "examples": update.examples,
        "loss": update.loss,
        "metadata": dict(update.metadata),
        "seconds": seconds,
        "remembers": bool(update.memory),
        **more,
    }
    return encode(header, update.tensors)


def update_of(header: Header, tensors: dict[str, Tensor]) -> tuple[Update, float, bool]:
    """The update in an `update_message`, its seconds, and whether there is something that the participant keeps."""
    seconds, remembers = header.pop("seconds"), header.pop("remembers")
    return Update(tensors=tensors, **header), seconds, remembers


def request_message(request: Request) -> bytes:
    """What a participant asks. Raises PrivacyError where no declaration has let it pass."""
    if not isinstance(request.tensors, Shared):
        raise PrivacyError("a participant would ask with what no declaration has let pass")
    return _piecewise("request", request)


def response_message(response: Response, **more: Any) -> bytes:
    """What the server answers, with `more` in its header."""
    return _piecewise("response", response, **more)


def request_of(header: Header, tensors: dict[str, Tensor]) -> Request:
    """The request in a `request_message`."""
    return Request(_pieces(header, tensors), part(tensors, "tensor"), header["metadata"])


def response_of(header: Header, tensors: dict[str, Tensor]) -> Response:
    """The response in a `response_message`."""
    return Response(_pieces(header, tensors), part(tensors, "tensor"), header["metadata"])


def _piecewise(said: str, message: Request | Response, **more: Any) -> bytes:
    """The pieces as one tensor of bytes beside the others, their lengths in the header."""
    lengths = [*map(len, message.pieces)]
    header = {"said": said, "metadata": dict(message.metadata), "pieces": lengths, **more}
    joined = bytearray(b"".join(message.pieces))
    pieces = {"pieces": torch.frombuffer(joined, dtype=torch.uint8)} if joined else {}
    return encode(header, {**pieces, **labelled("tensor", message.tensors)})


def _pieces(header: Header, tensors: dict[str, Tensor]) -> tuple[bytes, ...]:
    joined = tensors["pieces"].numpy().tobytes() if "pieces" in tensors else b""
    ends = [0, *accumulate(header["pieces"])]
    return tuple(joined[start:end] for start, end in pairwise(ends))
