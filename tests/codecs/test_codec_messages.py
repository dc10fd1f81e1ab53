"""Headers, settings, limits and names: what a message says about itself, and what is refused."""

from __future__ import annotations

import struct
import sys
import time
import tracemalloc

import pytest
import torch
from codec_tensors import DTYPES, EVERY_CODEC, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from msfusion import codecs
from msfusion.codecs import Codec, CodecError, DeadZone, MaskEncoded, Quantized, RandomTopK, TopK
from msfusion.codecs.operations import operations_for
from msfusion.codecs.reference import Reference
from msfusion.errors import ConfigError, MsfusionError

TENSOR = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
every_codec = pytest.mark.parametrize("codec", EVERY_CODEC, ids=repr)


@every_codec
def test_the_header_describes_the_message(codec: Codec) -> None:
    header, payload = codecs.read_header(codec.encode(TENSOR.half()))
    assert (header.shape, header.dtype, header.codec) == ((3, 4, 5), torch.float16, type(codec).number)
    assert header.size + len(payload) == len(codec.encode(TENSOR.half()))
    assert header.size <= 10 + 4 * 3 + 32


@every_codec
def test_the_first_bytes_never_change(codec: Codec) -> None:
    message = codec.encode(torch.zeros(2, 3))
    settings = len(codecs.read_header(message)[0].settings)
    assert message[:18] == struct.pack("<4sBBBBBBII", b"msfc", 1, type(codec).number, 1, 0, 2, settings, 2, 3)


@every_codec
def test_every_part_of_a_message_is_needed(codec: Codec) -> None:
    message = codec.encode(TENSOR)
    for end in range(len(message)):
        with pytest.raises(CodecError):
            codecs.decode(message[:end])
    for tail in (b"\0", b"\xff", message):
        with pytest.raises(CodecError):
            codecs.decode(message + tail)


@every_codec
def test_any_buffer_of_bytes_can_be_decoded(codec: Codec) -> None:
    message = codec.encode(TENSOR)
    for data in (bytearray(message), memoryview(message), memoryview(b"--" + message)[2:]):
        assert same_bits(codecs.decode(data), codecs.decode(message))
    with pytest.raises(CodecError):
        codecs.decode(memoryview(message)[::-1])
    with pytest.raises(CodecError):
        codecs.decode(memoryview(b"ab" * 50).cast("H"))


@every_codec
def test_more_elements_than_allowed_are_refused(codec: Codec) -> None:
    message = codec.encode(TENSOR)
    assert codecs.decode(message, max_elements=60).shape == TENSOR.shape
    with pytest.raises(CodecError, match="59 elements allowed"):
        codecs.decode(message, max_elements=59)


@every_codec
def test_a_declared_size_is_not_believed(codec: Codec) -> None:
    """A short message that declares a gigabyte must not make us allocate one."""
    message = bytearray(codec.encode(torch.zeros(256)))
    message[10:14] = struct.pack("<I", 2**28)
    tracemalloc.start()
    begin = time.perf_counter()
    with pytest.raises(CodecError):
        codecs.decode(bytes(message))
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
    assert time.perf_counter() - begin < 2


@pytest.mark.parametrize("shape", [(0, 2**32 - 1, 2**32 - 1, 2**32 - 1), (2**32 - 1,) * 8, (2**16, 2**16, 0)])
def test_shapes_that_overflow_are_refused(shape: tuple[int, ...]) -> None:
    header = codecs.Header(codecs.Identity.number, torch.float32, shape)
    with pytest.raises(CodecError, match="elements allowed"):
        codecs.decode(header.pack())


def test_a_buffer_must_fit() -> None:
    message = codecs.by_name("paper").encode(TENSOR)
    for out in (torch.empty(60), torch.empty(3, 4, 5).half(), torch.empty(5, 4, 3).permute(2, 1, 0)):
        with pytest.raises(CodecError, match="buffer to decode into"):
            codecs.decode(message, out=out)


def test_the_message_of_another_codec_or_setting_is_refused() -> None:
    tensor = torch.rand(3000)
    messages = {other: other.encode(tensor) for other in EVERY_CODEC}
    # where compressing did not help, `compact` would have sent what `paper` sends, and so it reads that too
    compact, paper = codecs.by_name("compact"), codecs.by_name("paper")
    also = {(compact, paper), (codecs.Scaled(compact), codecs.Scaled(paper))}
    for codec in EVERY_CODEC:
        for other, message in messages.items():
            if codec == other or (codec, other) in also:
                assert codec.decode(message).shape == tensor.shape
            else:
                with pytest.raises(CodecError):
                    codec.decode(message)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e5m2])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises((CodecError, TypeError)):  # a type checker may be faster
        codecs.Identity().encode(torch.zeros(3).to(dtype))
    with pytest.raises(CodecError, match="convert it to float32"):
        codecs.Identity().encoded_size((3,), dtype)


def test_nine_axes_are_refused() -> None:
    with pytest.raises(CodecError, match="8 axes"):
        codecs.Identity().encode(torch.zeros([1] * 9))


