"""Several codes in a symbol: they come back, near their entropy, and damage is refused."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msfusion.codecs import DeadZone, read_header
from msfusion.codecs.dead_zone import AS_THEY_ARE, DEFLATED
from msfusion.codecs.entropy import deflated
from msfusion.codecs.grouped import GROUPINGS, Grouping
from msfusion.errors import CodecError

MIDDLE = 127
few = st.lists(st.sampled_from([127, 127, 127, 126, 128, 129, 120, 0, 254]), min_size=1, max_size=200)
GROUPED = pytest.mark.parametrize("grouping", GROUPINGS.values())


@GROUPED
@settings(max_examples=60)
@given(codes=few | st.lists(st.integers(0, 254), min_size=1, max_size=50))
def test_codes_come_back(grouping: Grouping, codes: list[int]) -> None:
    given_codes = np.array(codes, np.uint8)
    payload = memoryview(grouping.encode(given_codes, MIDDLE))
    assert grouping.decode(payload, len(codes), MIDDLE).tolist() == codes


def test_by_hand() -> None:
    grouping = Grouping(1, 5)
    payload = grouping.encode(np.array([127, 128, 127, 124, 127], np.uint8), MIDDLE)
    symbol, beyond = 1 * 81 + 2 * 27 + 1 * 9 + 0 * 3 + 1, [0, 2]
    first = deflated(bytes([symbol]))
    assert payload == struct.pack("<I", len(first)) + first + deflated(bytes(beyond))


def test_a_symbol_is_a_byte() -> None:
    assert [each.base**each.count for each in GROUPINGS.values()] == [243, 125, 225]


@GROUPED
def test_damage_is_refused(grouping: Grouping) -> None:
    generator = np.random.default_rng(0)
    codes = np.rint(generator.normal(127, 2, 303)).astype(np.uint8)
    sound = grouping.encode(codes, MIDDLE)
    for length in range(len(sound)):
        with pytest.raises(CodecError):
            grouping.decode(memoryview(sound[:length]), 303, MIDDLE)
    for elements in (1, 290, 310, 10**9):
        with pytest.raises(CodecError):
            grouping.decode(memoryview(sound), elements, MIDDLE)
    for _ in range(2000):
        damaged = bytearray(sound)
        damaged[generator.integers(len(damaged))] = generator.integers(256)
        try:
            found = grouping.decode(memoryview(damaged), 303, MIDDLE)
        except CodecError:
            continue
        assert found.shape == (303,)
        assert int(found.max()) <= 2 * MIDDLE


@pytest.mark.parametrize(
    ("last", "beyond"),
    [(243, []), (0 * 81 + 0 * 27 + 1 * 9 + 1 * 3 + 0, [0, 0]), (81 + 54 + 9 + 3 + 1, [200])],
    ids=["no symbol", "after the last", "no code"],
)
def test_what_no_encoder_writes_is_refused(last: int, beyond: list[int]) -> None:
    first = deflated(bytes([last]))
    payload = struct.pack("<I", len(first)) + first + deflated(bytes(beyond))
    with pytest.raises(CodecError):
        Grouping(1, 5).decode(memoryview(payload), 4, MIDDLE)


@pytest.mark.parametrize(("step", "most"), [(3.0, 0.5), (2.0, 1.05), (1.5, 1.45), (0.25, 4.1)])
def test_a_message_is_near_the_entropy_of_its_codes(step: float, most: float) -> None:
    torch.manual_seed(0)
    values = torch.randn(100_000)
    message = DeadZone(step=step).encode(values)
    assert 8 * len(message) / 100_000 < most
    steps = (values.abs() / (step * values.square().mean().sqrt()) + 0.4).floor() * values.sign()
    share = torch.unique(steps, return_counts=True)[1].double() / 100_000
    entropy = -float((share * share.log2()).sum())
    assert 8 * len(message) / 100_000 < 1.12 * entropy


def test_the_shortest_way_is_taken() -> None:
    torch.manual_seed(1)
    ways = set()
    for step in (0.02, 0.3, 1.0, 2.0, 3.0):
        for size in (3, 50_000):
            values = torch.randn(size)
            codec = DeadZone(step=step)
            header, payload = read_header(codec.encode(values))
            ways.add(header.settings[0])
            assert len(payload) <= size
            assert codec.decode(codec.encode(values)).shape == (size,)
    assert ways == {AS_THEY_ARE, DEFLATED, *GROUPINGS}
