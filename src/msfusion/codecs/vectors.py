"""What loops over many values at a time need and numba's own Python does not offer: vectors of a fixed length.

Each function is a few instructions of LLVM's portable language, which has vectors of any length; LLVM turns them into
those of the processor (with AVX-512, `at_least` is four comparisons). What it makes of plain loops over elements
of different sizes is two to three times slower. Nothing is checked here: whoever calls sees to it that arrays are
contiguous and that the values are there. As in `compiling`, what numba has kept on disk does not notice a change.
"""

from __future__ import annotations

from typing import no_type_check

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from msfusion.codecs.compiling import compiled

WORD = 64
"""Values whose comparisons fill an integer, a bit each."""

GROUP = 16
"""Values that `append_at_least` looks at."""

_AHEAD = 2048  # values; half of it and twice as many are as good
_LINE = 16  # values in 64 bytes, what a processor fetches at once

_BIT, _BYTE, _INT, _LONG, _FLOAT = (
    ir.IntType(1),
    ir.IntType(8),
    ir.IntType(32),
    ir.IntType(64),
    ir.FloatType(),
)


@intrinsic
@no_type_check
def at_least(typing, values, start, limit):
    """A bit for each of `WORD` values from `start` on, the first in the lowest: is its magnitude at least `limit`?

    All are float32 looked at as integers.
    """

    def generate(context, builder, signature, arguments):
        magnitudes = _magnitudes(_load(context, builder, signature, arguments, _INT, WORD), builder)
        return builder.bitcast(_at_least(builder, magnitudes, arguments[2]), _LONG)

    return types.uint64(values, types.int64, types.int32), generate


@intrinsic
@no_type_check
def negative(typing, values, start):
    """A bit for each of `WORD` values: is its sign bit set?"""

    def generate(context, builder, signature, arguments):
        loaded = _load(context, builder, signature, arguments, _INT, WORD)
        return builder.bitcast(builder.icmp_signed("<", loaded, ir.Constant(loaded.type, None)), _LONG)

    return types.uint64(values, types.int64), generate


@intrinsic
@no_type_check
def append_at_least(typing, values, start, limit, out, found):
    """Write those of `GROUP` values that are at least `limit` to `out` from `found` on, and behind them anything.

    Returns how many there are then. One instruction with AVX-512, slow without.
    """

    def generate(context, builder, signature, arguments):
        loaded = _load(context, builder, signature, arguments, _INT, GROUP)
        chosen = _at_least(builder, _magnitudes(loaded, builder), arguments[2])
        kind = ir.FunctionType(loaded.type, [loaded.type, chosen.type, loaded.type])
        name = f"llvm.experimental.vector.compress.v{GROUP}i32"
        compress = cgutils.get_or_insert_function(builder.module, kind, name)
        packed = builder.call(compress, [loaded, chosen, ir.Constant(loaded.type, ir.Undefined)])
        builder.store(
            packed, _address(context, builder, signature, arguments, packed.type, at=(3, 4)), align=4
        )
        count = builder.ctpop(builder.bitcast(chosen, ir.IntType(GROUP)))
        return builder.add(arguments[4], builder.zext(count, _LONG))

    return types.int64(values, types.int64, types.int32, out, types.int64), generate


