"""Sparsification: the k largest magnitudes, and a bitmap that says where they stand. All others become zero.

The rival `SP` of mask-encoded sparsification, which it equals with a mask of one bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from msfusion.codecs.codec import Encoded, in_float32, not_finite
from msfusion.codecs.header import Header
from msfusion.codecs.kept import Values, all_finite
from msfusion.codecs.masks import (
    SETTINGS_SIZE,
    Entropy,
    check_choice,
    check_mask_message,
    check_ratio,
    check_same,
    decode_mask,
    encode_mask,
    kept_count,
    mask_payload_size,
)
from msfusion.codecs.operations import Operations
from msfusion.codecs.surviving import Surviving


@dataclass(frozen=True)
class TopK(Surviving):
    """The largest values with their signs, and one bit per element; `ratio` of the elements become zero.

    Raises ConfigError for settings that are out of range.
    """

    ratio: float = 0.99
    values: Values = "float32"
    entropy: Entropy = None

    name: ClassVar[str] = "top_k"
    number: ClassVar[int] = 2
    settings_size: ClassVar[int] = SETTINGS_SIZE

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        check_choice("values", self.values, get_args(Values))
        check_choice("entropy", self.entropy, ("zstd", None))

    def _encode(self, tensor: Float[Tensor, "..."], operations: Operations) -> Encoded:
        values = in_float32(tensor)
        top, kept = operations.largest(values, kept_count(self.ratio, len(values)))
        if not all_finite(kept):  # what is not finite is among the largest
            raise not_finite(self.name)
        chosen = self._chosen(len(values), top, kept)
        return encode_mask(
            values,
            chosen,
            kept if chosen is top else values[chosen],
            bits=1,
            rounding="nearest",
            kept_as=self.values,
            entropy=self.entropy,
            operations=operations,
        )

    def _chosen(
        self, elements: int, top: Int64[Tensor, " count"], largest: Float32[Tensor, " count"]
    ) -> Int64[Tensor, " count"]:
        """The positions of the values to send, ascending, from those of the largest and these themselves."""
        return top

    def _payload_size(self, elements: int, dtype: torch.dtype, signed: bool) -> int:
        # kept values carry their own signs
        return mask_payload_size(elements, kept_count(self.ratio, elements), 1, self.values, signed=False)

    def _check_settings(self, header: Header) -> None:
        count = kept_count(self.ratio, header.elements)
        check_same(self.name, header, bits=1, values=self.values, entropy=self.entropy, count=count)

    @classmethod
    def _check_message(cls, header: Header, payload: memoryview) -> None:
        check_mask_message(header, payload)

    @classmethod
    def _decode(
        cls, header: Header, payload: memoryview, out: Float32[Tensor, " elements"], operations: Operations
    ) -> None:
        decode_mask(header, payload, out, operations)
