"""Blocks of very different size, each by its own power of two, before another codec sees them.

What comes down to the first block of a transformer differs a thousandfold from token to token: the one that is
classified has nearly all of the gradient. A codec that measures the whole tensor by one scale makes every other token's
gradient zero, and the embeddings of most words never learn.

    e_b = the exponent of the largest magnitude of block b: max_i |x_bi| in [2^(e_b - 1), 2^e_b)
    sent: e_b, one byte a block, then the payload of the other codec for x_bi 2^-e_b

Powers of two, because scaling by them and back is exact. A block is a vector along the last axis (a token's features)
in tensors of up to three axes, and an example where there are more (an image's channels and pixels).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Float32, Int32
from torch import Tensor

from msfusion.codecs.codec import Codec, Encoded, in_float32, not_finite
from msfusion.codecs.dead_zone import DeadZone
from msfusion.codecs.header import Header
from msfusion.codecs.mask_encoded import MaskEncoded
from msfusion.codecs.operations import Operations
from msfusion.codecs.quantized import Quantized
from msfusion.codecs.random_top_k import RandomTopK
from msfusion.codecs.top_k import TopK
from msfusion.errors import CodecError, ConfigError

LARGEST_EXPONENT = 126
"""2^126 and 2^-126 are both ordinary numbers of float32."""

_INNER: dict[int, type[Codec]] = {
    codec.number: codec for codec in (MaskEncoded, TopK, RandomTopK, Quantized, DeadZone)
}
_SETTINGS = struct.Struct("<BB")


@dataclass(frozen=True)
class Scaled(Codec):
    """`inner`, any codec but `Identity` and another `Scaled`, over blocks of about the same size.

    Raises ConfigError for one of these two.
    """

    inner: Codec = field(default_factory=lambda: MaskEncoded(entropy="zstd"))

    name: ClassVar[str] = "scaled"
    number: ClassVar[int] = 7
    settings_size: ClassVar[int] = _SETTINGS.size

    def __post_init__(self) -> None:
        if self.inner.number not in _INNER:
            known = ", ".join(codec.name for codec in _INNER.values())
            raise ConfigError(f"inner = '{self.inner.name}': 'scaled' works with {known}.")

    def _settings_size(self) -> int:
        return _SETTINGS.size + self.inner.settings_size

    def _encode(self, tensor: Float[Tensor, "..."], operations: Operations) -> Encoded:
        blocks = _blocks(in_float32(tensor), _count(tensor.shape))
        exponents = self._exponents(blocks)
        scaled = blocks * _powers(-exponents)[:, None]
        signed, settings, parts = self.inner._encode(scaled.view(-1), operations)
        own = _SETTINGS.pack(self.inner.number, signed)
        return False, own + settings, [exponents.to(torch.int8).cpu().numpy(), *parts]

    def _exponents(self, blocks: Float32[Tensor, "blocks length"]) -> Int32[Tensor, " blocks"]:
        largest = blocks.abs().amax(1)
        if not bool(largest.isfinite().all()):
            raise not_finite(self.name)
        return torch.frexp(largest).exponent.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)

    def _payload_size(self, shape: Sequence[int], dtype: torch.dtype, signed: bool) -> int:
        return _count(shape) + self.inner._payload_size(shape, torch.float32, signed)

    def _check_settings(self, header: Header) -> None:
        inner = _read(header)
        if inner.codec != self.inner.number:
            raise CodecError(f"a message of {self.name} with other settings than those of its reader.")
        self.inner._check_settings(inner)

    @classmethod
    def _check_message(cls, header: Header, payload: memoryview) -> None:
        inner, count = _read(header), _count(header.shape)
        if len(payload) < count:
            raise CodecError(f"a payload of {len(payload)} bytes where {count} exponents are expected.")
        exponents = np.frombuffer(payload[:count], np.int8)
        if count and int(np.abs(exponents.astype(np.int16)).max()) > LARGEST_EXPONENT:
            raise CodecError("a message is damaged: it holds an exponent that no encoder writes.")
        _INNER[inner.codec]._check_message(inner, payload[count:])

    @classmethod
    def _decode(
        cls, header: Header, payload: memoryview, out: Float32[Tensor, " elements"], operations: Operations
    ) -> None:
        inner, count = _read(header), _count(header.shape)
        _INNER[inner.codec]._decode(inner, payload[count:], out, operations)
        exponents = torch.from_numpy(np.frombuffer(payload[:count], np.int8).astype(np.int32))
        _blocks(out, count).mul_(_powers(exponents).to(out.device)[:, None])
        largest = torch.finfo(torch.float32).max
        out.clamp_(-largest, largest)  # what was rounded up must not become an infinity


def _count(shape: Sequence[int]) -> int:
    """How many blocks a tensor of this shape has."""
    if math.prod(shape) == 0:
        return 0
    return math.prod(shape[:-1]) if len(shape) <= 3 else shape[0]


def _blocks(flat: Float32[Tensor, " elements"], count: int) -> Float32[Tensor, "blocks length"]:
    """One row for each block; a view."""
    return flat.view(count, len(flat) // count if count else 1)


def _powers(exponents: Int32[Tensor, " blocks"]) -> Float32[Tensor, " blocks"]:
    """Two to these powers, written as the bits of a float: exact on every device."""
    return ((exponents + 127) << 23).view(torch.float32)


def _read(header: Header) -> Header:
    """The header that the inner codec would have written."""
    damaged = CodecError("a message is damaged: impossible settings in its header.")
    if len(header.settings) < _SETTINGS.size or header.signed:
        raise damaged
    number, signed = _SETTINGS.unpack_from(header.settings)
    if number not in _INNER or signed > 1:
        raise damaged
    settings = header.settings[_SETTINGS.size :]
    return replace(header, codec=number, dtype=torch.float32, settings=settings, signed=bool(signed))