@intrinsic
@no_type_check
def pack_twos(typing, values, start, first, second, third, packed, byte):
    """Codes of two bits for `WORD` values, how many of three limits their magnitudes reach, as `WORD` / 4 bytes."""

    def generate(context, builder, signature, arguments):
        magnitudes = _magnitudes(_load(context, builder, signature, arguments, _INT, WORD), builder)
        octets = ir.VectorType(_BYTE, WORD)
        codes = ir.Constant(octets, None)
        for limit in arguments[2:5]:
            codes = builder.add(codes, builder.zext(_at_least(builder, magnitudes, limit), octets))
        fours = builder.bitcast(codes, ir.VectorType(_INT, WORD // 4))  # numba's machines are little-endian
        joined = fours
        for places in (6, 12, 18):
            shift = ir.Constant(fours.type, [places] * (WORD // 4))
            joined = builder.or_(joined, builder.lshr(fours, shift))
        joined = builder.trunc(joined, ir.VectorType(_BYTE, WORD // 4))
        builder.store(
            joined, _address(context, builder, signature, arguments, joined.type, at=(5, 6)), align=1
        )
        return context.get_dummy_value()

    limits = (types.int32, types.int32, types.int32)
    return types.void(values, types.int64, *limits, packed, types.int64), generate


@intrinsic
@no_type_check
def count_at_least(typing, values, limit, counts, start):
    """Add one to those of `WORD` counts (bytes) from `start` on whose values there have magnitudes from `limit` on."""

    def generate(context, builder, signature, arguments):
        loaded = _load(context, builder, signature, arguments, _INT, WORD, at=(0, 3))
        reached = _at_least(builder, _magnitudes(loaded, builder), arguments[1])
        octets = ir.VectorType(_BYTE, WORD)
        there = _address(context, builder, signature, arguments, octets, at=(2, 3))
        count = builder.add(builder.load(there, align=1), builder.zext(reached, octets))
        builder.store(count, there, align=1)
        return context.get_dummy_value()

    return types.void(values, types.int32, counts, types.int64), generate


@intrinsic
@no_type_check
def write_word(typing, octets, start, word):
    """An integer becomes the eight bytes from `start` on, little-endian."""

    def generate(context, builder, signature, arguments):
        builder.store(arguments[2], _address(context, builder, signature, arguments, _LONG), align=1)
        return context.get_dummy_value()

    return types.void(octets, types.int64, types.uint64), generate


@intrinsic
@no_type_check
def read_word(typing, octets, start):
    """The eight bytes from `start` on, as a little-endian integer."""

    def generate(context, builder, signature, arguments):
        return builder.load(_address(context, builder, signature, arguments, _LONG), align=1)

    return types.uint64(octets, types.int64), generate


@intrinsic
@no_type_check
def copy_four(typing, table, start, out, place):
    """Four floats of `table` from `start` on become those of `out` from `place` on."""

    def generate(context, builder, signature, arguments):
        four = _load(context, builder, signature, arguments, _FLOAT, 4)
        builder.store(four, _address(context, builder, signature, arguments, four.type, at=(2, 3)), align=4)
        return context.get_dummy_value()

    return types.void(table, types.int64, out, types.int64), generate


@intrinsic
@no_type_check
def lowest_bit(typing, word):
    """The place of the lowest bit that is set; there must be one."""

    def generate(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(_BIT, 1))

    return types.int64(types.uint64), generate


@compiled
@no_type_check
def ahead(values, start, count):
    """Ask for `count` values that will be read or written soon, some way behind `start`; they need not exist.

    A processor that follows a stream by itself stops at the end of each page of 4 KiB.
    """
    for place in range(start + _AHEAD, start + _AHEAD + count, _LINE):
        fetch(values, place)


@intrinsic
@no_type_check
def fetch(typing, values, place):
    """Ask for a value that will be read or written soon, and those around it."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), _INT, _INT, _INT])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        there = _address(context, builder, signature, arguments, _BYTE)
        read, second_level, data = (ir.Constant(_INT, number) for number in (0, 2, 1))
        builder.call(prefetch, [there, read, second_level, data])
        return context.get_dummy_value()

    return types.void(values, types.int64), generate


@no_type_check
def _address(context, builder, signature, arguments, kind, at=(0, 1)):
    """Of what is said by the arguments at these two places: an array, and a place in it."""
    array, place = at
    data = context.make_array(signature.args[array])(context, builder, arguments[array]).data
    return builder.bitcast(builder.gep(data, [arguments[place]]), kind.as_pointer())


@no_type_check
def _load(context, builder, signature, arguments, kind, length, at=(0, 1)):
    """A vector."""
    vector = ir.VectorType(kind, length)
    return builder.load(_address(context, builder, signature, arguments, vector, at), align=4)


@no_type_check
def _magnitudes(values, builder):
    return builder.and_(values, ir.Constant(values.type, [0x7FFFFFFF] * values.type.count))


@no_type_check
def _at_least(builder, magnitudes, limit):
    """A vector of bits."""
    undefined = ir.Constant(magnitudes.type, ir.Undefined)
    first = builder.insert_element(undefined, limit, ir.Constant(_INT, 0))
    everywhere = ir.Constant(ir.VectorType(_INT, magnitudes.type.count), None)
    return builder.icmp_signed(">=", magnitudes, builder.shuffle_vector(first, undefined, everywhere))
