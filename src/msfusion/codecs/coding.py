"""The loops that turn values into packed codes of a few bits, and packed codes into values."""

from __future__ import annotations

from typing import no_type_check

import numpy as np

from msfusion.codecs.compiling import BLOCK, MAGNITUDE, compiled
from msfusion.codecs.vectors import (
    WORD,
    ahead,
    at_least,
    copy_four,
    count_at_least,
    lowest_bit,
    negative,
    pack_twos,
    read_word,
    write_word,
)

_CODES = np.uint64(0x00FF00FF00FF00FF)  # the first of each two
_PAIRS = np.uint64(0x0000FFFF0000FFFF)
_FOURS = np.uint64(0x00000000FFFFFFFF)


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
def pack(codes, bits, packed):
    """Eight codes (bytes) become `bits` bytes; as long as `packed` is."""
    eights = codes.view(np.uint64)
    words = np.empty_like(eights)
    free = np.uint64(8 - bits)
    for i in range(eights.size):  # the second of each two moves down to the first: codes, pairs, fours
        word = eights[i]
        word = word & _CODES | (word & ~_CODES) >> free
        word = word & _PAIRS | (word & ~_PAIRS) >> free + free
        word = word & _FOURS | (word & ~_FOURS) >> free + free + free + free
        words[i] = word
    stream = np.empty(eights.size * bits + 8, np.uint8)
    for i in range(words.size):
        write_word(stream, i * bits, words[i])  # eight bytes, of which the next overwrites some
    packed[:] = stream[: packed.size]


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
def pack_magnitudes(values, limits, bits, packed):
    """Packed codes, how many of 2^bits - 1 limits each magnitude reaches, all as integers.

    Returns whether any value has its sign bit set (of one bit, where no sign is ever sent: False).
    """
    whole = values.size // WORD * WORD if bits <= 2 else 0
    signs = np.uint64(0)
    if bits == 1:
        words = packed[: whole // 8].view(np.uint64)
        for i in range(words.size):
            ahead(values, WORD * i, WORD)
            words[i] = at_least(values, WORD * i, limits[0])
    elif bits == 2:
        for start in range(0, whole, WORD):
            ahead(values, start, WORD)
            pack_twos(values, start, limits[0], limits[1], limits[2], packed, start // 4)
            signs |= negative(values, start)
    codes = np.zeros(BLOCK, np.uint8)
    magnitudes = np.zeros(BLOCK, np.int32)
    sign = np.int32(0)
    for start in range(whole, values.size, BLOCK):
        block = values[start : start + BLOCK]
        for i in range(block.size):
            magnitudes[i] = block[i] & MAGNITUDE
            sign |= block[i]
        if limits.size <= 16:
            codes[:] = 0
            for limit in limits:
                for word in range(0, block.size, WORD):
                    count_at_least(magnitudes, limit, codes, word)
        else:
            count_boundaries(magnitudes, limits, codes)
        codes[block.size :] = 0
        pack(codes, bits, packed[start * bits // 8 : (start + BLOCK) * bits // 8])
    return bits > 1 and (signs != 0 or sign < 0)


@compiled
@no_type_check
def pack_signs(values, low, high, packed):
    """A bit for each negative value whose magnitude is at least `low` and below `high`."""
    whole = values.size // WORD * WORD
    words = packed[: whole // 8].view(np.uint64)
    for i in range(words.size):
        start = WORD * i
        ahead(values, start, WORD)
        between = at_least(values, start, low) & ~at_least(values, start, high)
        words[i] = negative(values, start) & between
    packed[whole // 8 :] = 0
    for i in range(whole, values.size):
        if values[i] < 0 and low <= values[i] & MAGNITUDE < high:
            packed[i >> 3] |= np.uint8(1 << (i & 7))


@compiled
@no_type_check
def demote(values, smallest, surplus, code, bits, packed, signs):
    """The last `surplus` of the magnitudes that equal `smallest` get `code` instead of all ones, and a sign."""
    ones = (1 << bits) - 1
    element = values.size
    while surplus > 0:
        element -= 1
        if values[element] & MAGNITUDE == smallest:
            byte, place = element * bits >> 3, element * bits & 7
            packed[byte] ^= np.uint8((ones ^ code) << place & 255)
            if place + bits > 8:
                packed[byte + 1] ^= np.uint8((ones ^ code) << place >> 8)
            if values[element] < 0 and code > 0:
                signs[element >> 3] |= np.uint8(1 << (element & 7))
            surplus -= 1


@compiled
@no_type_check
def unpack_words(packed, bits, codes, table, keeps, kept, out):
    """Fill `out` with the levels of codes of 1 to 3 bits, `codes` of them, whole bytes, from one integer.

    `table` holds four levels for each four codes. If `keeps`, kept values stand where a code is all ones. Returns
    how many such codes there are, or one more than there are kept values as soon as they do not suffice.
    """
    width, four = np.uint64(bits), np.uint64((1 << 4 * bits) - 1)
    lowest = np.uint64(0)
    for code in range(codes * keeps):
        lowest |= np.uint64(1) << width * np.uint64(code)
    found = 0
    for start in range(0, out.size, codes):
        ahead(out, start, codes)
        stream = read_word(packed, start * bits >> 3)
        ones = stream & lowest
        for bit in range(1, bits):
            ones &= stream >> np.uint64(bit)
        for place in range(start, start + codes, 4):
            copy_four(table, np.int64(stream & four) << 2, out, place)
            stream >>= np.uint64(4) * width
        while ones != 0:
            if found == kept.size:
                return found + 1
            out[start + np.int64(np.uint64(lowest_bit(ones)) // width)] = kept[found]
            found += 1
            ones &= ones - np.uint64(1)
    return found


@compiled
@no_type_check
def unpack_each(packed, bits, levels, keeps, kept, out):
    """Like `unpack_words`, one code at a time, for any number of bits and elements."""
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
    bits = out.view(np.uint32)
    whole = bits.size // 8
    for byte in range(whole):
        signs = np.uint32(packed[byte])
        for i in range(8):
            bits[8 * byte + i] ^= signs >> np.uint32(i) << np.uint32(31)
    for i in range(8 * whole, bits.size):
        bits[i] ^= np.uint32(packed[i >> 3] >> (i & 7)) << np.uint32(31)