def test_float64_beyond_float32_is_refused_like_an_infinity() -> None:
    tensor = torch.tensor([1e300, 1.0], dtype=torch.float64)
    for codec in EVERY_CODEC:
        if isinstance(codec, codecs.Identity):
            assert same_bits(codec.decode(codec.encode(tensor)), tensor)
            continue
        with pytest.raises(CodecError, match="beyond float32"):
            codec.encode(tensor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_finite_values_stay_finite(dtype: torch.dtype) -> None:
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    tensor = torch.tensor([largest, -largest, 0.0, largest / 3] * 10, dtype=torch.float64).to(dtype)
    for codec in EVERY_CODEC:
        decoded = codec.decode(codec.encode(tensor)).double()
        assert decoded.isfinite().all(), codec


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: MaskEncoded(ratio=1.0), "ratio"),
        (lambda: MaskEncoded(ratio=-0.1), "ratio"),
        (lambda: MaskEncoded(ratio=float("nan")), "ratio"),
        (lambda: MaskEncoded(bits=0), "bits"),
        (lambda: MaskEncoded(bits=9), "bits"),
        (lambda: TopK(ratio=2.0), "ratio"),
        (lambda: RandomTopK(alpha=1.5), "alpha"),
        (lambda: RandomTopK(seed=-1), "seed"),
        (lambda: Quantized(bits=16), "bits"),
        (lambda: DeadZone(step=0.0), "step"),
        (lambda: DeadZone(dead_zone=0.1), "dead_zone"),
        (lambda: codecs.Scaled(codecs.Identity()), "works with mask_encoded, top_k"),
        (lambda: codecs.Scaled(codecs.Scaled()), "inner = 'scaled'"),
        (lambda: codecs.by_name("scaled", inner="tiny"), "there is no codec 'tiny'"),
        (lambda: codecs.by_name("scaled", inner={"ratio": 0.9}), "a table that has one"),
        (lambda: codecs.by_name("scaled", inner=0.9), "should be a name"),
        (lambda: codecs.by_name("dense", step=2.0), "set those of 'dead_zone'"),
        (lambda: codecs.by_name("tiny"), "there is no codec 'tiny'"),
        (lambda: codecs.by_name("small"), "is called 'compact' now"),
        (lambda: codecs.by_name("top_k", bits=2), "no setting 'bits'"),
        (lambda: codecs.by_name("top_k", number=7), "no setting 'number'"),
        (lambda: codecs.by_name("paper", bits=3), "is a profile"),
    ],
)
def test_impossible_settings_are_named(build: object, said: str) -> None:
    assert callable(build)
    with pytest.raises(ConfigError, match=said) as caught:
        build()
    assert isinstance(caught.value, MsfusionError)
    assert str(caught.value).endswith(".")


def test_names_and_profiles() -> None:
    assert codecs.by_name("paper") == MaskEncoded(ratio=0.99, bits=2, rounding="nearest", values="float32")
    assert codecs.by_name("accurate") == MaskEncoded(ratio=0.995, bits=3, values="float16", entropy="zstd")
    assert codecs.by_name("dead_zone", step=0.3) == DeadZone(step=0.3)
    scaled = codecs.by_name("scaled", inner={"codec": "quantized", "bits": 4})
    assert scaled == codecs.Scaled(Quantized(bits=4))
    assert len({codec.number for codec in codecs.CODECS.values()}) == len(codecs.CODECS)


def test_entropy_coding_never_makes_a_message_longer() -> None:
    noise = torch.rand(5000) + 0.5
    plain, packed = MaskEncoded(ratio=0.5, bits=1), MaskEncoded(ratio=0.5, bits=1, entropy="zstd")
    assert len(packed.encode(noise)) <= len(plain.encode(noise))
    assert same_bits(packed.decode(packed.encode(noise)), plain.decode(plain.encode(noise)))


def test_a_compressed_payload_cannot_grow_without_bound() -> None:
    zstandard = pytest.importorskip("zstandard")
    sound = codecs.by_name("compact").encode(torch.zeros(4096))
    header, _ = codecs.read_header(sound)
    bomb = zstandard.ZstdCompressor().compress(bytes(2**28))
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1024))
    tracemalloc.start()
    for frame in (bomb, unsized, bomb[:-4], b"\x28\xb5\x2f\xfd" + bytes(20)):
        with pytest.raises(CodecError, match=r"damaged|bytes where"):
            codecs.decode(header.pack() + frame)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    for prefix in (b"", b"msfc\x01", b"msfc\x01\x01\x01\x00"):
        with pytest.raises(CodecError):
            codecs.decode(prefix + data, max_elements=1000)


def test_without_numba_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from msfusion.codecs import operations

    message = codecs.by_name("paper").encode(TENSOR)
    monkeypatch.setitem(sys.modules, "msfusion.codecs.fast", None)
    operations._fast.cache_clear()
    assert isinstance(operations_for(torch.device("cpu"), reference=False), Reference)
    assert codecs.by_name("paper").encode(TENSOR) == message
    operations._fast.cache_clear()


def test_without_zstandard_the_user_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ConfigError, match=r"needs zstandard: pip install .*\[codecs\]"):
        codecs.by_name("compact").encode(TENSOR)
