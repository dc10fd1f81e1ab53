"""What stands before every payload: enough to decode a message without knowing who sent it.

    "msfc"   magic                    4 bytes
    version, codec, dtype, signed     1 byte each
    axes, settings                    1 byte each: how many axes, how many bytes of settings
    shape                             4 bytes per axis
    settings                          as the codec packs them

All numbers are little-endian. At most 10 + 4 * 8 + 32 bytes; 39 for a mask-encoded batch of images.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from msfusion.errors import CodecError

Buffer = bytes | bytearray | memoryview

MAGIC = b"msfc"
VERSION = 1
MOST_AXES = 8
MOST_SETTINGS = 32
LONGEST_AXIS = 2**32 - 1
MAX_ELEMENTS = 2**28
"""How many elements a message may declare unless the caller says otherwise: 1 GiB of float32."""

DTYPES = {1: torch.float32, 2: torch.float16, 3: torch.bfloat16, 4: torch.float64}
_NUMBER_OF = {dtype: number for number, dtype in DTYPES.items()}
_FIXED = struct.Struct("<4sBBBBBB")


@dataclass(frozen=True)
class Header:
    """What a message says about itself. `signed`: whether a plane of sign bits is part of the payload."""

    codec: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    settings: bytes = b""
    signed: bool = False

    @property
    def elements(self) -> int:
        """How many elements the decoded tensor has."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes of this header."""
        return header_size(self.shape, len(self.settings))

    def pack(self) -> bytes:
        """The bytes that start a message. Raises CodecError for a tensor that no header can describe."""
        check_describable(self.shape, self.dtype)
        number = _NUMBER_OF[self.dtype]
        fixed = _FIXED.pack(
            MAGIC, VERSION, self.codec, number, self.signed, len(self.shape), len(self.settings)
        )
        return fixed + struct.pack(f"<{len(self.shape)}I", *self.shape) + self.settings


def header_size(shape: tuple[int, ...], settings: int) -> int:
    """Bytes of the header of a tensor of this shape with so many bytes of settings."""
    return _FIXED.size + 4 * len(shape) + settings


def room_for(shape: Sequence[int]) -> int:
    """The least `max_elements` that lets this shape pass: an axis of length 0 must not hide others.

    (Their strides would overflow.)
    """
    return math.prod(length for length in shape if length)


def check_describable(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raises CodecError for a dtype or shape that messages cannot have."""
    if dtype not in _NUMBER_OF:
        raise CodecError(f"a tensor of {dtype} cannot be encoded; convert it to float32 or float16 first.")
    if len(shape) > MOST_AXES or any(length > LONGEST_AXIS for length in shape):
        raise CodecError(
            f"a tensor of shape {shape} cannot be encoded; at most {MOST_AXES} axes of at most {LONGEST_AXIS}."
        )


def read_header(data: Buffer, *, max_elements: int = MAX_ELEMENTS) -> tuple[Header, memoryview]:
    """The header of a message, and its payload (a view, not a copy).

    Nothing is allocated for what the header declares. Raises CodecError for bytes that are no message, or for
    one of more than `max_elements` elements.
    """
    view = memoryview(data)
    if view.ndim != 1 or view.itemsize != 1 or not view.contiguous:
        raise CodecError("a message must be one contiguous run of bytes.")
    view = view.cast("B")
    if len(view) < _FIXED.size:
        raise CodecError(f"a message of {len(view)} bytes is cut off within its header.")
    magic, version, codec, number, signed, axes, settings = _FIXED.unpack_from(view)
    if magic != MAGIC:
        raise CodecError("these bytes are not a message of msfusion's codecs.")
    if version != VERSION:
        raise CodecError(f"a message of version {version}; this msfusion reads version {VERSION} only.")
    if number not in DTYPES or signed > 1 or axes > MOST_AXES or settings > MOST_SETTINGS:
        raise CodecError("the header of a message is damaged: impossible dtype, sign flag, axes or settings.")
    start = _FIXED.size + 4 * axes
    if len(view) < start + settings:
        raise CodecError(f"a message of {len(view)} bytes is cut off within its header.")
    shape = struct.unpack_from(f"<{axes}I", view, _FIXED.size)
    if room_for(shape) > max_elements:
        raise CodecError(
            f"a message declares the shape {shape}, more than the {max_elements} elements allowed."
        )
    header = Header(codec, DTYPES[number], shape, bytes(view[start : start + settings]), bool(signed))
    return header, view[start + settings :]
