"""The last step of codecs: what is compressed comes back, and nothing else is believed."""

from __future__ import annotations

import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msfusion.codecs.entropy import compress, decompress, deflated, inflate
from msfusion.errors import CodecError

BOTH = [(compress, decompress), (deflated, inflate)]
skewed = st.lists(st.sampled_from([127, 127, 127, 127, 126, 128, 3]), min_size=200, max_size=3000)


@pytest.mark.release
@settings(max_examples=60)
@given(st.binary(max_size=300) | skewed.map(bytes))
def test_what_is_smaller_comes_back(data: bytes) -> None:
    for pack, unpack in BOTH:
        packed = pack(data)
        if packed is not None:
            assert pack is deflated or len(packed) < len(data)
            assert unpack(packed, len(data)) == data


@pytest.mark.parametrize(("zeros", "allowed"), [(0.3, 1.04), (0.6, 1.04), (0.97, 2.2)])
def test_the_size_is_near_the_entropy_of_the_codes(zeros: float, allowed: float) -> None:
    generator = np.random.default_rng(0)
    codes = np.rint(generator.normal(127, 3, 50_000)).astype(np.uint8)
    codes[generator.random(len(codes)) < zeros] = 127
    share = np.unique(codes, return_counts=True)[1] / len(codes)
    entropy = -float((share * np.log2(share)).sum()) * len(codes) / 8
    packed = deflated(codes)
    assert entropy < len(packed) < allowed * entropy


def test_runs_cost_next_to_nothing() -> None:
    packed = deflated(np.full(100_000, 127, np.uint8))
    assert len(packed) < 500


@pytest.mark.parametrize("unpack", [decompress, inflate])
def test_damage_is_refused(unpack: object) -> None:
    assert callable(unpack)
    pack = {decompress: compress, inflate: deflated}[unpack]
    sound = pack(bytes(5000))
    assert sound is not None
    for damaged in (sound[:-1], sound + b"\0", b"", b"\xff" * 20):
        with pytest.raises(CodecError):
            unpack(damaged, 5000)
    for size in (4999, 5001, 0):
        with pytest.raises(CodecError):
            unpack(sound, size)


@pytest.mark.release
def test_a_stream_cannot_grow_without_bound() -> None:
    writer = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = writer.compress(bytes(2**28)) + writer.flush()
    assert len(bomb) < 2**28 / 1000
    tracemalloc.start()
    with pytest.raises(CodecError):
        inflate(bomb, 1000)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
