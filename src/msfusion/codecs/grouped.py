"""Several small codes as one symbol of an entropy coder.

A Huffman coder spends a whole bit on each symbol at least, where most codes of a coarse quantiser are zero and worth a
tenth of one. So k codes that lie within a limit L become one number in the base 2 L + 1, which fits into a byte; a code
that lies beyond counts as the limit, and how far beyond stands in a second stream:

    codes      0  1  0 -3  0      L = 1, k = 5
    symbol     (1, 2, 1, 0, 1) in base 3
    beyond     0 of the 1, 2 of the -3

With the codes of a normal distribution, three quarters of which are zero, that saves a quarter of the bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from msfusion.codecs.entropy import deflated, inflate
from msfusion.codecs.header import Buffer
from msfusion.errors import CodecError

Codes = NDArray[np.uint8]
"""Codes of a byte each, around a middle that stands for zero."""

_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class Grouping:
    """`count` codes, from -limit to limit, in a symbol."""

    limit: int
    count: int

    @property
    def base(self) -> int:
        """How many codes are within the limit."""
        return 2 * self.limit + 1

    @cached_property
    def weights(self) -> Codes:
        """Of the codes of a symbol, the first counting most."""
        return self.base ** np.arange(self.count - 1, -1, -1, dtype=np.uint8)

    @cached_property
    def table(self) -> Codes:
        """The codes of each symbol, from 0 to 2 * limit."""
        symbols = np.arange(self.base**self.count)[:, None]
        return (symbols // self.weights.astype(np.int64) % self.base).astype(np.uint8)

    def encode(self, codes: Codes, middle: int) -> bytes:
        """Both streams, after the length of the first."""
        low, high = middle - self.limit, middle + self.limit
        near = np.clip(codes, low, high) - np.uint8(low)
        beyond = np.where(codes > middle, codes - np.uint8(high), np.uint8(low) - codes)
        padded = np.full(-(-len(codes) // self.count) * self.count, self.limit, np.uint8)
        padded[: len(near)] = near
        symbols = (padded.reshape(-1, self.count) * self.weights).sum(axis=1, dtype=np.uint8)
        first = deflated(symbols)
        return _LENGTH.pack(len(first)) + first + deflated(beyond[(codes <= low) | (codes >= high)])

    def decode(self, payload: memoryview, elements: int, middle: int) -> Codes:
        """The codes of both streams. Raises CodecError for anything that is not whole and sound."""
        if len(payload) < _LENGTH.size:
            raise CodecError("a compressed payload is damaged: it is too short.")
        (length,) = _LENGTH.unpack_from(payload)
        streams = payload[_LENGTH.size :]
        symbols = _bytes_of(streams[:length], -(-elements // self.count))
        if symbols.max() >= self.base**self.count:
            raise CodecError("a compressed payload is damaged: it holds a symbol that no encoder writes.")
        padded = self.table[symbols].reshape(-1)
        near = padded[:elements]
        if (padded[elements:] != self.limit).any():
            raise CodecError("a compressed payload is damaged: there is something after its last element.")
        found = near.astype(np.int16) + (middle - self.limit)
        extreme = (near == 0) | (near == 2 * self.limit)
        beyond = _bytes_of(streams[length:], int(extreme.sum())).astype(np.int16)
        found[extreme] += np.where(near[extreme] == 0, -beyond, beyond)
        if found.min() < 0 or found.max() > 2 * middle:
            raise CodecError("a compressed payload is damaged: it holds a code that no encoder writes.")
        return found.astype(np.uint8)


GROUPINGS: Mapping[int, Grouping] = {2: Grouping(1, 5), 3: Grouping(2, 3), 4: Grouping(7, 2)}
"""By the number under which a message's header has it."""


def _bytes_of(stream: Buffer, size: int) -> Codes:
    return np.frombuffer(inflate(stream, size), np.uint8)
