"""The loops that choose the largest of many values. All values are float32, looked at as integers."""

from __future__ import annotations

from typing import no_type_check

import numpy as np

from msfusion.codecs.compiling import MAGNITUDE, compiled
from msfusion.codecs.vectors import GROUP, WORD, ahead, append_at_least, at_least, fetch, lowest_bit


@compiled
@no_type_check
def sample(bits, stride, keys):
    """Magnitudes, as integers, at multiples of `stride`, going around; it is less than the tensor's size."""
    place, soon = 0, 64 * stride % bits.size
    for i in range(keys.size):
        fetch(bits, soon)
        keys[i] = bits[place] & MAGNITUDE
        place += stride
        place -= bits.size * (place >= bits.size)
        soon += stride
        soon -= bits.size * (soon >= bits.size)


@compiled
@no_type_check
def collect(bits, lower, wide, values):
    """Those whose magnitudes are at least `lower`, in order. Returns how many there are.

    -1 where `values` might have no room for them; it needs that of `WORD` more. `wide` is faster with AVX-512, and
    slower without: whether a value is chosen is hard for a processor to guess, and only `wide` needs no guesses.
    """
    found = 0
    whole = bits.size // WORD * WORD
    for start in range(0, whole, WORD):
        if found + WORD > values.size:
            return -1
        ahead(bits, start, WORD)
        if wide:
            for group in range(start, start + WORD, GROUP):
                found = append_at_least(bits, group, lower, values, found)
        else:
            word = at_least(bits, start, lower)
            while word != 0:
                values[found] = bits[start + lowest_bit(word)]
                found += 1
                word &= word - np.uint64(1)
    if found + WORD > values.size:
        return -1
    for i in range(whole, bits.size):
        if bits[i] & MAGNITUDE >= lower:
            values[found] = bits[i]
            found += 1
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
    return np.int32(upper << 16 | low), above, histogram[low]


@compiled
@no_type_check
def take(bits, smallest, ties, positions):
    """Where magnitudes are larger than `smallest`, or among the first `ties` that equal it.

    `positions` has room for one more than there are.
    """
    found = 0
    whole = bits.size // WORD * WORD
    for start in range(0, whole, WORD):
        word = at_least(bits, start, smallest)
        while word != 0:
            place = start + lowest_bit(word)
            word &= word - np.uint64(1)
            tie = np.int64(bits[place] & MAGNITUDE == smallest)
            positions[found] = place
            found += 1 - (tie & np.int64(ties <= 0))
            ties -= tie
    for place in range(whole, bits.size):
        tie = np.int64(bits[place] & MAGNITUDE == smallest)
        positions[found] = place
        found += np.int64(bits[place] & MAGNITUDE >= smallest) - (tie & np.int64(ties <= 0))
        ties -= tie
