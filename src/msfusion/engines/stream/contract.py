"""What both sides must have in common, and what follows from it: the shape and size of all that may be sent.

Everything is known before the first message: whatever arrives is compared with it before it costs anything.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Int
from safetensors import SafetensorError
from torch import Tensor

from msfusion.batch import IGNORED
from msfusion.codecs import read_header, room_for
from msfusion.engines.grpc.packing import Agreement, Scalar
from msfusion.engines.stream.frames import FORMAT, LARGEST_HELLO, OVERHEAD
from msfusion.engines.stream.terms import Terms
from msfusion.errors import CodecError, StreamError
from msfusion.federated.messages import payload_bytes
from msfusion.federated.participation import RoundSettings
from msfusion.federated.screening import DEFAULT, Screening
from msfusion.federated.training import TrainingSettings
from msfusion.methods.split.rounds import SplitSettings
from msfusion.methods.split.wire import Message, Wire
from msfusion.objectives import logits_of
from msfusion.width.cut import Cut
from msfusion.width.groups import State

Shape = tuple[int, ...]


class Contract:
    """One model, cut and way of training, as both sides must have them.

    What crosses is measured once, by running both parts on two and on three examples: every length is a number,
    or grows with the examples. `meaning` is what the data's labels and tokens stand for, as far as it is known, which
    must be agreed on too; `screening` what becomes of bad participants.
    """

    def __init__(
        self,
        parts: Cut,
        settings: SplitSettings,
        training: TrainingSettings,
        rounds: RoundSettings,
        participants: int,
        *,
        screening: Screening = DEFAULT,
        meaning: Agreement | None = None,
    ) -> None:
        self.participants, self.rounds, self.training = participants, rounds, training
        self.screening = screening
        self.wire: Wire = settings.wire(parts)
        two, three = _measured(parts, 2), _measured(parts, 3)
        self._lengths = [_growing(one, other) for one, other in zip(two.shapes, three.shapes, strict=True)]
        self._sizes = [
            _growing((one,), (other,)) if each.size else None
            for each, one, other in zip(self.wire.crossing, two.values, three.values, strict=True)
        ]
        self._target_lengths = _growing(two.targets, three.targets)
        self.classes = two.classes
        self.layers: State = {name: tensor.clone() for name, tensor in parts.client.state_dict().items()}
        self.terms = Terms(
            participants=participants,
            rounds=rounds.rounds,
            batch_size=training.batch_size,
            local_epochs=training.local_epochs,
            max_steps=training.max_steps,
            largest_up=self._largest_up,
            largest_down=self._largest_down,
            agreement=self._agreed(parts, settings) | (meaning or {}),
            max_examples=screening.max_examples,
        )

    def shapes(self, examples: int) -> list[Shape]:
        """The shape of each tensor that crosses for a mini-batch."""
        return [_at(lengths, examples) for lengths in self._lengths]

    def target_shape(self, examples: int) -> Shape:
        """The shape of a mini-batch's targets."""
        return _at(self._target_lengths, examples)

    def plain_bytes(self, examples: int) -> int:
        """Bytes of a mini-batch's activations without a codec."""
        pairs = zip(self.wire.crossing, self.shapes(examples), strict=True)
        return sum(math.prod(shape) * each.dtype.itemsize for each, shape in pairs if each.gradient)

    @property
    def _largest_up(self) -> int:
        """The most bytes of a frame from a participant."""
        most = self.training.batch_size
        pairs = list(zip(self.wire.crossing, self.shapes(most), strict=True))
        step = 8 * math.prod(self.target_shape(most)) + sum(
            self.wire.activations.encoded_size(shape, each.dtype, signed=True)
            if each.gradient
            else math.prod(shape) * each.dtype.itemsize + OVERHEAD
            for each, shape in pairs
        )
        return max(step, self._largest_layers, LARGEST_HELLO) + 2 * OVERHEAD

    @property
    def _largest_down(self) -> int:
        """The most bytes of a frame from the server."""
        pairs = list(zip(self.wire.crossing, self.shapes(self.training.batch_size), strict=True))
        answer = sum(
            self.wire.gradients.encoded_size(shape, each.dtype, signed=True)
            for each, shape in pairs
            if each.gradient
        )
        return max(answer, self._largest_layers) + 2 * OVERHEAD

    def check_message(self, message: Message, examples: int) -> None:
        """Raises CodecError unless these can be the tensors that cross for so many examples. Decodes no tensor."""
        if len(message) != len(self.wire.crossing):
            raise CodecError(f"{len(message)} tensors came where {len(self.wire.crossing)} cross")
        for each, shape, piece in zip(self.wire.crossing, self.shapes(examples), message, strict=True):
            elements = math.prod(shape)
            if not each.gradient:
                if len(piece) > elements * each.dtype.itemsize + OVERHEAD:
                    raise CodecError(f"{len(piece)} bytes came for a tensor of {elements} {each.dtype}")
                continue
            header, _ = read_header(piece, max_elements=room_for(shape))
            if header.shape != shape or header.dtype != each.dtype:
                raise CodecError(
                    f"a tensor of {header.dtype} and shape {list(header.shape)} came where "
                    f"{each.dtype} of {list(shape)} crosses"
                )

    def check_received(self, message: list[Tensor], examples: int) -> None:
        """Raises CodecError where a decoded tensor has another shape, or a size is another number.

        The server part would reserve as much memory as a size says.
        """
        for each, tensor, shape, size in zip(
            self.wire.crossing, message, self.shapes(examples), self._sizes, strict=True
        ):
            if tuple(tensor.shape) != shape:
                raise CodecError(f"a tensor of shape {list(tensor.shape)} came where {list(shape)} crosses")
            if size is not None and int(tensor) != _at(size, examples)[0]:
                raise CodecError(f"the size '{each.name}' is {int(tensor)}, not {_at(size, examples)[0]}")

    def targets_of(self, data: bytes, examples: int) -> Int[Tensor, "..."]:
        """The targets in a step. Raises StreamError for other than so many, each a class or IGNORED."""
        shape = self.target_shape(examples)
        if len(data) != 8 * math.prod(shape):
            raise StreamError(f"{len(data)} bytes of targets came where {8 * math.prod(shape)} should have")
        numbers = np.frombuffer(data, dtype="<i8").astype(np.int64)
        if numbers.min() < 0 or numbers.max() >= self.classes:
            self._check_targets(numbers)
        return torch.from_numpy(numbers).view(shape)

    def _check_targets(self, numbers: np.ndarray) -> None:
        wrong = numbers[(numbers != IGNORED) & ((numbers < 0) | (numbers >= self.classes))]
        if len(wrong):
            raise StreamError(
                f"the target {wrong[0]} came where there are {self.classes} classes: targets are 0 to "
                f"{self.classes - 1}, or {IGNORED} for none"
            )

    def layers_of(self, data: bytes) -> dict[str, Tensor]:
        """First layers. Raises StreamError where they are not those of this model, or not finite."""
        try:
            loaded = safetensors.torch.load(data)
        except (SafetensorError, ValueError, KeyError, OverflowError) as error:
            raise StreamError("first layers came that are not in the format of safetensors") from error
        fits = loaded.keys() == self.layers.keys() and all(
            tensor.shape == self.layers[name].shape and tensor.dtype == self.layers[name].dtype
            for name, tensor in loaded.items()
        )
        if not fits:
            raise StreamError("first layers came whose tensors are not those of this model")
        if not all(bool(torch.isfinite(tensor).all()) for tensor in loaded.values()):
            raise StreamError("first layers came with NaN or infinities: lower the learning rate")
        return loaded

    @property
    def _largest_layers(self) -> int:
        names = sum(len(name) + 200 for name in self.layers)  # a tensor's entry in the header of safetensors
        return payload_bytes(self.layers) + names

    def _agreed(self, parts: Cut, settings: SplitSettings) -> Agreement:
        """Everything that decides the numbers, by name."""
        agreed: Agreement = {"format": FORMAT, "number of participants": self.participants}
        agreed |= {"rounds": self.rounds.rounds, "seed": self.rounds.seed}
        agreed |= {
            f"split.{field.name}": _scalar(getattr(settings, field.name))
            for field in dataclasses.fields(settings)
        }
        agreed |= {
            f"training.{field.name}": _scalar(getattr(self.training, field.name))
            for field in dataclasses.fields(self.training)
        }
        for index, (each, shape) in enumerate(zip(self.wire.crossing, self.shapes(1), strict=True)):
            agreed[f"tensor {index} that crosses, for one example"] = f"{each.dtype} {list(shape)}"
        agreed["shape of an example's targets"] = str(list(self.target_shape(1)[1:]))
        agreed["number of classes"] = self.classes
        agreed["model"] = hashlib.sha256(parts.outline().encode()).hexdigest()[:16]
        return agreed


def layers_message(state: State) -> bytes:
    """First layers as safetensors."""
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in state.items()})


@dataclass(frozen=True)
class _Measured:
    """What crossed for some examples; of sizes their values (0 for tensors)."""

    shapes: list[Shape]
    values: list[int]
    targets: Shape
    classes: int


def _measured(parts: Cut, examples: int) -> _Measured:
    crossing, output = parts.sample(examples)
    logits = logits_of(output)
    values = [int(tensor) if each.size else 0 for each, tensor in zip(parts.crossing, crossing, strict=True)]
    shapes = [tuple(tensor.shape) for tensor in crossing]
    return _Measured(shapes, values, tuple(logits.shape[:-1]), int(logits.shape[-1]))


Growing = tuple[tuple[int, int], ...]
"""For each axis a number, and how much it grows with each example."""


def _growing(two: Shape, three: Shape) -> Growing:
    return tuple((one - 2 * (other - one), other - one) for one, other in zip(two, three, strict=True))


def _at(lengths: Growing, examples: int) -> Shape:
    return tuple(fixed + growth * examples for fixed, growth in lengths)


def _scalar(value: object) -> Scalar:
    return value if value is None or isinstance(value, int | float | str) else repr(value)
