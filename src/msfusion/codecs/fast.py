"""The operations of all codecs on the CPU, compiled; the same results as `reference`, bit for bit.

What takes `torch.topk` longest, finding the k-th largest of millions, is done among few: a sample tells a value
that is surely a little too small, one pass collects what is above it, and the k-th largest of those is exact. Should
the sample have misled, everything is searched instead.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float32, Int64
from numpy.typing import NDArray
from torch import Tensor

from msfusion.codecs import coding, selecting
from msfusion.codecs.header import Buffer
from msfusion.codecs.operations import Operations, Packed, packed_size

SAMPLE = 16_384
_STRIDE = 2_654_435_761  # a large prime, so that the sample has no rhythm in common with rows or channels
_LARGEST_FINITE = 0x7F7FFFFF


class Fast(Operations):
    """See `msfusion.codecs.operations.Operations`."""

    def largest(
        self, values: Float32[Tensor, " elements"], count: int
    ) -> tuple[Int64[Tensor, " count"], Float32[Tensor, " count"]]:
        """The largest magnitudes, by their bits as integers, whose order is the same."""
        bits = values.view(torch.int32).numpy()
        room = 3 * count + 4096
        if room < bits.size // 4:
            places, candidates = np.empty(room, np.int64), np.empty(room, np.int32)
            found = selecting.collect(bits, _likely_below(bits, count), places, candidates)
            if found >= count:
                chosen = _take(candidates[:found], count)
                kept = torch.from_numpy(candidates[chosen]).view(torch.float32)
                return torch.from_numpy(places[chosen]), kept
        positions = torch.from_numpy(_take(bits, count))
        return positions, values[positions]

    def quantise(
        self, values: Float32[Tensor, " elements"], boundaries: Float32[Tensor, " boundaries"], bits: int
    ) -> Packed:
        """Packed codes of the values."""
        packed = np.empty(packed_size(len(values), bits), np.uint8)
        coding.quantise(values.numpy(), boundaries.numpy(), bits, packed)
        return packed

    def dequantise(
        self,
        packed: Buffer,
        levels: Float32[Tensor, " levels"],
        bits: int,
        out: Float32[Tensor, " elements"],
    ) -> None:
        """Levels of packed codes."""
        _unpack(packed, bits, levels.numpy(), None, out.numpy())

    def mask(
        self,
        values: Float32[Tensor, " elements"],
        boundaries: Float32[Tensor, " boundaries"],
        bits: int,
        top: Int64[Tensor, " count"],
    ) -> tuple[Packed, Packed | None]:
        """Packed codes with all ones at the top, and packed signs."""
        packed = np.zeros(packed_size(len(values), bits), np.uint8)
        positions, signs = top.numpy(), None
        if len(boundaries):
            limits = boundaries.view(torch.int32).numpy()
            if coding.quantise_magnitudes(values.view(torch.int32).numpy(), limits, bits, packed):
                signs = np.empty(packed_size(len(values), 1), np.uint8)
                coding.pack_signs(values.numpy(), boundaries.numpy()[0], signs)
                coding.set_codes(signs, positions, 1, False)
        coding.set_codes(packed, positions, bits, True)
        return packed, signs if signs is not None and signs.any() else None

    def unmask(
        self,
        mask: Buffer,
        signs: Buffer | None,
        levels: Float32[Tensor, " levels"],
        kept: Float32[Tensor, " count"],
        bits: int,
        out: Float32[Tensor, " elements"],
    ) -> bool:
        """Levels of the codes, and kept values where they are all ones."""
        result = out.numpy()
        if _unpack(mask, bits, levels.numpy(), kept.numpy(), result) != len(kept):
            return False
        if signs is not None:
            coding.negate(_read_only(signs), result)
        return True


def _likely_below(bits: NDArray[np.int32], count: int) -> np.int32:
    """A key that is almost surely not above the `count`-th largest, and not far below it."""
    keys = np.empty(SAMPLE, np.int32)
    selecting.sample(bits, _STRIDE % bits.size, keys)
    expected = count * SAMPLE / bits.size
    rank = min(SAMPLE, int(expected + 4 * expected**0.5 + 4))  # four standard deviations
    return np.int32(min(np.partition(keys, SAMPLE - rank)[SAMPLE - rank], _LARGEST_FINITE))


def _take(keys: NDArray[np.int32], count: int) -> NDArray[np.int64]:
    """Positions of the `count` largest keys, ascending; of equal ones the first."""
    smallest, above = selecting.nth_largest(keys, count)
    positions = np.empty(count + 1, np.int64)
    selecting.take(keys, smallest, count - above, positions)
    return positions[:count]


def _unpack(
    packed: Buffer,
    bits: int,
    levels: NDArray[np.float32],
    kept: NDArray[np.float32] | None,
    out: NDArray[np.float32],
) -> int:
    """Fill `out`; how many codes are all ones, where those stand for kept values."""
    codes = _read_only(packed)
    keeps, values = kept is not None, kept if kept is not None else np.empty(0, np.float32)
    whole = found = 0
    if bits <= 3:
        whole = len(out) // 8 * 8
        table, marked = _table_of_fours(levels, bits)
        found = int(coding.unpack_fours(codes, bits, table, marked & keeps, values, out[:whole]))
        if found > len(values):
            return found
    rest = codes[whole * bits // 8 :]
    return found + int(coding.unpack_each(rest, bits, levels, keeps, values[found:], out[whole:]))


def _table_of_fours(levels: NDArray[np.float32], bits: int) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """For each pattern of four codes, their levels (two in an integer), and whether one is all ones."""
    ones = (1 << bits) - 1
    codes = np.arange(1 << 4 * bits)[:, None] >> np.arange(0, 4 * bits, bits) & ones
    return np.ascontiguousarray(levels[codes]).view(np.uint64), (codes == ones).any(1)


def _read_only(data: Buffer) -> NDArray[np.uint8]:
    """Never writable, so that each kernel is compiled once."""
    array = np.frombuffer(data, np.uint8)
    array.flags.writeable = False
    return array
