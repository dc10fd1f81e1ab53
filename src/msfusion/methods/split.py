"""Split learning with compressed traffic (Zhou et al., ECAI 2024, arXiv 2408.13787; SplitFed, Thapa et al., AAAI 2022).

A participant runs the first layers on its own data, a server the rest. For each mini-batch:

    participant:  z = first layers(x);  send encode(z), and the targets
    server:       z' = decode(...);  loss = cross-entropy(rest(z'), targets);  a step;  send encode(d loss / d z')
    participant:  g = decode(...);  back through the first layers with g in place of d loss / d z;  a step

The gradient goes past the codec as if it were the identity, as in the paper; or, with the `derivative` "true",
the server takes it back through the decoding, and only the gradients of the values that survived the encoding
travel. What crosses besides activations (masks, sizes) is sent as it is. Neither side executes what the other
sends: messages are tensors, by a codec or as safetensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import safetensors.torch
import torch
from jaxtyping import Int
from safetensors import SafetensorError
from torch import Tensor, nn

from msfusion.batch import Batch
from msfusion.codecs import Codec, Identity, Surviving, read_header, room_for
from msfusion.errors import CodecError, ConfigError, MsfusionError, TrainingError
from msfusion.methods.training import seed_of
from msfusion.objectives import mean_cross_entropy, scores
from msfusion.width.cut import ClientPart, ServerPart
from msfusion.width.halves import Crossing

Message = list[bytes]
"""One piece for each tensor that crosses."""

Derivative = Literal["identity", "true"]
"""What the codec of the activations counts as when gradients go back."""


@dataclass(frozen=True)
class Wire:
    """How what crosses becomes bytes: a codec for activations, one for gradients; the same on both sides.

    `max_elements` is the most that a tensor of a message may declare. Raises ConfigError where the `derivative`
    should be the true one and that of the activations' codec is of no use.
    """

    crossing: tuple[Crossing, ...]
    activations: Codec
    gradients: Codec
    max_elements: int = 2**28
    derivative: Derivative = "identity"

    def __post_init__(self) -> None:
        check_derivative(self.derivative, self.activations)

    def up(self, tensors: Sequence[Tensor]) -> Message:
        """What a participant sends for a mini-batch."""
        return [
            self.activations.encode(tensor) if each.gradient else plain(tensor)
            for each, tensor in zip(self.crossing, tensors, strict=True)
        ]

    def received(self, message: Message) -> list[Tensor]:
        """What the server makes of it: leaves that gather a gradient where one goes back.

        Raises CodecError for whatever a participant with the same model, cut and codec would not send.
        """
        self._check_count(message, len(self.crossing))
        return [self._received(each, piece) for each, piece in zip(self.crossing, message, strict=True)]

    def _received(self, each: Crossing, piece: bytes) -> Tensor:
        if not each.gradient:
            tensor = of_plain(piece, each.dtype, self.max_elements)
            _check_shape(each, tuple(tensor.shape), tensor.dtype)
            return tensor
        header, _ = read_header(piece, max_elements=self.max_elements)
        _check_shape(each, header.shape, header.dtype)  # before anything is allocated for it
        tensor = self.activations.decode(piece, max_elements=self.max_elements)
        if not self.activations.in_float32 and not bool(torch.isfinite(tensor).all()):
            raise CodecError("activations with NaN or infinities came; find out where they come from")
        return tensor.requires_grad_()

    def down(self, received: Sequence[Tensor], message: Message) -> Message:
        """What the server sends back: a gradient for each tensor that has one, as `message` brought it."""
        answer = []
        for tensor, sent in self._live(received, message):
            gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            if self._surviving is not None:
                gradient = self._surviving.pull_back(sent, gradient)
            answer.append(self.gradients.encode(gradient))
        return answer

    def gradients_for(
        self, tensors: Sequence[Tensor], message: Message, answer: Message
    ) -> list[tuple[Tensor, Tensor]]:
        """What the participant makes of the answer to its `message`: trained tensors, each with its gradient.

        Raises CodecError where a gradient has not as many elements as its tensor, or as survived of it.
        """
        live = self._live(tensors, message)
        self._check_count(answer, len(live))
        return [
            (tensor, self._gradient(tensor, sent, piece))
            for (tensor, sent), piece in zip(live, answer, strict=True)
        ]

    def _gradient(self, tensor: Tensor, sent: bytes, piece: bytes) -> Tensor:
        if self._surviving is None:
            return self._decoded(piece, tuple(tensor.shape), tensor.dtype)
        places = self._surviving.survivors(sent, max_elements=room_for(tensor.shape)).to(tensor.device)
        gradient = torch.zeros(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
        gradient[places] = self._decoded(piece, (len(places),), tensor.dtype).to(tensor.device)
        return gradient.view(tensor.shape)

    def _decoded(self, piece: bytes, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        gradient = self.gradients.decode(piece, max_elements=room_for(shape))
        if tuple(gradient.shape) != shape or gradient.dtype != dtype:
            raise CodecError(
                f"a gradient of {gradient.dtype} and shape {list(gradient.shape)} came back where {dtype} of "
                f"{list(shape)} was due: both sides must have the same model, cut and derivative"
            )
        return gradient

    @property
    def _surviving(self) -> Surviving | None:
        """The activations' codec where gradients go back through it and that makes a difference."""
        true = self.derivative == "true" and isinstance(self.activations, Surviving)
        return self.activations if true else None  # type: ignore[return-value]  # which was asked a line above

    def _live(self, tensors: Sequence[Tensor], message: Message) -> list[tuple[Tensor, bytes]]:
        """The tensors that gradients come back for, and how they were sent."""
        everything = zip(self.crossing, tensors, message, strict=True)
        return [(tensor, piece) for each, tensor, piece in everything if each.gradient]

    def _check_count(self, message: Message, wanted: int) -> None:
        if len(message) != wanted:
            raise CodecError(
                f"a message of {len(message)} tensors came where {wanted} cross: "
                "both sides must have the same model and cut"
            )


