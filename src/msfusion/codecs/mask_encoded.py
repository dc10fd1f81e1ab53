"""Mask-encoded sparsification (Zhou et al., ECAI 2024, arXiv 2408.13787).

k = max(1, floor((1 - r) d));   top = the k largest magnitudes;   T = the smallest of them
m_i = 2^b - 1 for a top value, else |x_i| (2^b - 1) / T, rounded, at most 2^b - 2
decoded: a top value as it is, else m_i T / (2^b - 1) with the sign of x_i
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from msfusion.codecs.kept import Values
from msfusion.codecs.mask_codec import MaskCodec
from msfusion.codecs.masks import Entropy, Rounding


@dataclass(frozen=True)
class MaskEncoded(MaskCodec):
    """The largest values as they are, all others in a mask of `bits` bits per element.

    `ratio` of the elements are not sent as values. `rounding`: "nearest" is what the authors' code does and has
    little more than half the error; "floor" is what their text says. `values`: the type of those that are sent.
    `entropy`: compress the mask, at the same error. A tensor where negative values matter costs one more bit
    per element. Raises ConfigError for settings that are out of range.
    """

    ratio: float = 0.99
    bits: int = 2
    rounding: Rounding = "nearest"
    values: Values = "float32"
    entropy: Entropy = None

    name: ClassVar[str] = "mask_encoded"
    number: ClassVar[int] = 1
