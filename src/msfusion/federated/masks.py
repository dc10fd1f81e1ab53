"""Masks that cancel in a sum: keys, seeds, streams of random numbers, and numbers of a fixed point that wrap around.

Participants i and j agree on a seed that the server does not know (Diffie and Hellman, on the curve X25519). Both make
the same stream of 64-bit numbers of it; i adds it to what it sends and j subtracts it, modulo 2^64. In the sum of both
it is gone, exactly: integers that wrap around are added without any rounding, in whatever order.
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from msfusion.errors import ConfigError, SumError, TrainingError
from msfusion.extras import needing

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
    from numpy.typing import NDArray

SEED_BYTES = 32
"""Of a seed, a secret and a public key."""

RANGE_BITS = 20
"""A change of an entry must stay below 2 to this in size."""

SUM_BITS = 62
"""A sum of what participants may send stays below 2 to this in size. A sum of numbers that are drawn from all 2^64, as
it is where a mask was not taken away, does not: with n entries it passes for one with probability 2^-n."""

CHUNK = 2**17
"""Numbers of a stream that are made at a time."""


def check_cryptography(key: str) -> None:
    """Raise ConfigError, naming the setting, where the package is missing."""
    with needing("stream", f"at every participant {key}"):
        import cryptography  # noqa: F401  # only whether it is there


class Identity:
    """A participant's secret for one update, 32 random bytes, and what follows from it. It never leaves the
    participant.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._key = _private_key(derived(secret, b"key"))

    @property
    def public_key(self) -> bytes:
        """What others need in order to agree on a seed with this participant."""
        return self._key.public_key().public_bytes_raw()

    def own_seed(self, context: bytes) -> bytes:
        """The seed of the mask that only this participant knows. `context` is another in every attempt at a round."""
        return derived(self._secret, b"own", context)

    def pair_seed(self, other: bytes, context: bytes) -> bytes:
        """The seed that this participant has in common with the one of another public key, and with nobody else.

        Raises SumError for a key that nobody can have.
        """
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

        try:
            shared = self._key.exchange(X25519PublicKey.from_public_bytes(other))
        except ValueError as error:
            raise SumError("the server handed on a public key that is none: nothing more is sent") from error
        return derived(shared, b"pair" + b"".join(sorted((self.public_key, other))), context)


def is_a_key(public_key: bytes) -> bool:
    """Whether somebody can agree on a seed with whoever has this public key."""
    try:
        Identity(os.urandom(SEED_BYTES)).pair_seed(public_key, b"")
    except SumError:
        return False
    return True


def _private_key(secret: bytes) -> X25519PrivateKey:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(secret)


def derived(secret: bytes, purpose: bytes, context: bytes = b"") -> bytes:
    """32 bytes that say nothing of the secret (HKDF with SHA-256, RFC 5869), another for each purpose and context."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    about = b"msfusion secure sums " + purpose
    return HKDF(SHA256(), SEED_BYTES, salt=context or None, info=about).derive(secret)


def context_of(*parts: bytes) -> bytes:
    """A digest of several strings of bytes, another for each list of them."""
    told = hashlib.sha256()
    for part in parts:
        told.update(len(part).to_bytes(8, "little"))
        told.update(part)
    return told.digest()


def add_stream(numbers: Int64[Tensor, " entries"], seed: bytes, *, subtract: bool = False) -> None:
    """Add the stream of a seed to some numbers, in place and modulo 2^64; or subtract it.

    The stream is that of AES-256 in counter mode (NIST SP 800-38A), which a processor makes at gigabytes a second.
    """
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import AES256
    from cryptography.hazmat.primitives.ciphers.modes import CTR

    whole: NDArray[np.uint64] = numbers.numpy().view(np.uint64)  # signed numbers need not wrap around
    stream = Cipher(AES256(seed), CTR(bytes(16))).encryptor()
    zeros, made = bytes(8 * CHUNK), bytearray(8 * CHUNK)
    for begin in range(0, len(whole), CHUNK):
        part = whole[begin : begin + CHUNK]
        stream.update_into(zeros, made)
        mask = np.frombuffer(made, dtype="<u8", count=len(part))
        if subtract:
            part -= mask
        else:
            part += mask


def add_wrapping(total: Int64[Tensor, " entries"], numbers: Int64[Tensor, " entries"]) -> None:
    """Add some numbers to others, in place and modulo 2^64."""
    total.numpy().view(np.uint64)[:] += numbers.numpy().view(np.uint64)


@dataclass(frozen=True)
class FixedPoint:
    """Weighted changes as whole numbers, of which the sum over all participants cannot overflow.

    `weight` is the sum of the weights of all who may add something. A change x of weight w is round(w x 2^bits), so a
    mean over m participants is off by m / (weight 2^bits) / 2 at most: with `RANGE_BITS` below m 2^-42. Raises
    ConfigError where there are too many examples.
    """

    weight: int

    def __post_init__(self) -> None:
        if self.bits < 0:
            raise ConfigError(
                f"participants have {self.weight} examples in all, too many for method.secure: set method.weighting "
                "to 'uniform'"
            )

    @property
    def bits(self) -> int:
        """How many binary places there are."""
        return SUM_BITS - RANGE_BITS - self.weight.bit_length()

    def encode(self, changes: Tensor, weight: int, what: str) -> Int64[Tensor, " entries"]:
        """The numbers of some changes, flat. Raises TrainingError, naming `what` they are of, for one out of range."""
        flat = changes.reshape(-1)
        largest = float(flat.double().abs().max()) if len(flat) else 0.0
        if not largest < 2**RANGE_BITS:  # NaN as well
            raise TrainingError(
                f"{what} has changed by {largest:g} in one entry, and method.secure carries changes below "
                f"{2**RANGE_BITS}: nothing is sent; bring it into that range (smaller steps, inputs that are scaled)"
            )
        if not changes.is_floating_point():
            return flat.to(torch.int64) * (weight << self.bits)
        return (flat.double() * math.ldexp(weight, self.bits)).round_().to(torch.int64)

    def mean(self, total: Int64[Tensor, " entries"], weight: int) -> Float64[Tensor, " entries"]:
        """The mean change, where `total` is the sum of the numbers of participants with this weight in all."""
        return total.double() / math.ldexp(weight, self.bits)

    def mean_of_counts(self, total: Int64[Tensor, " entries"], weight: int) -> Int64[Tensor, " entries"]:
        """The same of whole numbers, rounded up: a counter that has risen anywhere does not stand still."""
        return -torch.div(-total, weight << self.bits, rounding_mode="floor")


def is_a_sum(total: Int64[Tensor, " entries"]) -> bool:
    """Whether some numbers can be the sum of what participants may send."""
    return bool((total.abs() <= 2**SUM_BITS).all()) and not bool((total == -(2**63)).any())
