"""Uniform quantisation to b bits between the smallest and the largest value (the rival `QU`).

step = (max - min) / (2^b - 1);   q_i = round((x_i - min) / step);   decoded: min + q_i step
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from msfusion.codecs.codec import Codec, Encoded, in_float32, not_finite
from msfusion.codecs.header import Header
from msfusion.codecs.masks import check_bits
from msfusion.codecs.operations import Operations, check_padding, packed_size
from msfusion.errors import CodecError

_SETTINGS = struct.Struct("<Bff")


@dataclass(frozen=True)
class Quantized(Codec):
    """`bits` bits per element, no more and no less. Raises ConfigError unless there are 1 to 8."""

    bits: int = 2

    name: ClassVar[str] = "quantized"
    number: ClassVar[int] = 4
    settings_size: ClassVar[int] = _SETTINGS.size

    def __post_init__(self) -> None:
        check_bits(self.bits)

    def _encode(self, tensor: Float[Tensor, "..."], operations: Operations) -> Encoded:
        values = in_float32(tensor)
        low, high = (float(end) for end in values.aminmax()) if len(values) else (0.0, 0.0)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise not_finite(self.name)
        low, high = low + 0.0, high + 0.0  # zero has one sign
        boundaries = _evenly(low, high, self.bits, 0.5)[:-1].to(values.device)
        return (
            False,
            _SETTINGS.pack(self.bits, low, high),
            [operations.quantise(values, boundaries, self.bits)],
        )

    def _payload_size(self, shape: Sequence[int], dtype: torch.dtype, signed: bool) -> int:
        return packed_size(math.prod(shape), self.bits)

    def _check_settings(self, header: Header) -> None:
        if _read(header)[0] != self.bits:
            raise CodecError(f"a message of {self.name} with other settings than those of its reader.")

    @classmethod
    def _check_message(cls, header: Header, payload: memoryview) -> None:
        expected = packed_size(header.elements, _read(header)[0])
        if len(payload) != expected:
            raise CodecError(f"a payload of {len(payload)} bytes where {expected} are expected.")

    @classmethod
    def _decode(
        cls, header: Header, payload: memoryview, out: Float32[Tensor, " elements"], operations: Operations
    ) -> None:
        bits, low, high = _read(header)
        check_padding(payload, header.elements, bits)
        operations.dequantise(payload, _evenly(low, high, bits, 0.0).to(out.device), bits, out)


def _evenly(low: float, high: float, bits: int, shift: float) -> Float32[Tensor, " levels"]:
    """What lies at low + (q + shift) * step, for each code q."""
    codes = torch.arange(2**bits, dtype=torch.float64) + shift
    places: Tensor = low + codes * (high - low) / (2**bits - 1)
    return places.to(torch.float32)


def _read(header: Header) -> tuple[int, float, float]:
    if len(header.settings) != _SETTINGS.size or header.signed:
        raise CodecError("a message is damaged: impossible settings in its header.")
    bits, low, high = _SETTINGS.unpack(header.settings)
    if bits not in range(1, 9) or not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise CodecError("a message is damaged: impossible settings in its header.")
    return bits, low, high
