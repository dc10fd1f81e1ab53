"""What codecs have in common that send the largest values as they are, and a mask that says where they stand."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, get_args

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from msfusion.codecs.codec import Encoded, in_float32, not_finite
from msfusion.codecs.header import Header
from msfusion.codecs.kept import Kept, Values, pack_values
from msfusion.codecs.masks import (
    SETTINGS_SIZE,
    Entropy,
    Rounding,
    check_bits,
    check_choice,
    check_mask_message,
    check_ratio,
    check_same,
    decode_mask,
    kept_count,
    mask_boundaries,
    mask_message,
    mask_payload_size,
)
from msfusion.codecs.operations import Largest, Operations
from msfusion.codecs.surviving import Surviving


class MaskCodec(Surviving):
    """`ratio` of the elements are not sent as values."""

    ratio: float
    values: Values
    entropy: Entropy

    settings_size: ClassVar[int] = SETTINGS_SIZE

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits of the mask for each element."""

    @property
    @abstractmethod
    def rounding(self) -> Rounding:
        """How the values that are not sent become codes."""

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        check_bits(self.bits)
        check_choice("rounding", self.rounding, get_args(Rounding))
        check_choice("values", self.values, get_args(Values))
        check_choice("entropy", self.entropy, ("zstd", None))

    def _encode(self, tensor: Float[Tensor, "..."], operations: Operations) -> Encoded:
        values = in_float32(tensor)
        largest = operations.largest(values, kept_count(self.ratio, len(values)))
        kept = Kept.of(largest.values)
        if not kept.finite:  # what is not finite is among the largest
            raise not_finite(self.name)
        return self._message(values, largest, kept, operations)

    def _message(
        self, values: Float32[Tensor, " elements"], largest: Largest, kept: Kept, operations: Operations
    ) -> Encoded:
        stored = pack_values(kept, self.values)
        boundaries = mask_boundaries(stored.smallest, self.bits, self.rounding).to(values.device)
        planes = operations.mask(values, boundaries, self.bits, largest)
        return mask_message(stored, *planes, bits=self.bits, kept_as=self.values, entropy=self.entropy)

    def _payload_size(self, shape: Sequence[int], dtype: torch.dtype, signed: bool) -> int:
        # kept values carry their own signs, and others have none of one bit
        signed = signed and self.bits > 1
        elements = math.prod(shape)
        return mask_payload_size(elements, kept_count(self.ratio, elements), self.bits, self.values, signed)

    def _check_settings(self, header: Header) -> None:
        count = kept_count(self.ratio, header.elements)
        check_same(self.name, header, bits=self.bits, values=self.values, entropy=self.entropy, count=count)

    @classmethod
    def _check_message(cls, header: Header, payload: memoryview) -> None:
        check_mask_message(header, payload)

    @classmethod
    def _decode(
        cls, header: Header, payload: memoryview, out: Float32[Tensor, " elements"], operations: Operations
    ) -> None:
        decode_mask(header, payload, out, operations)