def check_derivative(derivative: Derivative, activations: Codec) -> None:
    """Raises ConfigError for an unknown derivative, and for the true one of a codec whose is zero everywhere."""
    if derivative not in ("identity", "true"):
        raise ConfigError(f"derivative is {derivative!r}: it must be one of identity, true")
    if derivative == "true" and not isinstance(activations, Surviving | Identity):
        raise ConfigError(
            f"derivative = 'true' has no meaning with activations by {activations.name}, whose derivative is zero "
            "almost everywhere: use 'identity', or mask_encoded, top_k or random_top_k"
        )


def _check_shape(each: Crossing, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """CodecError where a tensor cannot be the one that crosses here."""
    fits = len(shape) == len(each.shape) and all(
        fixed is None or length == fixed for length, fixed in zip(shape, each.shape, strict=True)
    )
    if not fits or dtype != each.dtype:
        wanted = ["any" if length is None else length for length in each.shape]
        raise CodecError(
            f"a tensor of {dtype} and shape {list(shape)} came where {each.dtype} of {wanted} crosses: "
            "both sides must have the same model and cut"
        )


@dataclass(frozen=True)
class Request:
    """A participant's mini-batch as the server gets it.

    `draw` seeds what is drawn for it (dropout), so that the result does not depend on where or when it is run.
    """

    message: Message
    targets: Int[Tensor, "..."]
    draw: int = 0


def draw_of(seed: int, round_index: int, participant: int, step: int) -> int:
    """The draw of a participant's mini-batch: both sides know it without sending it. Steps count from 0."""
    return seed_of(seed, round_index, participant, step)


class Participant:
    """The first layers in training, on a participant's machine."""

    def __init__(
        self,
        part: ClientPart,
        optimizer: torch.optim.Optimizer | None,
        wire: Wire,
        clip_norm: float | None = None,
    ) -> None:
        self.part, self.optimizer, self.wire, self.clip_norm = part, optimizer, wire, clip_norm
        self._sent: tuple[Tensor, ...] = ()
        self._message: Message = []

    def send(self, batch: Batch, draw: int = 0) -> Message:
        """Run the first layers on a mini-batch."""
        with _drawing(draw, 0):
            self._sent = batch.call(self.part)
        self._message = self.wire.up(self._sent)
        return self._message

    @property
    def plain_bytes(self) -> int:
        """Bytes of the activations that were sent last, without a codec."""
        pairs = zip(self.wire.crossing, self._sent, strict=True)
        return sum(tensor.nbytes for each, tensor in pairs if each.gradient)

    def receive(self, message: Message) -> None:
        """Finish the step with the gradients that came back. Raises CodecError."""
        pairs = self.wire.gradients_for(self._sent, self._message, message)
        self._sent, self._message = (), []
        if self.optimizer is None:  # nothing in the first layers trains
            return
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward([tensor for tensor, _ in pairs], [gradient for _, gradient in pairs])
        _clip(self.part.parameters(), self.clip_norm)
        self.optimizer.step()


class Server:
    """The rest of the model in training, for any number of participants."""

    def __init__(
        self,
        part: ServerPart,
        optimizer: torch.optim.Optimizer,
        wire: Wire,
        clip_norm: float | None = None,
    ) -> None:
        self.part, self.optimizer, self.wire, self.clip_norm = part, optimizer, wire, clip_norm

    def step(self, requests: Sequence[Request]) -> list[tuple[Message, float]]:
        """One step on one or several mini-batches: for each what goes back to its participant, and its loss.

        Of several, the loss is the mean over all their examples. Raises CodecError for a bad message and
        TrainingError for a loss or gradients that are not finite; then nothing has changed.
        """
        before = self._buffers()
        try:
            return self.update([self.forward(request) for request in requests])
        except MsfusionError:
            self._put_back(before)
            raise

    def forward(self, request: Request, received: Sequence[Tensor] | None = None) -> Forward:
        """The first half of a step: the loss of a mini-batch, whose message may have been `received` already.

        Raises as `step` does, and nothing has changed then.
        """
        before = self._buffers()
        try:
            received = self.wire.received(request.message) if received is None else received
            with _drawing(request.draw, 1):
                batch = Batch(tuple(received), request.targets)
                loss = mean_cross_entropy(*scores(self.part, batch))
            if not math.isfinite(float(loss.detach())):
                raise TrainingError("the loss on the server is not finite: lower the learning rate")
        except BaseException:
            self._put_back(before)
            raise
        return Forward(request.message, received, loss, len(request.targets), before)

    def update(self, forwards: Sequence[Forward]) -> list[tuple[Message, float]]:
        """The second half: one step of gradient descent on mini-batches that have been through `forward`.

        Raises as `step` does; then nothing has changed since the first of them.
        """
        self.optimizer.zero_grad(set_to_none=True)
        everyone = sum(each.examples for each in forwards)
        torch.stack([each.loss * (each.examples / everyone) for each in forwards]).sum().backward()  # type: ignore[no-untyped-call]
        try:
            answers = [
                (self.wire.down(each.received, each.message), float(each.loss.detach())) for each in forwards
            ]
            self._check_gradients()
        except MsfusionError:
            self._put_back(forwards[0].before)
            raise
        _clip(self.part.parameters(), self.clip_norm)
        self.optimizer.step()
        return answers

    def _check_gradients(self) -> None:
        gradients = [each.grad for each in self.part.parameters() if each.grad is not None]
        if gradients and not math.isfinite(float(nn.utils.get_total_norm(gradients))):
            raise TrainingError("the gradients on the server are not finite: lower the learning rate")

    def _buffers(self) -> list[Tensor]:
        """Copies of what a forward pass may change: running statistics."""
        return [buffer.clone() for buffer in self.part.buffers()]

    def _put_back(self, buffers: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for buffer, before in zip(self.part.buffers(), buffers, strict=True):
                buffer.copy_(before)


@dataclass(frozen=True)
class Forward:
    """A mini-batch that has been through the server part: what came of it, and the buffers before it."""

    message: Message
    received: Sequence[Tensor]
    loss: Tensor
    examples: int
    before: list[Tensor]


@contextmanager
def _drawing(draw: int, side: int) -> Iterator[None]:
    """Dropout is drawn from a seed of this mini-batch and side; the global generator is put back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(draw, side))
        yield


def _clip(parameters: Iterable[nn.Parameter], norm: float | None) -> None:
    """Bound the norm of the gradients of one side; the other side's are not known there."""
    if norm is not None:
        nn.utils.clip_grad_norm_(parameters, norm)


def averaged(states: Sequence[tuple[dict[str, Tensor], float]]) -> dict[str, Tensor]:
    """The mean of several client parts, each with its weight; integers (counters) are the first one's."""
    total = sum(weight for _, weight in states)
    first = states[0][0]
    mean = {}
    for name, tensor in first.items():
        if not tensor.is_floating_point():
            mean[name] = tensor.clone()
            continue
        terms = torch.stack([state[name].double() * (weight / total) for state, weight in states])
        mean[name] = terms.sum(0).to(tensor.dtype)
    return mean


def plain(tensor: Tensor) -> bytes:
    """A tensor as safetensors."""
    return safetensors.torch.save({"": tensor.detach().contiguous()})


def of_plain(data: bytes, dtype: torch.dtype, max_elements: int) -> Tensor:
    """The tensor of `plain`. Raises CodecError for anything else; nothing is allocated beyond the message's size."""
    try:
        loaded = safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError, OverflowError) as error:
        raise CodecError("a message is no tensor in the format of safetensors") from error
    tensor = loaded.get("")
    if tensor is None or len(loaded) != 1 or tensor.dtype != dtype or tensor.numel() > max_elements:
        raise CodecError(f"a message should hold one tensor of {dtype}: both sides must have the same cut")
    return tensor
