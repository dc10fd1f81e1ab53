"""Masks: pairs agree on a stream, streams cancel in a sum to the last bit, and fixed-point numbers do not overflow."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR

from msfusion.errors import ConfigError, SumError, TrainingError
from msfusion.federated import masks
from msfusion.federated.masks import (
    CHUNK,
    RANGE_BITS,
    SUM_BITS,
    FixedPoint,
    Identity,
    add_stream,
    add_wrapping,
    check_cryptography,
    context_of,
    derived,
    is_a_sum,
)


def identities(count: int) -> list[Identity]:
    return [Identity(bytes([number]) * 32) for number in range(count)]


def test_two_agree_on_a_seed_and_others_have_another() -> None:
    a, b, c = identities(3)
    assert a.pair_seed(b.public_key, b"round") == b.pair_seed(a.public_key, b"round")
    seeds = {
        a.pair_seed(b.public_key, b"round"),
        a.pair_seed(b.public_key, b"other round"),
        a.pair_seed(c.public_key, b"round"),
        b.pair_seed(c.public_key, b"round"),
        a.own_seed(b"round"),
        a.own_seed(b"other round"),
        b.own_seed(b"round"),
    }
    assert len(seeds) == 7
    assert Identity(bytes(32)).public_key == a.public_key


def test_the_derivation_is_the_one_of_rfc_5869() -> None:
    """HKDF by its definition: HMAC of the secret under the salt, then one block of the expansion."""
    import hashlib
    import hmac

    secret, context = b"s" * 32, b"c" * 32
    pseudorandom = hmac.new(context, secret, hashlib.sha256).digest()
    expected = hmac.new(pseudorandom, b"msfusion secure sums own\x01", hashlib.sha256).digest()
    assert derived(secret, b"own", context) == expected


def test_a_context_is_of_parts_and_not_of_what_they_come_to_together() -> None:
    assert context_of(b"ab", b"c") != context_of(b"a", b"bc") != context_of(b"abc")


def test_a_key_that_nobody_can_have_is_refused() -> None:
    """A point of small order gives everybody the same shared secret."""
    with pytest.raises(SumError, match="public key that is none"):
        identities(1)[0].pair_seed(bytes(32), b"round")


@pytest.mark.parametrize("entries", [0, 1, 7, CHUNK, 2 * CHUNK + 3])
def test_a_stream_is_one_of_aes_and_is_taken_away_exactly(entries: int) -> None:
    numbers = torch.randint(-(2**63), 2**63 - 1, (entries,), generator=torch.Generator().manual_seed(0))
    masked = numbers.clone()
    add_stream(masked, b"k" * 32)
    stream = Cipher(AES256(b"k" * 32), CTR(bytes(16))).encryptor().update(bytes(8 * entries))
    for at in {0, entries // 2, entries - 1} & set(range(entries)):
        added = int(numbers[at]) + int.from_bytes(stream[8 * at : 8 * at + 8], "little")
        assert int(masked[at]) % 2**64 == added % 2**64
    add_stream(masked, b"k" * 32, subtract=True)
    assert torch.equal(masked, numbers)


def test_masks_of_all_pairs_cancel() -> None:
    people = identities(5)
    total = torch.zeros(1000, dtype=torch.int64)
    for one, me in enumerate(people):
        mine = torch.full((1000,), one)
        for other, their in enumerate(people):
            if other != one:
                add_stream(mine, me.pair_seed(their.public_key, b"round"), subtract=other < one)
        assert not is_a_sum(mine)
        add_wrapping(total, mine)
    assert torch.equal(total, torch.full((1000,), 0 + 1 + 2 + 3 + 4))


@pytest.mark.parametrize("weights", [(1, 1), (3, 1000, 17), (2**20, 2**30), (2**41,)])
def test_means_are_those_of_the_changes(weights: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    changes = [torch.randn(50, generator=generator) * 10.0**size for size, _ in enumerate(weights)]
    point, total = FixedPoint(sum(weights)), torch.zeros(50, dtype=torch.int64)
    for change, weight in zip(changes, weights, strict=True):
        add_wrapping(total, point.encode(change, weight, "it"))
    mean = sum(each.double() * weight for each, weight in zip(changes, weights, strict=True)) / sum(weights)
    assert is_a_sum(total)
    error = (point.mean(total, sum(weights)) - mean).abs().max()
    assert float(error) <= len(weights) * 2.0**-42 + 1e-13 * float(mean.abs().max())


def test_the_largest_changes_of_all_do_not_overflow() -> None:
    just_below = math.nextafter(2.0**RANGE_BITS, 0)
    for weights in ((1, 1, 1), (2**20 - 1, 2**20), (7, 2**38)):
        point, total = FixedPoint(sum(weights)), torch.zeros(2, dtype=torch.int64)
        for weight in weights:
            both = torch.tensor([just_below, -just_below], dtype=torch.float64)
            add_wrapping(total, point.encode(both, weight, "it"))
        assert is_a_sum(total)
        assert point.mean(total, sum(weights)).tolist() == pytest.approx([just_below, -just_below])
    assert is_a_sum(torch.tensor([2**SUM_BITS, -(2**SUM_BITS)]))
    assert not is_a_sum(torch.tensor([0, 2**SUM_BITS + 1]))
    assert not is_a_sum(torch.tensor([-(2**63)]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2.0**RANGE_BITS, -1e30])
def test_what_is_out_of_range_is_refused(value: float) -> None:
    with pytest.raises(TrainingError, match="the bias has changed by"):
        FixedPoint(10).encode(torch.tensor([0.0, value]), 1, "the bias")


@pytest.mark.parametrize("value", [2**RANGE_BITS, -(2**63), 2**63 - 1])
def test_counts_out_of_range_are_refused(value: int) -> None:
    with pytest.raises(TrainingError):
        FixedPoint(10).encode(torch.tensor([0, value]), 1, "the counter")


def test_counts_are_exact_and_a_mean_of_counts_is_rounded_up() -> None:
    point = FixedPoint(10)
    total = point.encode(torch.tensor([3, 1, 0, -4]), 4, "it")
    add_wrapping(total, point.encode(torch.tensor([3, 0, 0, -1]), 6, "it"))
    assert point.mean_of_counts(total, 10).tolist() == [3, 1, 0, -2]  # of 3, 0.4, 0 and -2.2


def test_too_many_examples_are_refused() -> None:
    assert FixedPoint(2**42 - 1).bits == 0
    with pytest.raises(ConfigError, match=r"method\.weighting"):
        FixedPoint(2**42)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(ConfigError, match=r"pip install .*\[stream\]'"):
        check_cryptography("method.secure")


def test_ten_million_entries_take_no_seconds() -> None:
    """0.03 to 0.1 seconds where it was measured; the bound is for a machine without instructions for AES."""
    import time

    numbers = torch.zeros(10_000_000, dtype=torch.int64)
    begin = time.perf_counter()
    masks.add_stream(numbers, b"k" * 32)
    assert time.perf_counter() - begin < 3
