"""The payload of every codec that sends some values as they are and a mask of a few bits for each element.

    kept values, in order        | mask: bits per element, all ones where a value was kept | signs, if needed

All of it may be compressed together, the values with their bytes sorted by significance. With one mask bit
this is a bitmap and its values; with more it is mask-encoded sparsification, where the other codes stand for
multiples of T / (2^b - 1), T the smallest kept magnitude.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from msfusion.codecs.codec import Encoded
from msfusion.codecs.entropy import compress, decompress
from msfusion.codecs.header import Header
from msfusion.codecs.kept import (
    EXPONENTS,
    NAMES,
    NUMBERS,
    Kept,
    Stored,
    Values,
    most_significant_together,
    unpack_values,
    value_bytes,
    values_together,
)
from msfusion.codecs.operations import Operations, Packed, check_padding, packed_size
from msfusion.errors import CodecError, ConfigError

Rounding = Literal["nearest", "floor"]
Entropy = Literal["zstd"] | None

_SETTINGS = struct.Struct("<BBBhQ")
SETTINGS_SIZE = _SETTINGS.size
_SMALLEST = 2.0**-149


@dataclass(frozen=True)
class MaskSettings:
    """What a decoder needs to know: mask bits, type and scale of the kept values and how many, compressed?"""

    bits: int
    values: Values
    compressed: bool
    exponent: int
    count: int

    def pack(self) -> bytes:
        """The settings of a header."""
        return _SETTINGS.pack(self.bits, NUMBERS[self.values], self.compressed, self.exponent, self.count)

    @classmethod
    def read(cls, header: Header) -> MaskSettings:
        """The settings of a header. Raises CodecError where they make no sense."""
        if len(header.settings) != SETTINGS_SIZE:
            raise CodecError("a message is damaged: the settings in its header have the wrong length.")
        bits, values, compressed, exponent, count = _SETTINGS.unpack(header.settings)
        sensible = 1 <= bits <= 8 and values in NAMES and compressed <= 1 and exponent in EXPONENTS
        if not sensible or not min(1, header.elements) <= count <= header.elements:
            raise CodecError("a message is damaged: impossible settings in its header.")
        return cls(bits, NAMES[values], bool(compressed), exponent, count)


@lru_cache(maxsize=256)  # exact, but slow
def kept_count(ratio: float, elements: int) -> int:
    """How many values to keep: max(1, floor((1 - ratio) * elements)), of none none.

    Exact for the decimal number that the ratio is written as: (1 - 0.99) * 100 is 1.
    """
    return min(elements, max(1, int((1 - Fraction(repr(float(ratio)))) * elements)))


def mask_message(
    stored: Stored, mask: Packed, signs: Packed | None, *, bits: int, kept_as: Values, entropy: Entropy
) -> Encoded:
    """Settings and payload, of the kept values, the packed codes and their packed signs."""
    planes = [mask] if signs is None else [mask, signs]
    frame = None
    if entropy == "zstd":
        sorted_data = most_significant_together(stored.data, value_bytes(kept_as))
        frame = compress(np.concatenate([np.frombuffer(sorted_data, np.uint8), *planes]))
    settings = MaskSettings(bits, kept_as, frame is not None, stored.exponent, stored.count)
    return signs is not None, settings.pack(), [stored.data, *planes] if frame is None else [frame]


def mask_levels(smallest: float, bits: int) -> Float32[Tensor, " levels"]:
    """What the codes 0 ... 2^b - 1 stand for: m * T / (2^b - 1). The last one, T, is never used."""
    ones = 2**bits - 1
    return torch.tensor([code * smallest / ones for code in range(ones + 1)], dtype=torch.float32)


def mask_boundaries(smallest: float, bits: int, rounding: Rounding) -> Float32[Tensor, " boundaries"]:
    """From which magnitude on each of the codes 1 ... 2^b - 2 is used.

    There is no boundary for the code of all ones, so no rounding and no tie can turn a value into a kept one.
    All are above zero, so that zero stays zero.
    """
    ones = 2**bits - 1
    shift = 0.0 if rounding == "floor" else 0.5
    boundaries = [max(_SMALLEST, (code - shift) * smallest / ones) for code in range(1, ones)]
    return torch.tensor(boundaries, dtype=torch.float32)


def check_mask_message(header: Header, payload: memoryview) -> None:
    """Raises CodecError unless the payload has the size that follows from the header."""
    settings = MaskSettings.read(header)
    size = mask_payload_size(header.elements, settings.count, settings.bits, settings.values, header.signed)
    if len(payload) >= size if settings.compressed else len(payload) != size:
        raise CodecError(
            f"a payload of {len(payload)} bytes where {size} are expected"
            f"{' uncompressed' if settings.compressed else ''}: cut off, or followed by something else."
        )


def decode_mask(
    header: Header, payload: memoryview, out: Float32[Tensor, " elements"], operations: Operations
) -> None:
    """Fill `out` with a message that `check_mask_message` has let pass. Raises CodecError for one that lies."""
    kept, mask, signs = mask_planes(header, payload, out.device)
    bits = MaskSettings.read(header).bits
    levels = mask_levels(kept.smallest, bits).to(out.device)
    if not operations.unmask(mask, signs, levels, kept.values, bits, out):
        raise CodecError(f"a message is damaged: its mask does not mark {len(kept.values)} values.")


def mask_planes(
    header: Header, payload: memoryview, device: torch.device
) -> tuple[Kept, memoryview, memoryview | None]:
    """The kept values, packed codes and packed signs of a message that `check_mask_message` has let pass.

    Raises CodecError where they are damaged. Whether the codes mark as many values as there are is not checked.
    """
    settings = MaskSettings.read(header)
    width = value_bytes(settings.values)
    split = settings.count * width
    if settings.compressed:
        size = mask_payload_size(
            header.elements, settings.count, settings.bits, settings.values, header.signed
        )
        payload = memoryview(decompress(payload, size))
    data = values_together(payload[:split], width) if settings.compressed else payload[:split]
    kept = unpack_values(data, settings.values, settings.exponent, device)
    planes = payload[split:]
    end = packed_size(header.elements, settings.bits)
    mask, signs = planes[:end], planes[end:] if header.signed else None
    check_padding(mask, header.elements, settings.bits)
    if signs is not None:
        check_padding(signs, header.elements, 1)
    return kept, mask, signs


def mask_payload_size(elements: int, count: int, bits: int, values: Values, signed: bool) -> int:
    """Bytes of a payload that is not compressed; compressed it is never larger."""
    return count * value_bytes(values) + packed_size(elements, bits) + signed * packed_size(elements, 1)


def check_ratio(ratio: float) -> None:
    """Raises ConfigError unless 0 <= ratio < 1."""
    if not 0 <= ratio < 1:
        raise ConfigError(f"ratio = {ratio}: the share of values to drop must be at least 0 and below 1.")


def check_choice(setting: str, value: object, choices: tuple[object, ...]) -> None:
    """Raises ConfigError unless the value of a setting is one of its choices."""
    if value not in choices:
        raise ConfigError(f"{setting} = {value!r}: choose one of {', '.join(map(repr, choices))}.")


def check_bits(bits: int) -> None:
    """Raises ConfigError unless a code has 1 to 8 bits."""
    if bits not in range(1, 9):
        raise ConfigError(f"bits = {bits}: the number of bits per element must be 1 to 8.")


def check_same(name: str, header: Header, *, bits: int, values: Values, entropy: Entropy, count: int) -> None:
    """Raises CodecError for a message of other settings than these."""
    found = MaskSettings.read(header)
    same = (found.bits, found.values, found.count) == (bits, values, count)
    if not same or (found.compressed and entropy is None):
        raise CodecError(f"a message of {name} with other settings than those of the codec that reads it.")
