"""Tensors large enough for the fast path's shortcuts: sampling, blocks, several codes at a time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from codec_tensors import EVERY_CODEC, same_bits
from torch import Tensor

from msfusion import codecs
from msfusion.codecs import MaskEncoded
from msfusion.codecs.operations import operations_for
from msfusion.codecs.reference import Reference

pytest.importorskip("numba")
from msfusion.codecs import compiling, selecting
from msfusion.codecs.fast import Fast
from msfusion.codecs.vectors import WORD

SIZE = 4096 * 20 + 5


def tensor_of(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(SIZE, generator=generator)
    peak = torch.zeros(SIZE)
    peak[77] = -4.0
    return {
        "signed": normal,
        "relu": normal.relu(),
        "few ties": (normal * 8).round(),
        "all equal": torch.full((SIZE,), -0.25),
        "zero": torch.zeros(SIZE),
        "one": peak,
        # the sample sees only zeros, or only large values, and misleads
        "large at the end": torch.cat([torch.zeros(SIZE - 400), torch.rand(400, generator=generator)]),
        "rising": torch.arange(SIZE, dtype=torch.float32),
        # the smallest value that is kept becomes larger in float16, than others that are not kept as well
        "far apart": torch.where(torch.arange(SIZE) % 500 == 0, 1.0, 1e-12 * normal),
        "bfloat16": normal.bfloat16(),
    }[kind]


KINDS = [
    "signed",
    "relu",
    "few ties",
    "all equal",
    "zero",
    "one",
    "large at the end",
    "rising",
    "far apart",
    "bfloat16",
]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bytes_and_bits(kind: str) -> None:
    tensor = tensor_of(kind)
    assert isinstance(operations_for(torch.device("cpu"), reference=False), Fast)
    for codec in EVERY_CODEC:
        message = codec.encode(tensor)
        assert message == codec.encode(tensor, reference=True), codec
        assert same_bits(codec.decode(message), codec.decode(message, reference=True)), codec


@pytest.mark.one_in_ci
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 400, 820, SIZE // 2, SIZE])
def test_the_largest_are_exact(kind: str, count: int) -> None:
    values = tensor_of(kind).float()
    fast, reference = Fast().largest(values, count), Reference().largest(values, count)
    assert same_bits(fast.values, reference.values)
    assert (fast.smallest, fast.surplus, fast.ties) == (
        reference.smallest,
        reference.surplus,
        reference.ties,
    )
    assert same_bits(Fast().positions(values, fast), Reference().positions(values, reference))


@pytest.mark.parametrize("lower", [0, 0x7F7FFFFF])
def test_a_sample_that_misleads_costs_time_only(lower: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = tensor_of("signed")
    expected = Reference().largest(values, 820)
    monkeypatch.setattr("msfusion.codecs.fast._likely_below", lambda bits, count: np.int32(lower))
    assert same_bits(Fast().largest(values, 820).values, expected.values)


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("size", [0, 5, 64, 1000, 1024])
def test_collecting_with_and_without_wide_instructions(wide: bool, size: int) -> None:
    keys = tensor_of("signed")[:size].view(torch.int32).numpy()
    magnitudes = keys & compiling.MAGNITUDE
    lower = np.int32(np.sort(magnitudes)[size // 2]) if size else np.int32(1)
    expected = keys[magnitudes >= lower]
    out = np.empty(len(expected) + WORD, np.int32)
    found = selecting.collect(keys, lower, wide, out)
    assert out[:found].tolist() == expected.tolist()
    assert selecting.collect(keys, lower, wide, out[: len(expected)]) == -1  # no room to be careless


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("size", [15, 16, 17, 31, 32, 63, 64, 65, 127, 128, 129, 150, 200])
def test_sizes_around_those_of_vectors(bits: int, size: int) -> None:
    for tensor in (tensor_of("signed")[:size], tensor_of("few ties")[:size]):
        codec = MaskEncoded(ratio=0.8, bits=bits)
        message = codec.encode(tensor)
        assert message == codec.encode(tensor, reference=True)
        assert same_bits(codec.decode(message), codec.decode(message, reference=True))


def test_threads_and_calls_do_not_share_what_they_write() -> None:
    tensors = [tensor_of(kind) for kind in ("signed", "relu", "few ties", "far apart")]
    codec = MaskEncoded()
    expected = [codec.encode(tensor, reference=True) for tensor in tensors]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert list(pool.map(codec.encode, tensors)) == expected
    assert [codec.encode(tensor) for tensor in tensors] == expected


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 4097, SIZE - 1])
def test_one_value_that_is_not_finite_is_found(bad: float, place: int) -> None:
    tensor = tensor_of("relu")
    tensor[place] = bad
    for codec in EVERY_CODEC:
        if not isinstance(codec, codecs.Identity):
            for reference in (False, True):
                with pytest.raises(codecs.CodecError, match="NaN or infinities"):
                    codec.encode(tensor, reference=reference)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("extra", range(9))
def test_every_width_and_remainder(bits: int, extra: int) -> None:
    tensor = tensor_of("signed")[: 4096 + extra]
    for codec in (MaskEncoded(ratio=0.9, bits=bits), codecs.Quantized(bits=bits)):
        message = codec.encode(tensor)
        assert message == codec.encode(tensor, reference=True)
        assert same_bits(codec.decode(message), codec.decode(message, reference=True))


def test_without_a_place_for_its_cache_a_kernel_is_compiled_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def njit(**options: bool) -> Callable[[object], object]:
        asked.append(options)
        if "cache" in options:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(compiling.numba, "njit", njit)
    assert compiling.compiled(tensor_of) is tensor_of
    assert asked == [{"nogil": True, "cache": True}, {"nogil": True}]
