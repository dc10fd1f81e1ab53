"""The values that a codec sends as they are: in float32, or rounded to half of its size.

float16 has few exponents, so values are scaled by a power of two that brings the largest to 2^14 ... 2^15;
gradients of 1e-9 then lose nothing. bfloat16 has the range of float32 and needs no scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from msfusion.codecs.header import Buffer
from msfusion.errors import CodecError

Values = Literal["float32", "float16", "bfloat16"]
DTYPES: dict[Values, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
NUMBERS: dict[Values, int] = {"float32": 0, "float16": 1, "bfloat16": 2}
NAMES = {number: name for name, number in NUMBERS.items()}
EXPONENTS = range(-163, 114)
"""What `pack_values` can have divided by, from the smallest float32 to the largest."""


def most_significant_together(data: Buffer, size: int) -> bytes:
    """The bytes of values of `size` bytes, those of the same significance side by side.

    The largest of many values have nearly the same exponents, so half of these bytes then compress well.
    """
    return np.frombuffer(data, np.uint8).reshape(-1, size).T.tobytes()


def values_together(data: Buffer, size: int) -> bytes:
    """The inverse of `most_significant_together`."""
    return np.frombuffer(data, np.uint8).reshape(size, -1).T.tobytes()


@dataclass(frozen=True)
class Kept:
    """Values that are sent as they are, the smallest and the largest magnitude among them (of none zero)."""

    values: Float32[Tensor, " count"]
    smallest: float
    largest: float

    @classmethod
    def of(cls, values: Float32[Tensor, " count"]) -> Kept:
        """With what one pass over them finds."""
        if len(values) == 0:
            return cls(values, 0.0, 0.0)
        smallest, largest = values.abs().aminmax()
        return cls(values, float(smallest), float(largest))

    @property
    def finite(self) -> bool:
        """Whether no value is NaN or an infinity."""
        return math.isfinite(self.largest)  # NaN is the largest of all


def value_bytes(values: Values) -> int:
    """Bytes of one value."""
    return DTYPES[values].itemsize


@dataclass(frozen=True)
class Stored:
    """Kept values as a message has them: their bytes, how many they are, the power of two that they were divided
    by, and the smallest magnitude that a decoder will read.
    """

    data: Buffer
    count: int
    exponent: int
    smallest: float


def pack_values(kept: Kept, stored_as: Values) -> Stored:
    """The bytes of values that are finite."""
    values = kept.values
    if stored_as == "float32" or len(values) == 0:
        return Stored(values.cpu().numpy().view(np.uint8).data, len(values), 0, kept.smallest)
    exponent = math.frexp(kept.largest)[1] - 15 if stored_as == "float16" and kept.largest else 0
    scaled = (values.double() * 2.0**-exponent).to(torch.float32) if exponent else values
    limit = torch.finfo(DTYPES[stored_as]).max
    rounded = scaled.clamp(-limit, limit).to(DTYPES[stored_as])
    data = rounded.cpu().view(torch.uint8).numpy().data
    return Stored(
        data, len(values), exponent, unpack_values(data, stored_as, exponent, values.device).smallest
    )


def unpack_values(data: Buffer, stored_as: Values, exponent: int, device: torch.device) -> Kept:
    """The values of these bytes. Raises CodecError unless all are finite."""
    octets = torch.from_numpy(np.frombuffer(data, np.uint8).copy()).to(device)
    kept = Kept.of(octets.view(DTYPES[stored_as]).to(torch.float32))
    if not kept.finite:
        raise CodecError("a message is damaged: it holds values that are not finite.")
    if exponent:
        limit = torch.finfo(torch.float32).max
        scaled = kept.values.double() * 2.0**exponent
        kept = Kept.of(scaled.clamp(-limit, limit).to(torch.float32))
    return kept
