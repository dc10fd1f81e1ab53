"""Mask-encoded sparsification (Zhou et al., ECAI 2024, arXiv 2408.13787).

k = max(1, floor((1 - r) d));   top = the k largest magnitudes;   T = the smallest of them
m_i = 2^b - 1 for a top value, else |x_i| (2^b - 1) / T, rounded, at most 2^b - 2
decoded: a top value as it is, else m_i T / (2^b - 1) with the sign of x_i
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from msfusion.codecs.codec import Encoded, in_float32, not_finite
from msfusion.codecs.header import Header
from msfusion.codecs.kept import Values, all_finite
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
    encode_mask,
    kept_count,
    mask_payload_size,
)
from msfusion.codecs.operations import Operations
from msfusion.codecs.surviving import Surviving


@dataclass(frozen=True)
class MaskEncoded(Surviving):
    """The largest values as they are, all others in a mask of `bits` bits per element.

    `ratio` of the elements are not sent as values. `rounding`: "nearest" is what the authors' code does and has
    little more than half the error; "floor" is what their text says. `values`: the type of those that are sent.
    `entropy`: compress the mask, at the same error. A tensor where negative values matter costs one more bit
    per element. Raises ConfigError for settings that are out of range.
    """

    ratio: float = 0.99
    bits: int = 2
    rounding: Rounding = "nearest"
    values: Values = "float32"
    entropy: Entropy = None

    name: ClassVar[str] = "mask_encoded"
    number: ClassVar[int] = 1
    settings_size: ClassVar[int] = SETTINGS_SIZE

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        check_bits(self.bits)
        check_choice("rounding", self.rounding, get_args(Rounding))
        check_choice("values", self.values, get_args(Values))
        check_choice("entropy", self.entropy, ("zstd", None))

    def _encode(self, tensor: Float[Tensor, "..."], operations: Operations) -> Encoded:
        values = in_float32(tensor)
        count = kept_count(self.ratio, len(values))
        top, kept = operations.largest(values, count)
        if not all_finite(kept):  # what is not finite is among the largest
            raise not_finite(self.name)
        return encode_mask(
            values,
            top,
            kept,
            bits=self.bits,
            rounding=self.rounding,
            kept_as=self.values,
            entropy=self.entropy,
            operations=operations,
        )

    def _payload_size(self, elements: int, dtype: torch.dtype, signed: bool) -> int:
        count = kept_count(self.ratio, elements)
        return mask_payload_size(elements, count, self.bits, self.values, signed)

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
