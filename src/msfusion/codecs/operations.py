"""What codecs are built from: choosing the largest elements, quantising, and packing codes of a few bits.

There are two implementations with the same results bit for bit: `reference` in plain torch, to be read and to
run on any device, and `fast` for the CPU, which needs numba and is used where it is installed.

Codes are packed as one stream of bits, the first code in the lowest bits of the first byte. A code is the
number of boundaries at or below a value; calculating it (x * 3 / T) instead could round differently on
two machines.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float32, Int64
from numpy.typing import NDArray
from torch import Tensor

from msfusion.codecs.header import Buffer
from msfusion.errors import CodecError

Packed = NDArray[np.uint8]


@dataclass(frozen=True)
class Largest:
    """The k largest magnitudes of a tensor, of equal ones the first.

    `values`: they, in the tensor's order. `smallest`: the smallest magnitude of them, its bits as an integer.
    `surplus`: how many others equal it.
    """

    values: Float32[Tensor, " count"]
    smallest: int
    surplus: int

    @property
    def ties(self) -> int:
        """How many of `values` equal `smallest`."""
        return int((self.values.abs().view(torch.int32) == self.smallest).sum())


class Operations(ABC):
    """The six operations. Tensors are flat and contiguous; `boundaries` ascend and number below 2^bits."""

    @abstractmethod
    def largest(self, values: Float32[Tensor, " elements"], count: int) -> Largest:
        """The `count` largest magnitudes. Not a number counts as larger than infinity."""

    @abstractmethod
    def positions(self, values: Float32[Tensor, " elements"], largest: Largest) -> Int64[Tensor, " count"]:
        """Where the largest of these values are, ascending."""

    @abstractmethod
    def quantise(
        self, values: Float32[Tensor, " elements"], boundaries: Float32[Tensor, " boundaries"], bits: int
    ) -> Packed:
        """Packed codes: how many boundaries are at or below each value."""

    @abstractmethod
    def dequantise(
        self,
        packed: Buffer,
        levels: Float32[Tensor, " levels"],
        bits: int,
        out: Float32[Tensor, " elements"],
    ) -> None:
        """Fill `out` with the level of each code; there are 2^bits levels."""

    @abstractmethod
    def mask(
        self,
        values: Float32[Tensor, " elements"],
        boundaries: Float32[Tensor, " boundaries"],
        bits: int,
        largest: Largest,
    ) -> tuple[Packed, Packed | None]:
        """Packed codes of the magnitudes, all ones for the largest, and a packed bit each for the signs.

        A sign bit is set where a negative value that is not among the largest has a code other than 0; there are
        no sign bits (None) where none would be set. 2^bits - 2 boundaries, all above zero; no value is NaN.
        """

    @abstractmethod
    def unmask(
        self,
        mask: Buffer,
        signs: Buffer | None,
        levels: Float32[Tensor, " levels"],
        kept: Float32[Tensor, " count"],
        bits: int,
        out: Float32[Tensor, " elements"],
    ) -> bool:
        """Fill `out`: the next kept value where a code is all ones, else the level of the code with its sign.

        False, and `out` is not to be used, where the number of codes that are all ones is not that of `kept`.
        """


def operations_for(device: torch.device, reference: bool) -> Operations:
    """The fast operations on a CPU where numba is installed, else the reference."""
    from msfusion.codecs.reference import Reference

    if reference or device.type != "cpu":
        return Reference()
    return _fast() or Reference()


@lru_cache(maxsize=1)
def _fast() -> Operations | None:
    try:
        from msfusion.codecs.fast import Fast
    except ImportError:  # numba is an extra
        return None
    return Fast()


def packed_size(elements: int, bits: int) -> int:
    """Bytes of so many codes."""
    return (elements * bits + 7) // 8


def check_padding(packed: Buffer, elements: int, bits: int) -> None:
    """Raises CodecError unless the bits after the last code are zero, so that no message has two forms."""
    used = elements * bits % 8
    if used and packed[-1] >> used:
        raise CodecError("a message is damaged: bits are set after its last element.")
