"""How what crosses between the two sides of a cut model becomes bytes, and what may come out of bytes again.

Activations and gradients go through a codec each, what crosses besides (masks, sizes) as safetensors. Everything that
comes is checked against what the cut lets cross before anything is allocated for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from msfusion.codecs import Codec, Identity, Surviving, read_header, room_for
from msfusion.errors import CodecError, ConfigError
from msfusion.federated.method import ABSURD
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

    def changed(self, tensors: Sequence[Tensor], message: Message) -> tuple[float, float]:
        """Of activations and their message two sums of squares: of what the codec changed, and of all there was."""
        if isinstance(self.activations, Identity):
            return 0.0, 0.0
        changed = whole = 0.0
        for tensor, piece in self._live(tensors, message):
            decoded = self.activations.decode(piece, max_elements=room_for(tensor.shape))
            sent, exact = decoded.to(tensor.device).double(), tensor.detach().double()
            changed += float((sent - exact).square().sum())
            whole += float(exact.square().sum())
        return changed, whole

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
        _check_size("activations", tensor)
        return tensor.requires_grad_()

    def coded_bytes(self, message: Sequence[bytes]) -> int:
        """The bytes of a message that the activations' codec has made."""
        return sum(len(piece) for each, piece in zip(self.crossing, message, strict=True) if each.gradient)

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
        _check_size("gradients", gradient)
        return gradient

    @property
    def _surviving(self) -> Surviving | None:
        """The activations' codec where gradients go back through it and that makes a difference."""
        if self.derivative == "true" and isinstance(self.activations, Surviving):
            return self.activations
        return None

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


def _check_size(what: str, tensor: Tensor) -> None:
    """CodecError for values that no honest side sends."""
    largest = float(tensor.detach().abs().max()) if tensor.numel() else 0.0
    if not largest < ABSURD:
        raise CodecError(
            f"{what} as large as {largest:.3g} came; lower the learning rate if training diverges"
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
