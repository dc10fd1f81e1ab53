"""Sparsification: the k largest magnitudes, and a bitmap that says where they stand. All others become zero.

The rival `SP` of mask-encoded sparsification, which it equals with a mask of one bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from msfusion.codecs.kept import Values
from msfusion.codecs.mask_codec import MaskCodec
from msfusion.codecs.masks import Entropy, Rounding


@dataclass(frozen=True)
class TopK(MaskCodec):
    """The largest values with their signs, and one bit per element; `ratio` of the elements become zero.

    Raises ConfigError for settings that are out of range.
    """

    ratio: float = 0.99
    values: Values = "float32"
    entropy: Entropy = None

    name: ClassVar[str] = "top_k"
    number: ClassVar[int] = 2
    bits: ClassVar[int] = 1
    rounding: ClassVar[Rounding] = "nearest"  # of no consequence: there is nothing between zero and all ones
