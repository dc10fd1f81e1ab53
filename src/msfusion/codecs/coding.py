"""The loops that turn values into packed codes of a few bits, and packed codes into values."""

from __future__ import annotations

from typing import no_type_check

import numpy as np

from msfusion.codecs.compiling import BLOCK, MAGNITUDE, compiled


@compiled
@no_type_check
def count_boundaries(values, boundaries, codes):
    """How many boundaries are at or below each value of a block."""
    codes[:] = 0
    if boundaries.size <= 16:  # one pass for each, with vector instructions
        for boundary in boundaries:
            for i in range(values.size):
                codes[i] += np.uint8(values[i] >= boundary)
        return
    last = boundaries.size - 1
    step = 128
    while step > 0:  # a binary search for all values at once, without branches
        for i in range(values.size):
            place = codes[i] + step - 1
            reached = (place <= last) & (values[i] >= boundaries[min(place, last)])
            codes[i] += step * reached
        step //= 2


@compiled
@no_type_check
def two_boundaries(values, boundaries, codes):
    """`count_boundaries` for the usual case, two of them and no signs: False, codes undefined, where there are any."""
    low, high = boundaries[0], boundaries[1]
    for i in range(values.size):
        codes[i] = np.uint8(values[i] >= low) + np.uint8(values[i] >= high)
    lowest = np.int32(0)
    for i in range(values.size):
        lowest = min(lowest, values[i])
    return lowest >= 0


@compiled
@no_type_check
def pack(codes, bits, packed):
    """Eight codes (bytes) become `bits` bytes; as long as `packed` is."""
    if bits == 2:  # the usual case, vectorised
        fours = codes.view(np.uint32)
        for i in range(min(packed.size, fours.size)):
            four = fours[i]
            packed[i] = np.uint8(
                (four | four >> np.uint32(6) | four >> np.uint32(12) | four >> np.uint32(18)) & np.uint32(255)
            )
        return
    eights = codes.view(np.uint64)
    byte = 0
    for eight in range(eights.size):
        stream = np.uint64(0)
        for i in range(8):
            code = eights[eight] >> np.uint64(8 * i) & np.uint64(255)
            stream |= code << np.uint64(bits * i)
        for i in range(bits):
            if byte < packed.size:
                packed[byte] = np.uint8(stream >> np.uint64(8 * i) & np.uint64(255))
            byte += 1


