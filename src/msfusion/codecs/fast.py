"""The operations of all codecs on the CPU, compiled; the same results as `reference`, bit for bit.

The machine's memory is the limit: encoding reads a tensor twice, decoding writes it once, and nearly nothing else
takes time. What takes `torch.topk` longest, finding the k-th largest of millions, is done among few: a sample tells
a value that is surely a little too small, the first pass collects what is above it, and the k-th largest of those
is exact. Should the sample have misled, everything is searched instead. The second pass compares each value with
that and with the boundaries.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64
from llvmlite import binding
from numpy.typing import NDArray
from torch import Tensor

from msfusion.codecs import coding, selecting
from msfusion.codecs.compiling import MAGNITUDE
from msfusion.codecs.header import Buffer
from msfusion.codecs.operations import Largest, Operations, Packed, packed_size
from msfusion.codecs.vectors import WORD

if binding.llvm_version_info[0] < 19:  # there the reference takes over
    raise ImportError("the compiled codecs need numba 0.62 or newer")

SAMPLE = 16_384
_STRIDE = 2_654_435_761  # a large prime, so that the sample has no rhythm in common with rows or channels
_LARGEST_FINITE = 0x7F7FFFFF
_WIDE = bool(binding.get_host_cpu_features().get("avx512f"))
_MOST_HELD = 1 << 23


class Fast(Operations):
    """See `msfusion.codecs.operations.Operations`."""

    def largest(self, values: Float32[Tensor, " elements"], count: int) -> Largest:
        """The largest magnitudes, by their bits as integers, whose order is the same."""
        keys = _as_integers(values)
        found, lower, room = -1, np.int32(0), 3 * count + 4096
        if room < keys.size // 4:
            candidates = _held("candidates", room, np.int32)
            lower = _likely_below(keys, count)
            found = selecting.collect(keys, lower, _WIDE, candidates)
            if found >= count:
                return _largest_of_few(candidates[:found], count)
        if found >= 0 and lower == 1:  # everything but zeros, and that is less
            smallest, above, equal = 0, found, keys.size - found
        else:
            smallest, above, equal = selecting.nth_largest(keys, count)
        positions = _positions(keys, smallest, count, count - above)
        return Largest(values[torch.from_numpy(positions)], int(smallest), above + equal - count)

    def positions(self, values: Float32[Tensor, " elements"], largest: Largest) -> Int64[Tensor, " count"]:
        """Where the largest are, in one pass."""
        keys, count = _as_integers(values), len(largest.values)
        return torch.from_numpy(_positions(keys, largest.smallest, count, largest.ties))

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
        largest: Largest,
    ) -> tuple[Packed, Packed | None]:
        """Packed codes, the smallest of the largest being the boundary of all ones, and packed signs.

        The packed codes are memory that the next call in this thread uses again.
        """
        keys, smallest = _as_integers(values), np.int32(largest.smallest)
        own = _as_integers(boundaries)
        limits = np.append(np.minimum(own, smallest), smallest)
        packed = _held("packed", packed_size(keys.size, bits), np.uint8)
        signs = np.empty(0, np.uint8)
        if coding.pack_magnitudes(keys, limits, bits, packed):
            signs = np.empty(packed_size(keys.size, 1), np.uint8)
            coding.pack_signs(keys, limits[0], smallest, signs)
        if largest.surplus:
            code = np.count_nonzero(own <= smallest)
            coding.demote(keys, smallest, largest.surplus, code, bits, packed, signs)
        return packed, signs if signs.any() else None

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


_threads = threading.local()


def _held(name: str, size: int, dtype: type[Any]) -> NDArray[Any]:
    """Memory for the time of one call, the same for all calls in a thread unless it is much.

    A system that hands out fresh pages takes as long for it as the loops that fill them.
    """
    if size * np.dtype(dtype).itemsize > _MOST_HELD:
        return np.empty(size, dtype)
    held = getattr(_threads, name, None)
    if held is None or len(held) < size:
        held = np.empty(size, dtype)
        setattr(_threads, name, held)
    return held[:size]


def _as_integers(values: Float32[Tensor, " elements"]) -> NDArray[np.int32]:
    return values.view(torch.int32).numpy()


def _likely_below(bits: NDArray[np.int32], count: int) -> np.int32:
    """A key that is almost surely not above the `count`-th largest, and not far below it."""
    keys = np.empty(SAMPLE, np.int32)
    selecting.sample(bits, _STRIDE % bits.size, keys)
    expected = count * SAMPLE / bits.size
    rank = min(SAMPLE, int(expected + 4 * expected**0.5 + 4))  # four standard deviations
    return np.int32(np.clip(np.partition(keys, SAMPLE - rank)[SAMPLE - rank], 1, _LARGEST_FINITE))


def _largest_of_few(keys: NDArray[np.int32], count: int) -> Largest:
    """The largest of candidates, among which are all that are as large as the smallest of them."""
    magnitudes = keys & MAGNITUDE
    smallest = int(np.partition(magnitudes, keys.size - count)[keys.size - count])
    kept = np.empty(keys.size + WORD, np.int32)
    surplus = selecting.collect(keys, np.int32(smallest), _WIDE, kept) - count
    if surplus:
        ties = count - int(np.count_nonzero(magnitudes > smallest))
        kept = keys[_positions(keys, smallest, count, ties)]
    return Largest(torch.from_numpy(kept[:count]).view(torch.float32), smallest, surplus)


def _positions(keys: NDArray[np.int32], smallest: int, count: int, ties: int) -> NDArray[np.int64]:
    """Where magnitudes are larger than `smallest` or the first `ties` that equal it, ascending."""
    positions = np.empty(count + 1, np.int64)
    selecting.take(keys, np.int32(smallest), ties, positions)
    return positions[:count]


def _unpack(
    packed: Buffer,
    bits: int,
    levels: NDArray[np.float32],
    kept: NDArray[np.float32] | None,
    out: NDArray[np.float32],
) -> int:
    """Fill `out`; how many codes are all ones, where those stand for kept values."""
    octets = _read_only(packed)
    keeps, values = kept is not None, kept if kept is not None else np.empty(0, np.float32)
    whole = found = 0
    if bits <= 3:
        codes = 16 if bits == 3 else 64 // bits  # from eight bytes, which must be there
        whole = max(0, (octets.size - 8) // (codes * bits // 8) + 1) * codes
        whole = min(whole, len(out) // codes * codes)
        table = _table_of_fours(levels, bits)
        found = int(coding.unpack_words(octets, bits, codes, table, keeps, values, out[:whole]))
        if found > len(values):
            return found
    rest = octets[whole * bits // 8 :]
    return found + int(coding.unpack_each(rest, bits, levels, keeps, values[found:], out[whole:]))


def _table_of_fours(levels: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """For each pattern of four codes, their levels."""
    return levels.take(_patterns(bits))


@lru_cache(maxsize=3)
def _patterns(bits: int) -> NDArray[np.int64]:
    """All patterns of four codes, one after the other."""
    return (np.arange(1 << 4 * bits)[:, None] >> np.arange(0, 4 * bits, bits) & (1 << bits) - 1).reshape(-1)


def _read_only(data: Buffer) -> NDArray[np.uint8]:
    """Never writable, so that each kernel is compiled once."""
    array = np.frombuffer(data, np.uint8)
    array.flags.writeable = False
    return array
