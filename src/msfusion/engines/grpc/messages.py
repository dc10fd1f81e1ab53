"""Tasks and updates as the streams carry them: in pieces, and read back without trusting whoever sent them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from safetensors import SafetensorError
from torch import Tensor

from msfusion.errors import StreamError
from msfusion.federated.conversation import Request, Response
from msfusion.federated.messages import Header, decode, request_of, response_of, task_of
from msfusion.federated.method import Kind, Released, Task, Update
from msfusion.federated.privacy import OpenForm, Outbound, check_figures
from msfusion.width.groups import State

PIECE = 2**20
"""The bytes of a piece: no gRPC message is much larger, whatever the model."""

LARGEST_FRAME = PIECE + 2**12

KINDS: tuple[Kind, ...] = ("train", "measure", "report")

_UPDATE = frozenset({"participant", "round_index", "examples", "loss", "metadata", "seconds", "remembers"})


def pieces_of(message: bytes) -> Iterator[bytes]:
    """A message in pieces; none of it is copied more than once."""
    view = memoryview(message)
    for begin in range(0, len(message), PIECE):
        yield bytes(view[begin : begin + PIECE])


class Gathering:
    """A message that comes in pieces, of a size that was said before. Room is taken as bytes arrive."""

    def __init__(self, size: int, most: int) -> None:
        """Raises StreamError where the size is more than such a message can have."""
        if size > most:
            raise StreamError(f"a message of {size} bytes was announced where {most} are the most")
        self._size, self._bytes = size, bytearray()

    @property
    def missing(self) -> int:
        """The bytes that are still to come."""
        return self._size - len(self._bytes)

    def add(self, piece: bytes) -> None:
        """The next piece. Raises StreamError for one that is empty, or too long."""
        if not 0 < len(piece) <= self.missing:
            raise StreamError(f"a piece of {len(piece)} bytes came where {self.missing} were missing")
        self._bytes += piece

    def message(self) -> bytes:
        """The whole message."""
        return bytes(self._bytes)


def read(message: bytes) -> tuple[Header, dict[str, Tensor]]:
    """The header and the tensors of a message of `federated.messages`, from whoever it comes.

    Raises StreamError for anything else. Tensors are views of the message, so nothing is allocated beyond its size.
    """
    try:
        header, tensors = decode(message)
    except (
        SafetensorError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        OverflowError,
        RecursionError,
        StopIteration,
    ) as error:
        raise StreamError("a message is damaged: it holds no tensors in the format of safetensors") from error
    if not isinstance(header, dict):
        raise StreamError("a message is damaged: its header is no table")
    return header, tensors


def update_in(
    message: bytes, outbound: Outbound, participant: int, round_index: int
) -> tuple[Update, float, bool]:
    """The update that a participant sent for a task, the seconds it took, and whether it keeps something.

    Whose it is and of which round is what the server knows, not what the message says. Raises StreamError for a
    message that is no update, PrivacyError where it holds what the method does not declare.
    """
    header, tensors = read(message)
    examples, loss, metadata, seconds = (
        header.get(each) for each in ("examples", "loss", "metadata", "seconds")
    )
    if (
        header.keys() != _UPDATE
        or not isinstance(seconds, float)
        or not 0 <= seconds < math.inf
        or not isinstance(header["remembers"], bool)
        or not isinstance(metadata, dict)
    ):
        raise StreamError("a message is damaged: it is no update")
    source = f"participant {participant} in round {round_index + 1}"
    check_figures(examples, loss, source)
    assert isinstance(examples, int)
    assert isinstance(loss, float)
    shared = outbound.select(tensors, metadata, source)
    update = Update(participant, round_index, shared, examples, loss, metadata)
    return update, seconds, header["remembers"]


def released_in(
    message: bytes, outbound: Outbound, participant: int, round_index: int, remembers: bool
) -> tuple[Released, float]:
    """The same, with a receipt for what the participant keeps; `remembers` says whether its method may keep anything.

    Raises as `update_in` does, and StreamError where it keeps something that there cannot be.
    """
    update, seconds, keeps = update_in(message, outbound, participant, round_index)
    if keeps and not remembers:
        raise StreamError(
            f"participant {participant} in round {round_index + 1} says that it keeps something, and its method has "
            "nothing to keep"
        )
    if keeps:
        update = replace(update, memory=receipt(round_index + 1))
    return Released(update), seconds


def task_in(message: bytes, participant: int) -> tuple[Kind, Task, bool]:
    """What the server handed out, and whether it answers what is asked in the middle of it.

    Raises StreamError where that is no task for this participant.
    """
    header, tensors = read(message)
    kind, metadata, converses = (header.get(each) for each in ("kind", "metadata", "converses"))
    if (
        kind not in KINDS
        or header.get("participant") != participant
        or not isinstance(header.get("round_index"), int)
        or not isinstance(metadata, dict)
        or not isinstance(converses, bool)
    ):
        raise StreamError("the server handed out what is no task for this participant")
    return kind, task_of(header, tensors), converses


def request_in(message: bytes, outbound: Outbound, source: str) -> Request:
    """The request that a participant sent; `source` says whose it is.

    Raises StreamError for a message that is none, PrivacyError where it holds what the method does not declare.
    """
    request = request_of(*_conversational(message, "request"))
    shared = outbound.select(request.tensors, request.metadata, source, request.pieces)
    return Request(request.pieces, shared, request.metadata)


def response_in(message: bytes) -> Response:
    """The response that the server sent. Raises StreamError for a message that is none."""
    return response_of(*_conversational(message, "response"))


def _conversational(message: bytes, said: str) -> tuple[Header, dict[str, Tensor]]:
    header, tensors = read(message)
    lengths, joined = header.get("pieces"), tensors.get("pieces")
    if (
        header.keys() != {"said", "metadata", "pieces"}
        or header["said"] != said
        or not isinstance(header["metadata"], dict)
        or not isinstance(lengths, list)
        or not all(isinstance(each, int) and each >= 0 for each in lengths)
        or sum(lengths) != (0 if joined is None else joined.nbytes)
        or (joined is not None and joined.dtype != torch.uint8)
    ):
        raise StreamError(f"a message is damaged: it is no {said}")
    return header, tensors


def most_bytes(outbound: Outbound) -> int:
    """The most bytes of an update that a method lets pass: its tensors, their names and shapes, and metadata."""
    tensors = sum(_bytes_of(form) for form in outbound.tensors.values())
    # in JSON a letter may take six bytes
    names = sum(len(name.encode()) * 6 + 256 for name in outbound.tensors)
    return tensors + (outbound.most_bytes or 0) + names + 256 * (len(outbound.metadata) + 1) + 2**16


def _bytes_of(form: OpenForm) -> int:
    dtype, shape = form
    return math.prod(length or 0 for length in shape) * int(dtype.itemsize)


RECEIPT = "kept in round"


def receipt(number: int) -> dict[str, Tensor]:
    """What stands in the server for what a participant keeps: the round in which it was kept, counted from 1."""
    return {RECEIPT: torch.tensor(number)}


def round_of(memory: State) -> int:
    """The round in a `receipt`; 0 where there is none."""
    return int(memory[RECEIPT]) if RECEIPT in memory else 0
