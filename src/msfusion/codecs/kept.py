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


def all_finite(kept: Float32[Tensor, " count"]) -> bool:
    """Whether no value is NaN or an infinity."""
    return len(kept) == 0 or math.isfinite(float(kept.abs().max()))  # NaN is the largest of all


def value_bytes(values: Values) -> int:
    """Bytes of one value."""
    return DTYPES[values].itemsize


@dataclass(frozen=True)
class Stored:
    """Kept values as a message has them: their bytes, the power of two that they were divided by, and what a
    decoder will read.
    """

    data: Buffer
    exponent: int
    values: Float32[Tensor, " count"]


def pack_values(kept: Float32[Tensor, " count"], values: Values) -> Stored:
    """The bytes of values that are finite."""
    if values == "float32" or len(kept) == 0:
        return Stored(kept.cpu().numpy().view(np.uint8).data, 0, kept)
    exponent = _exponent(kept) if values == "float16" else 0
    dtype = DTYPES[values]
    scaled = (kept.double() * 2.0**-exponent).to(torch.float32) if exponent else kept
    largest = torch.finfo(dtype).max
    rounded = scaled.clamp(-largest, largest).to(dtype)
    data = rounded.cpu().view(torch.uint8).numpy().data
    return Stored(data, exponent, unpack_values(data, values, exponent, kept.device))


def unpack_values(
    data: Buffer, values: Values, exponent: int, device: torch.device
) -> Float32[Tensor, " count"]:
    """The values of these bytes. Raises CodecError unless all are finite."""
    octets = torch.from_numpy(np.frombuffer(data, np.uint8).copy()).to(device)
    kept = octets.view(DTYPES[values]).to(torch.float32)
    if not all_finite(kept):
        raise CodecError("a message is damaged: it holds values that are not finite.")
    if exponent:
        largest = torch.finfo(torch.float32).max
        kept = (kept.double() * 2.0**exponent).clamp(-largest, largest).to(torch.float32)
    return kept


def _exponent(kept: Float32[Tensor, " count"]) -> int:
    largest = kept.abs().max()
    return int(torch.frexp(largest.double()).exponent) - 15 if largest > 0 else 0
