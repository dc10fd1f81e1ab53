"""What a participant of split learning can send for a mini-batch: its shapes and sizes, known before the first one.

Both parts are run once on two and on three examples. So every length is a number, or grows with the examples, and
whatever arrives is compared with it before it is decoded: a server part would reserve as much memory as a size says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msfusion.batch import IGNORED
from msfusion.codecs import read_header, room_for
from msfusion.errors import CodecError
from msfusion.methods.split.wire import Wire, of_plain
from msfusion.objectives import logits_of
from msfusion.width.cut import Cut

Shape = tuple[int, ...]

OVERHEAD = 2**12
"""The most bytes that a piece has besides those of its tensor."""


class Expected:
    """What crosses between the parts of a cut model, for any number of examples up to a mini-batch's."""

    def __init__(self, parts: Cut, wire: Wire, batch_size: int) -> None:
        self._wire, self._batch_size = wire, batch_size
        two, three = _measured(parts, 2), _measured(parts, 3)
        self._lengths = [_growing(one, other) for one, other in zip(two.shapes, three.shapes, strict=True)]
        self._sizes = [
            _growing((one,), (other,)) if each.size else None
            for each, one, other in zip(wire.crossing, two.values, three.values, strict=True)
        ]
        self._target_lengths = _growing(two.targets, three.targets)
        self.classes = two.classes

    def shapes(self, examples: int) -> list[Shape]:
        """The shape of each tensor that crosses for a mini-batch."""
        return [_at(lengths, examples) for lengths in self._lengths]

    def target_shape(self, examples: int) -> Shape:
        """The shape of a mini-batch's targets."""
        return _at(self._target_lengths, examples)

    def plain_bytes(self, examples: int) -> int:
        """Bytes of a mini-batch's activations without a codec."""
        pairs = zip(self._wire.crossing, self.shapes(examples), strict=True)
        return sum(math.prod(shape) * each.dtype.itemsize for each, shape in pairs if each.gradient)

    @property
    def most_bytes(self) -> int:
        """The most bytes of a request: of a whole mini-batch, whatever is in it."""
        most = self._batch_size
        pairs = zip(self._wire.crossing, self.shapes(most), strict=True)
        pieces = (
            self._wire.activations.encoded_size(shape, each.dtype, signed=True)
            if each.gradient
            else math.prod(shape) * each.dtype.itemsize + OVERHEAD
            for each, shape in pairs
        )
        return 8 * math.prod(self.target_shape(most)) + sum(pieces) + 2 * OVERHEAD

    def check(self, message: Sequence[bytes], targets: Tensor) -> None:
        """Raises CodecError unless these can be a mini-batch's. Decodes no activations."""
        examples = targets.shape[0] if targets.dim() else 0
        if not 0 < examples <= self._batch_size or tuple(targets.shape) != self.target_shape(examples):
            raise CodecError(f"targets of shape {list(targets.shape)} came for a mini-batch")
        if bool(((targets != IGNORED) & ((targets < 0) | (targets >= self.classes))).any()):
            raise CodecError(
                f"a target came that is none of the {self.classes} classes: targets are 0 to {self.classes - 1}, or "
                f"{IGNORED} for none"
            )
        if len(message) != len(self._wire.crossing):
            raise CodecError(f"{len(message)} tensors came where {len(self._wire.crossing)} cross")
        sizes = [None if each is None else _at(each, examples)[0] for each in self._sizes]
        for each, shape, size, piece in zip(
            self._wire.crossing, self.shapes(examples), sizes, message, strict=True
        ):
            if each.gradient:
                header, _ = read_header(piece, max_elements=room_for(shape))
                _check_form(shape, each.dtype, header.shape, header.dtype)
                continue
            if len(piece) > math.prod(shape) * each.dtype.itemsize + OVERHEAD:
                raise CodecError(
                    f"{len(piece)} bytes came for a tensor of {each.dtype} and shape {list(shape)}"
                )
            tensor = of_plain(piece, each.dtype, room_for(shape))
            _check_form(shape, each.dtype, tuple(tensor.shape), tensor.dtype)
            if size is not None and int(tensor) != size:
                raise CodecError(f"the size '{each.name}' is {int(tensor)}, not {size}")


def _check_form(shape: Shape, dtype: torch.dtype, came: Shape, came_dtype: torch.dtype) -> None:
    if came != shape or came_dtype != dtype:
        raise CodecError(
            f"a tensor of {came_dtype} and shape {list(came)} came where {dtype} of {list(shape)} crosses"
        )


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
