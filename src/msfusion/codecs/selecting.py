"""The loops that choose the largest of many values. All values are float32, looked at as integers."""

from __future__ import annotations

from typing import no_type_check

import numpy as np

from msfusion.codecs.compiling import BLOCK, MAGNITUDE, compiled


@compiled
@no_type_check
def sample(bits, stride, keys):
    """Magnitudes, as integers, at multiples of `stride`, going around; it is less than the tensor's size."""
    place = 0
    for i in range(keys.size):
        keys[i] = bits[place] & MAGNITUDE
        place += stride
        if place >= bits.size:
            place -= bits.size


@compiled
@no_type_check
def collect(bits, lower, positions, values):
    """Where magnitudes are at least `lower`, ascending, and these values, all as integers.

    Returns how many there are, or -1 where there might be no room for them. Few flags are set and a processor
    guesses badly which, so there are no branches: what is found is written always, and counted when it holds.
    """
    flags = np.empty(BLOCK, np.uint8)
    eights = flags.view(np.uint64)
    not_zero = np.empty(eights.size, np.int64)
    found = 0
    for start in range(0, bits.size, BLOCK):
        block = bits[start : start + BLOCK]
        flags[block.size :] = 0
        for i in range(block.size):
            flags[i] = (block[i] & MAGNITUDE) >= lower
        some = 0
        for eight in range(eights.size):
            not_zero[some] = eight
            some += np.int64(eights[eight] != 0)
        if found + 8 * some > positions.size:
            return -1
        before = found
        for eight in not_zero[:some]:
            for i in range(8):
                positions[found] = start + 8 * eight + i
                found += np.int64(flags[8 * eight + i])
        for i in range(before, found):
            values[i] = block[positions[i] - start]
    return found


@compiled
@no_type_check
def nth_largest(bits, count):
    """The `count`-th largest magnitude as an integer, and how many are larger: by its upper, then lower 16 bits."""
    histogram = np.zeros(1 << 15, np.int64)
    for i in range(bits.size):
        histogram[(bits[i] & MAGNITUDE) >> 16] += 1
    above, upper = 0, histogram.size - 1
    while above + histogram[upper] < count:
        above += histogram[upper]
        upper -= 1
    histogram = np.zeros(1 << 16, np.int64)
    for i in range(bits.size):
        key = bits[i] & MAGNITUDE
        if key >> 16 == upper:
            histogram[key & 0xFFFF] += 1
    low = histogram.size - 1
    while above + histogram[low] < count:
        above += histogram[low]
        low -= 1
    return np.int32(upper << 16 | low), above


@compiled
@no_type_check
def take(bits, smallest, ties, positions):
    """Where magnitudes are larger than `smallest`, or among the first `ties` that equal it.

    `positions` has room for one more than there are.
    """
    found = 0
    for i in range(bits.size):
        key = bits[i] & MAGNITUDE
        tie = np.int64(key == smallest) & np.int64(ties > 0)
        positions[found] = i
        found += np.int64(key > smallest) + tie
        ties -= tie