@compiled
@no_type_check
def quantise(values, boundaries, bits, packed):
    """Packed codes of values, block by block."""
    codes = np.zeros(BLOCK, np.uint8)
    for start in range(0, values.size, BLOCK):
        block = values[start : start + BLOCK]
        codes[block.size :] = 0
        count_boundaries(block, boundaries, codes[: block.size])
        pack(codes, bits, packed[start * bits // 8 : (start + BLOCK) * bits // 8])


@compiled
@no_type_check
def quantise_magnitudes(values, boundaries, bits, packed):
    """Packed codes of magnitudes, all as integers. Returns whether any value has its sign bit set."""
    codes = np.zeros(BLOCK, np.uint8)
    magnitudes = np.empty(BLOCK, np.int32)
    signs = np.int32(0)
    for start in range(0, values.size, BLOCK):
        block = values[start : start + BLOCK]
        codes[block.size :] = 0
        if boundaries.size != 2 or not two_boundaries(block, boundaries, codes):
            for i in range(block.size):
                magnitudes[i] = block[i] & MAGNITUDE
                signs |= block[i]
            count_boundaries(magnitudes[: block.size], boundaries, codes[: block.size])
        pack(codes, bits, packed[start * bits // 8 : (start + BLOCK) * bits // 8])
    return signs < 0


@compiled
@no_type_check
def pack_signs(values, boundary, packed):
    """A bit for each value at or below -`boundary`."""
    codes = np.zeros(BLOCK, np.uint8)
    for start in range(0, values.size, BLOCK):
        block = values[start : start + BLOCK]
        codes[block.size :] = 0
        for i in range(block.size):
            codes[i] = block[i] <= -boundary
        pack(codes, 1, packed[start // 8 : (start + BLOCK) // 8])


@compiled
@no_type_check
def set_codes(packed, positions, bits, ones):
    """Make the codes at these positions all ones, or all zeros."""
    code = (1 << bits) - 1
    for position in positions:
        byte, place = position * bits >> 3, position * bits & 7
        if ones:
            packed[byte] |= np.uint8(code << place & 255)
        else:
            packed[byte] &= np.uint8(~(code << place) & 255)
        if place + bits > 8:
            if ones:
                packed[byte + 1] |= np.uint8(code << place >> 8)
            else:
                packed[byte + 1] &= np.uint8(~(code << place >> 8) & 255)


@compiled
@no_type_check
def fours_of(packed, bits, fours):
    """Patterns of four codes, of 1 to 3 bits each."""
    if bits == 2:
        for i in range(packed.size):
            fours[i] = packed[i]
    elif bits == 1:
        for i in range(packed.size):
            fours[2 * i] = packed[i] & 15
            fours[2 * i + 1] = packed[i] >> 4
    else:
        for i in range(packed.size // 3):
            first, second, third = (
                np.int64(packed[3 * i]),
                np.int64(packed[3 * i + 1]),
                np.int64(packed[3 * i + 2]),
            )
            fours[2 * i] = first | (second & 15) << 8
            fours[2 * i + 1] = second >> 4 | third << 4


@compiled
@no_type_check
def unpack_fours(packed, bits, table, marked, kept, out):
    """Fill `out` (in eights) four codes at a time: `table` holds four levels, as integers, for each four codes.

    Where `marked` says that one of four is all ones, kept values follow. Returns how many such codes there are,
    or one more than there are kept values as soon as they do not suffice. As in `collect` there are no
    branches.
    """
    pairs = out.view(np.uint64)
    ones = (1 << bits) - 1
    fours = np.empty(BLOCK // 4, np.uint16)
    with_ones = np.empty(BLOCK // 4, np.int64)
    places = np.empty(BLOCK + 1, np.int64)
    found = 0
    for start in range(0, out.size // 4, BLOCK // 4):
        size = min(BLOCK // 4, out.size // 4 - start)
        fours_of(packed[start * bits // 2 : (start + size) * bits // 2], bits, fours)
        pair = pairs[2 * start : 2 * (start + size)]
        some = 0
        for i in range(size):
            pair[2 * i] = table[fours[i], 0]
            pair[2 * i + 1] = table[fours[i], 1]
        for i in range(size):
            with_ones[some] = i
            some += np.int64(marked[fours[i]])
        here = 0
        for i in with_ones[:some]:
            four = np.int64(fours[i])
            for code in range(4):
                places[here] = 4 * (start + i) + code
                here += np.int64(four >> bits * code & ones == ones)
        if found + here > kept.size:
            return kept.size + 1
        for i in range(here):
            out[places[i]] = kept[found + i]
        found += here
    return found


@compiled
@no_type_check
def unpack_each(packed, bits, levels, keeps, kept, out):
    """Like `unpack_fours`, one code at a time, for any number of bits and elements; `keeps`: is all ones special?"""
    ones = (1 << bits) - 1
    found = 0
    for element in range(out.size):
        first = element * bits
        stream = np.int64(packed[first >> 3])
        if (first & 7) + bits > 8:
            stream |= np.int64(packed[(first >> 3) + 1]) << 8
        code = stream >> (first & 7) & ones
        out[element] = levels[code]
        if keeps and code == ones:
            if found == kept.size:
                return found + 1
            out[element] = kept[found]
            found += 1
    return found


@compiled
@no_type_check
def negate(packed, out):
    """Change the signs of the elements whose bits are set."""
    for byte in range(packed.size):
        if packed[byte] != 0:
            for i in range(8 * byte, min(8 * byte + 8, out.size)):
                if packed[byte] >> (i & 7) & 1:
                    out[i] = -out[i]
